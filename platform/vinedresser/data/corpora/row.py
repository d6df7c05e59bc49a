"""Row: one pair of a corpus; Block: a part of a split; RowCounts: rows read and dropped."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rows of a block, at most: about 3 MB of text, so that memory stays the same for any corpus size,
# and Ray has 50 tasks per million rows. Tests make it smaller.
BLOCK_ROWS = 20_000
# Line numbers kept per reason; more would make the manifest grow with the damage.
FIRST_LINES = 10

# Text, or the recordings that follow each other in one utterance.
SourceItem = str | tuple[str, ...]
Lines = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """A source and its target, and the 1-based line they came from, unique in the split."""

    source: SourceItem
    target: str
    line: int


@dataclass
class RowCounts:
    """Every row in is a row out or counted by the reason it was dropped for.

    `dropped` maps a reason to rows, `first_lines` a reason to the first 10 line numbers.
    """

    rows_in: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_lines: dict[str, list[int]] = field(default_factory=dict)

    @property
    def rows_out(self) -> int:
        """Rows kept."""
        return self.rows_in - sum(self.dropped.values())

    def drop(self, reason: str, count: int, lines: list[int]) -> None:
        """Count rows that were read and dropped for one reason, with the first lines of them."""
        if not count:
            return
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        first = self.first_lines.setdefault(reason, [])
        if len(first) < FIRST_LINES or lines[0] < first[-1]:
            first[:] = sorted([*first, *lines])[:FIRST_LINES]

    def add(self, other: "RowCounts") -> None:
        """Add the counts of other rows of the split."""
        self.rows_in += other.rows_in
        for reason, count in other.dropped.items():
            self.drop(reason, count, other.first_lines[reason])

    def reasons(self) -> str:
        """Return `812 too_long, 188 empty`; empty where nothing was dropped."""
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(sorted(self.dropped.items())),
            "first_lines": dict(sorted(self.first_lines.items())),
        }


@dataclass(frozen=True)
class Pairs:
    """Rows as columns of equal length.

    Lines are 1-based, ascending and unique in the split.
    """

    source: Sequence[SourceItem]
    target: Sequence[str]
    lines: Lines

    def __len__(self) -> int:
        return len(self.lines)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Pairs":
        """Return rows, in their order."""
        held = list(rows)
        lines = np.fromiter((row.line for row in held), np.int64, len(held))
        return cls([row.source for row in held], [row.target for row in held], lines)

    def keep(self, is_kept: NDArray[np.bool_], counts: RowCounts, reason: str) -> "Pairs":
        """Return the rows of a mask; count the others as dropped."""
        if is_kept.all():
            return self
        lines = self.lines[~is_kept]
        counts.drop(reason, len(lines), lines[:FIRST_LINES].tolist())
        chosen = is_kept.tolist()
        source = list(itertools.compress(self.source, chosen))
        return Pairs(source, list(itertools.compress(self.target, chosen)), self.lines[is_kept])


@dataclass(frozen=True)
class Block(ABC):
    """A description of some consecutive raw rows of a split; a few hundred bytes to send.

    Any process that sees the same files reads the same rows from it.

    Attributes:
        split: train, dev or test.
        number: 0-based place in the split.
        count: raw rows in it, at most about `BLOCK_ROWS`.
    """

    split: str
    number: int
    count: int

    @abstractmethod
    def rows(self, counts: RowCounts) -> Iterator[Row]:
        """Yield its rows; count rows read, and rows that the corpus drops by reason.

        Raises:
            DataError: a file is not what it was when it was inspected.
        """

    def load(self, counts: RowCounts) -> Pairs:
        """Return `rows` as columns; a subclass that reads faster by columns overrides this."""
        return Pairs.of(self.rows(counts))


@dataclass(frozen=True)
class EntryBlock(Block):
    """Consecutive entries of a split that `parse` reads whole.

    Attributes:
        first: entries of the split before it.
        parse: module-level function, cached per process, that returns every (row, reason to drop
            it or "") of the split.
        arguments: arguments of `parse`; a digest of the files is one of them, so that changed
            files are parsed again.
    """

    first: int
    parse: Callable[..., Sequence[tuple[Row, str]]]
    arguments: tuple[Any, ...]

    @classmethod
    def cut(
        cls,
        split: str,
        parse: Callable[..., Sequence[tuple[Row, str]]],
        arguments: tuple[Any, ...],
        size: int,
    ) -> Iterator["EntryBlock"]:
        """Yield the blocks of a split, `size` entries each."""
        total = len(parse(*arguments))
        for number, first in enumerate(range(0, total, size)):
            yield cls(split, number, min(size, total - first), first, parse, arguments)

    def rows(self, counts: RowCounts) -> Iterator[Row]:
        """Yield the entries that are kept."""
        for row, reason in self.parse(*self.arguments)[self.first : self.first + self.count]:
            counts.rows_in += 1
            if reason:
                counts.drop(reason, 1, [row.line])
            else:
                yield row
