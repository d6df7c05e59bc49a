"""Names in texts exist: numbers of methods, files that are named in comments, metrics in README."""

import re
import subprocess
from pathlib import Path

import pytest

from vinedresser.metrics import METRICS

ROOT = Path(__file__).parents[1]
FOLDERS = ("platform", "trainables", "search_spaces", "pipelines", "benchmarks", "docs", "tests")
# A row of docs/methods.md: number, method, source, file.
ROW = re.compile(r"\| (\d+) \| .+ \| .+ \| `(.+)` \|")
# "methods.md 26", "methods.md 25, 26", "methods.md 40, 42-45".
CITED = re.compile(r"methods\.md ((?:\d+(?:-\d+)?(?:, | and )?)+)", re.IGNORECASE)
NAMED = re.compile(r"(?<![\w/*.{\"'-])[\w/]+\.(?:py|md)\b(?![\"'])")
# Written by a run, or examples of what a reader writes.
OTHER = {"health.md", "trainables/mine.py", "objectives/mine.py", "data/corpora/kinds/mine.py"}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return listed.splitlines()


def numbers(text: str) -> set[int]:
    """Return the numbers that a text cites, ranges written out."""
    found = set[int]()
    for group in CITED.findall(text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", group):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_ranges_and_lists_of_numbers_are_read():
    assert numbers("x (methods.md 40, 42-44), Methods.md 2 and 7; 9") == {40, 42, 43, 44, 2, 7}


def test_every_method_that_is_cited_is_listed_with_its_file(tracked: list[str]):
    rows = ROW.findall((ROOT / "docs/methods.md").read_text())
    listed = [int(number) for number, _ in rows]
    assert listed == sorted(set(listed))
    assert len(listed) > 70
    missing = [
        f for _, f in rows if not any(path.endswith(f"/{f}") or path == f for path in tracked)
    ]
    assert missing == []
    cited = set[int]()
    for path in tracked:
        if path.endswith(".py") and path.startswith(FOLDERS) and path != "tests/test_docs.py":
            cited |= numbers(" ".join((ROOT / path).read_text().split()))
    assert cited <= set(listed)


def test_every_file_that_a_comment_names_exists(tracked: list[str]):
    absent = []
    for path in tracked:
        is_page = path in ("README.md", "CONTRIBUTING.md")
        is_code = path.endswith(".py") and path.startswith(FOLDERS) and path != "tests/test_docs.py"
        if not is_page and not is_code:
            continue
        for name in NAMED.findall((ROOT / path).read_text()):
            lower = name.lower()
            if lower not in OTHER and not any(
                f"/{one}".lower().endswith(f"/{lower}") for one in tracked
            ):
                absent.append(f"{path}: {name}")
    assert absent == []


def test_readme_names_every_metric():
    text = (ROOT / "README.md").read_text()
    assert [name for name in METRICS if not re.search(rf"\b{name}\b", text)] == []
