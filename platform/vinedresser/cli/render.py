"""Output of results on stdout: tables and lines, or JSON.

Markup in a path or a sentence has no effect.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def print_json(value: Any) -> None:
    """Print one JSON value; a non-finite number becomes null."""
    plain = _finite(value)
    print(json.dumps(plain, indent=1, default=str, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_lines(*lines: str | Text, style: str | None = None) -> None:
    """Print lines without wrapping them to the width of the terminal."""
    console = _console(soft_wrap=True)
    for line in lines:
        console.print(line, style=style)


def print_table(
    columns: Sequence[str | Column],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str = "",
    soft_wrap: bool = False,
) -> None:
    """Print a table without lines.

    Args:
        columns: headers; the prefix ">" aligns a column to the right; no header if all are empty.
        rows: one cell per column each.
        title: line above the table.
        soft_wrap: do not fold cells to the width of the terminal.
    """
    made = [
        Column(
            each.removeprefix(">"),
            justify="right" if each.startswith(">") else "left",
            overflow="fold",
        )
        if isinstance(each, str)
        else each
        for each in columns
    ]
    table = Table(
        *made,
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=any(column.header for column in made),
    )
    for row in rows:
        table.add_row(*row)
    _console(soft_wrap=soft_wrap).print(table)


def _console(*, soft_wrap: bool) -> Console:
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)
