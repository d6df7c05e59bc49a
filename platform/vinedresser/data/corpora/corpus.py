"""A task's corpus: files are checked whole first, then described as blocks to read."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vinedresser.config.task import Task
from vinedresser.data.corpora import row
from vinedresser.data.corpora.row import Block, Pairs, Row, RowCounts
from vinedresser.errors import DataError

SplitName = Literal["train", "dev", "test"]


class Corpus(Protocol):
    """A corpus whose files have been inspected.

    Attributes:
        digests: path or URI -> SHA-256 in hex.
        notes: harmless oddities, one line each.
        splits: names of the splits that it has, train first.
        is_parallel: whether sides are text of comparable lengths and splits may overlap, so that
            alignment, repeats and leakage are looked at.
    """

    digests: dict[str, str]
    notes: list[str]
    splits: tuple[str, ...]
    is_parallel: bool

    def content(self) -> Any:
        """Return what decides the rows, as plain JSON: settings, and files by their digests."""
        ...

    def blocks(self, split: str) -> Iterator[Block]:
        """Return a split in parts, in file order."""
        ...

    def unpack(self, folder: Path) -> None:
        """Put into a folder what its blocks cannot read from the middle (archives)."""
        ...

    def refuse_changed(self) -> None:
        """Refuse files that were touched since they were inspected."""
        ...

    def place(self, split: str, line: int) -> str:
        """Return a row's line, with its file where the split has several."""
        ...


def together(counts: Sequence[int]) -> Iterator[slice]:
    """Yield neighbouring parts that share a block: at most `BLOCK_ROWS` rows, or one part."""
    start = held = 0
    for index, count in enumerate(counts):
        if held and held + count > row.BLOCK_ROWS:
            yield slice(start, index)
            start, held = index, 0
        held += count
    if held:
        yield slice(start, len(counts))


class Places:
    """Which file of a split a row stands in."""

    def __init__(self, names: Sequence[str], counts: Sequence[int]) -> None:
        self.names, self.starts = names, np.cumsum([0, *counts])

    def of(self, line: int) -> str:
        """Return the line, with its file where there are several."""
        if len(self.names) == 1:
            return str(line)
        index = int(np.searchsorted(self.starts, line - 1, side="right")) - 1
        return f"{self.names[index]}:{line - int(self.starts[index])}"


def open_corpus(task: Task) -> Corpus:
    """Inspect every file of a task's corpus, before any work is done with one.

    Raises:
        DataError: a file is missing, unreadable, empty, not UTF-8, or sides differ in lines; all
            problems of all files at once, each with path, line and byte column.
        ConfigError: a `package:` path whose package is not installed.
        MachineError: object storage does not answer.
    """
    return task.corpus.open(task)


def read(task: Task, split: SplitName, *, account: RowCounts | None = None) -> Iterator[Row]:
    """Return the rows of a split whose sides are not empty, in file order, a block at a time.

    Args:
        task: what to read.
        split: which part; see `splits`.
        account: where dropped rows are counted, if anybody wants to know.

    Raises:
        DataError: as `open_corpus`, at the call; or the task has no such split.
    """
    corpus = open_corpus(task)
    if split not in corpus.splits:
        raise DataError(f"{task.name} has no {split} split; it has {', '.join(corpus.splits)}")
    return _rows(corpus, split, account if account is not None else RowCounts())


def _rows(corpus: Corpus, split: str, account: RowCounts) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="vinedresser-") as folder:
        corpus.unpack(Path(folder))
        for block in corpus.blocks(split):
            pairs = without_empty(block.load(account), account)
            yield from map(Row, pairs.source, pairs.target, pairs.lines.tolist())
        corpus.refuse_changed()


def without_empty(pairs: Pairs, account: RowCounts) -> Pairs:
    """Return the rows whose sides both hold something other than white space."""
    is_kept = np.ones(len(pairs), dtype=np.bool_)
    for side in (pairs.source, pairs.target):
        if side and isinstance(side[0], str):
            texts: Any = side
            is_kept &= np.fromiter(map(len, texts), np.int64, len(texts)) > 0
            is_kept &= ~np.fromiter(map(str.isspace, texts), np.bool_, len(texts))
    return pairs.keep(is_kept, account, "empty")
