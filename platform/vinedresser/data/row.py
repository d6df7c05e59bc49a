"""Row: one pair of a corpus; Account: what became of every row that was read."""

from dataclasses import dataclass, field
from typing import Any

# Line numbers kept per reason; more would make the manifest grow with the damage.
FIRST_LINES = 10


@dataclass(frozen=True, slots=True)
class Row:
    """A source and its target, as text, and the 1-based line they came from."""

    source: str
    target: str
    line: int


@dataclass
class Account:
    """Every row in is a row out or counted by the reason it was dropped for.

    Attributes:
        rows_in: rows read.
        dropped: reason -> rows.
        first_lines: reason -> the first 10 line numbers.
    """

    rows_in: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_lines: dict[str, list[int]] = field(default_factory=dict)

    @property
    def rows_out(self) -> int:
        """Rows kept."""
        return self.rows_in - sum(self.dropped.values())

    def drop(self, reason: str, line: int) -> None:
        """Counts one row that was read and is not kept."""
        self.drop_many(reason, 1, [line])

    def drop_many(self, reason: str, count: int, lines: list[int]) -> None:
        """Counts rows of one reason, with the line numbers of some of them, in ascending order."""
        if not count:
            return
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        first = self.first_lines.setdefault(reason, [])
        first.extend(lines[: FIRST_LINES - len(first)])

    def reasons(self) -> str:
        """`812 too_long, 188 empty`; empty where nothing was dropped."""
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()))

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(sorted(self.dropped.items())),
            "first_lines": dict(sorted(self.first_lines.items())),
        }
