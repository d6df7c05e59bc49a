"""Every fault of the list has a test that is marked with it: `@pytest.mark.fault("T01")`.

D: of data (D24 concerns scoring). S: of storage, S05 to S09 while shards are written. T: of
training. P: of schedules.
"""

import ast
from collections.abc import Iterator

FAULTS = {
    *(f"D{i:02d}" for i in range(1, 26) if i != 24),
    *(f"S{i:02d}" for i in range(5, 10)),
    *(f"P{i:02d}" for i in range(1, 15) if i != 10),
    *(f"T{i:02d}" for i in range(1, 23)),
}


def marked(source: str) -> Iterator[str]:
    """Yield the faults that the tests of a file are marked with."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    yield from (ast.literal_eval(argument) for argument in mark.args)


def test_only_tests_count():
    source = """
@pytest.mark.fault("T01", "T02")
def test_this(): ...
@pytest.mark.fault("T03")
def helper(): ...
# @pytest.mark.fault("T04")
def test_that(): ...
"""
    assert list(marked(source)) == ["T01", "T02"]


def test_every_fault_has_its_tests(root):
    paths = (root / "tests").rglob("test_*.py")
    assert {fault for path in paths for fault in marked(path.read_text())} == FAULTS
