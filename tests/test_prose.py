"""The words of docstrings, comments and messages in the product's files."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("platform/vinedresser", "trainables", "search_spaces", "pipelines")
UNITS = (
    "token|second|step|run|update|batch|rank|row|line|sentence|epoch|module|machine|minute|hour|"
    "trial|split|node|worker|pair|word|head|layer|command|metric|evaluation|day|sweep|file"
)
AMOUNTS = (
    "tokens|features|bytes|samples|updates|nats|batches|rows|ids|steps|threads|workers|sentences|"
    "pairs|frames|seconds|minutes|pictures|times|once|twice|ms|MB|GB"
)
# What a text must not contain: reason -> pattern.
PATTERNS = {
    "per": rf"\b(?:{AMOUNTS}) an? (?:{UNITS})\b",
    "personification": r"\b(?:(?:is|are|was|were|been) (?:told|asked|wanted)|tells?|says|wants?)\b",
    "old name": (
        r"\b(?:gold_share|mend(?:s|ed|ing)?|beside|nursery|by heart|politely|so many|nobody|"
        r"whoever|Judge)\b"
    ),
}
# First word of a docstring: a verb or a noun, no question.
OPENING = r"(?:What|Whether|How|Where|Who|Whose|Of|As)\b"
PAGES = ("README.md", "CONTRIBUTING.md", "docs/methods.md")


def texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text and True for a docstring, of docstrings, comments, messages and pages."""
    if path.suffix == ".md":
        yield from ((i, line, False) for i, line in enumerate(path.read_text().splitlines(), 1))
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if doc := ast.get_docstring(node):
                yield node.body[0].lineno, doc, True
        elif isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value, False
    with path.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string.lstrip("# "), False


def problems(path: Path) -> list[str]:
    """Return a line per pattern found."""
    found = []
    for line, text, is_doc in texts(path):
        if is_doc and (opening := re.match(OPENING, text)):
            found.append(f"{path}:{line}: docstring begins with {opening[0]!r}")
        for reason, pattern in PATTERNS.items():
            if match := re.search(pattern, " ".join(text.split())):
                found.append(f"{path}:{line}: {reason}: {match[0]!r}")
    return found


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('"""Whether it is."""', "Whether"),
        ("# 5 tokens a second", "per"),
        ("# the run is told to stop", "personification"),
        ("raise ValueError('a number is wanted')", "personification"),
        ("# the staging folder beside it", "old name"),
    ],
)
def test_the_search_finds_each_kind_of_problem(tmp_path: Path, code: str, reason: str) -> None:
    path = tmp_path / "code.py"
    path.write_text(code + "\n")
    (found,) = problems(path)
    assert reason in found


def cases() -> Iterator[Any]:
    code = (path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    for path in [*sorted(code), *(ROOT / page for page in PAGES)]:
        yield pytest.param(path, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", cases())
def test_texts_are_plain_technical_english(path: Path) -> None:
    assert problems(path) == []
