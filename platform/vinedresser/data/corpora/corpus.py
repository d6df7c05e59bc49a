"""A task's corpus: every file is inspected first, then described as blocks to read."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from vinedresser.config.task import Task
from vinedresser.data.corpora import row
from vinedresser.data.corpora.inputs import Stamp
from vinedresser.data.corpora.row import Block, Pairs, Row, RowCounts
from vinedresser.data.corpora.textfile import Facts, refuse_changed
from vinedresser.errors import DataError

SplitName = Literal["train", "dev", "test"]


class Corpus(ABC):
    """Base of corpora whose files have been inspected.

    Attributes:
        digests: path or URI -> SHA-256 in hex.
        notes: harmless oddities, one line each.
        splits: names of its splits, train first.
        is_parallel: True where both sides are text of comparable lengths and splits may overlap;
            then alignment, repeats and leakage are checked.
    """

    splits: tuple[str, ...]
    is_parallel: ClassVar[bool] = False

    def __init__(self, facts: dict[str, Facts]) -> None:
        self._facts, self._recordings = facts, dict[str, Stamp]()
        self.digests = {name: found.digest for name, found in facts.items()}
        self.notes = [note for found in facts.values() for note in found.notes]

    @abstractmethod
    def content(self) -> Any:
        """Return everything that decides the rows, as plain JSON: settings, digests of files."""

    @abstractmethod
    def blocks(self, split: str) -> Iterator[Block]:
        """Return a split in parts, in file order."""

    def unpack(self, folder: Path) -> None:  # noqa: B027 - most files are read whole
        """Write into a folder copies of files that cannot be read from the middle (archives)."""

    def refuse_changed(self) -> None:
        """Refuse files that changed since they were inspected."""
        refuse_changed({name: found.stamp for name, found in self._facts.items()})
        refuse_changed(self._recordings)

    def place(self, split: str, line: int) -> str:  # noqa: ARG002 - one file holds all splits
        """Return a row's line, with its file where the split has several."""
        return str(line)


def together(counts: Sequence[int]) -> Iterator[tuple[int, int, int, slice]]:
    """Yield (block, rows before it, its rows, its parts): neighbouring parts that share a block.

    A block has at most `BLOCK_ROWS` rows, or one part.
    """
    number = start = before = held = 0
    for index, count in enumerate([*counts, 0]):
        if held and (held + count > row.BLOCK_ROWS or index == len(counts)):
            yield number, before, held, slice(start, index)
            number, start, before, held = number + 1, index, before + held, 0
        held += count


def line_of_file(files: Sequence[tuple[str, int]], line: int) -> str:
    """Return a line of the given (name, lines) in a row, with its file where there are several."""
    if len(files) == 1:
        return str(line)
    for name, lines in files:
        if line <= lines:
            return f"{name}:{line}"
        line -= lines
    raise IndexError(line)


def open_corpus(task: Task) -> Corpus:
    """Inspect every file of a task's corpus.

    Raises:
        DataError: a file is missing, unreadable, empty, not UTF-8, or sides differ in lines; all
            problems of all files at once, each with path, line and byte column.
        ConfigError: a `package:` path whose package is not installed.
        MachineError: object storage does not answer.
    """
    return task.corpus.open(task)


def read(task: Task, split: SplitName, *, counts: RowCounts | None = None) -> Iterator[Row]:
    """Return the rows of a split whose sides are not empty, in file order, a block at a time.

    `counts` receives the numbers of rows read and dropped.

    Raises:
        DataError: as `open_corpus`, at the call; or the task has no such split.
    """
    corpus, total = open_corpus(task), counts if counts is not None else RowCounts()
    if split not in corpus.splits:
        raise DataError(f"{task.name} has no {split} split; it has {', '.join(corpus.splits)}")

    def rows() -> Iterator[Row]:
        with tempfile.TemporaryDirectory(prefix="vinedresser-") as folder:
            corpus.unpack(Path(folder))
            for block in corpus.blocks(split):
                pairs = without_empty(block.load(total), total)
                yield from map(Row, pairs.source, pairs.target, pairs.lines.tolist())
            corpus.refuse_changed()

    return rows()


def without_empty(pairs: Pairs, counts: RowCounts) -> Pairs:
    """Return the rows both sides of which hold a character other than white space."""
    is_kept = np.ones(len(pairs), dtype=np.bool_)
    for side in (pairs.source, pairs.target):
        if side and isinstance(side[0], str):
            texts: Any = side
            is_kept &= np.fromiter(map(len, texts), np.int64, len(texts)) > 0
            is_kept &= ~np.fromiter(map(str.isspace, texts), np.bool_, len(texts))
    return pairs.keep(is_kept, counts, "empty")
