"""A task's corpus: files are checked whole first, then described as blocks to read."""

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vinedresser.config.corpus import TextCorpus, names_of
from vinedresser.config.task import Task
from vinedresser.data.corpora import row
from vinedresser.data.corpora.inputs import expand
from vinedresser.data.corpora.row import Block, Pairs, Row, RowCounts
from vinedresser.data.corpora.textfile import Span, inspect_all, parting, refuse_changed, unpacked
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
        """What decides the rows, as plain JSON: settings, and files by their digests."""
        ...

    def blocks(self, split: str) -> Iterator[Block]:
        """A split in parts, in file order."""
        ...

    def unpack(self, folder: Path) -> None:
        """Puts into a folder what its blocks cannot read from the middle (archives)."""
        ...

    def refuse_changed(self) -> None:
        """DataError where a file was touched since it was inspected."""
        ...

    def place(self, split: str, line: int) -> str:
        """Where the user finds a row: its line, and its file where the split has several."""
        ...


# Kind of a corpus's configuration -> (module, class). Each is made from the task.
_KINDS = {
    "text": ("vinedresser.data.corpora.corpus", "ParallelText"),
    "table": ("vinedresser.data.corpora.table", "Table"),
    "lexicon": ("vinedresser.data.corpora.lexicon", "Lexicon"),
    "speech": ("vinedresser.data.corpora.speech", "Speech"),
    "digits": ("vinedresser.data.corpora.speech", "Digits"),
}


@dataclass(frozen=True)
class TextBlock(Block):
    """Lines of one or several pairs of files.

    Attributes:
        first: raw rows of the split before it.
        source: parts of source files.
        target: parts of target files, line by line the same.
    """

    first: int
    source: tuple[Span, ...]
    target: tuple[Span, ...]

    def load(self, account: RowCounts) -> Pairs:
        """All its rows, also those with an empty side."""
        sides = [
            spans[0].lines() if len(spans) == 1 else [x for span in spans for x in span.lines()]
            for spans in (self.source, self.target)
        ]
        account.rows_in += self.count
        lines = np.arange(self.first + 1, self.first + self.count + 1, dtype=np.int64)
        return Pairs(sides[0], sides[1], lines)

    def rows(self, account: RowCounts) -> Iterator[Row]:
        """All its rows, also those with an empty side."""
        pairs = self.load(account)
        return map(Row, pairs.source, pairs.target, pairs.lines.tolist())


def together(counts: Sequence[int]) -> Iterator[slice]:
    """Neighbouring parts of a split that share a block: at most `BLOCK_ROWS` rows, or one part."""
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
        """The line, with its file where there are several."""
        if len(self.names) == 1:
            return str(line)
        index = int(np.searchsorted(self.starts, line - 1, side="right")) - 1
        return f"{self.names[index]}:{line - int(self.starts[index])}"


class ParallelText:
    """A `TextCorpus` whose files exist, are UTF-8 and have equally many lines on both sides."""

    is_parallel = True

    def __init__(self, task: Task) -> None:
        corpus = task.corpus
        assert isinstance(corpus, TextCorpus)
        pairs = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
        self._files = {
            split: (expand(names_of(pair.source)), expand(names_of(pair.target)))
            for split, pair in pairs.items()
            if pair
        }
        self._refuse_uneven()
        self._facts = inspect_all(
            [name for sides in self._files.values() for side in sides for name in side]
        )
        self._refuse_misaligned()
        self.digests = {name: facts.digest for name, facts in self._facts.items()}
        self.notes = [note for facts in self._facts.values() for note in facts.notes]
        self.splits = tuple(self._files)
        self._places = {
            split: Places(sides[0], [self._facts[name].lines for name in sides[0]])
            for split, sides in self._files.items()
        }

    def _refuse_uneven(self) -> None:
        for split, (source, target) in self._files.items():
            if len(source) != len(target):
                raise DataError(
                    f"{split}: {len(source)} source files ({source[0]} ...) and {len(target)} "
                    f"target files ({target[0]} ...); the i-th of one belongs to the i-th of the "
                    "other. Fix: name as many on both sides"
                )

    def _refuse_misaligned(self) -> None:
        problems = [
            f"{source} has {one.lines} lines, {target} has {other.lines}; line i of one must "
            f"belong to line i of the other, and lengths part ways near line "
            f"{parting(one, other)}. Fix: find the missing line, or name the right pair"
            for sides in self._files.values()
            for source, target in zip(*sides, strict=True)
            if (one := self._facts[source]).lines != (other := self._facts[target]).lines
        ]
        if problems:
            raise DataError("\n".join(problems))

    def content(self) -> Any:
        """The digests of every split's files."""
        return {
            "kind": "text",
            **{
                split: [[self.digests[name] for name in side] for side in sides]
                for split, sides in self._files.items()
            },
        }

    def blocks(self, split: str) -> Iterator[TextBlock]:
        """Blocks over all files of a split."""
        source, target = (
            [span for name in side for span in self._facts[name].spans()]
            for side in self._files[split]
        )
        counts = [span.count for span in source]
        first = 0
        for number, part in enumerate(together(counts)):
            count = sum(counts[part])
            spans = (tuple(source[part]), tuple(target[part]))
            yield TextBlock(split, number, count, first, *spans)
            first += count

    def unpack(self, folder: Path) -> None:
        """Writes the content of compressed files beside the shards to be."""
        self._facts = {name: unpacked(facts, folder) for name, facts in self._facts.items()}

    def refuse_changed(self) -> None:
        """DataError where a file was touched since it was inspected."""
        refuse_changed(self._facts.values())

    def place(self, split: str, line: int) -> str:
        """The line, with its source file where there are several."""
        return self._places[split].of(line)


def open_corpus(task: Task) -> Corpus:
    """Inspects every file of a task's corpus, before any work is done with one.

    Raises:
        DataError: a file is missing, unreadable, empty, not UTF-8, or sides differ in lines; all
            problems of all files at once, each with path, line and byte column.
        ConfigError: a `package:` path whose package is not installed.
        MachineError: object storage does not answer.
    """
    module, name = _KINDS[task.corpus.kind]
    corpus: Corpus = getattr(importlib.import_module(module), name)(task)
    return corpus


def read(task: Task, split: SplitName, *, account: RowCounts | None = None) -> Iterator[Row]:
    """The rows of a split whose sides are not empty, in file order, a block at a time.

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
    """The rows whose sides both hold something other than white space."""
    is_kept = np.ones(len(pairs), dtype=np.bool_)
    for side in (pairs.source, pairs.target):
        if side and isinstance(side[0], str):
            texts: Any = side
            is_kept &= np.fromiter(map(len, texts), np.int64, len(texts)) > 0
            is_kept &= ~np.fromiter(map(str.isspace, texts), np.bool_, len(texts))
    return pairs.keep(is_kept, account, "empty")


def source_digests(task: Task) -> dict[str, str]:
    """Path or URI -> SHA-256 in hex of the file's bytes; absent lists left out."""
    return open_corpus(task).digests


def splits(task: Task) -> tuple[str, ...]:
    """Which of train, dev, test a task has, without reading a file."""
    corpus = task.corpus
    counted = next((getattr(corpus, n) for n in _COUNTED if hasattr(corpus, n)), None)
    has_test = getattr(corpus, "test", None) is not None if counted is None else counted > 0
    return ("train", "dev", "test") if has_test else ("train", "dev")


# Corpora that draw their test split say how large it is; the others name its files.
_COUNTED = ("test_words", "test_strings")
