"""A task's corpus as rows: files are checked whole first, then streamed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from vinedresser.config.corpus import TextCorpus
from vinedresser.config.task import Task
from vinedresser.data.lexicon import Lexicon
from vinedresser.data.row import Account, Row
from vinedresser.data.textfile import Facts, inspect_all, lines_of, refuse_changed
from vinedresser.errors import DataError

SplitName = Literal["train", "dev", "test"]


class Corpus(Protocol):
    """A corpus whose files have been inspected.

    Attributes:
        digests: path as the task names it -> SHA-256 in hex.
        notes: harmless oddities, one line each.
        splits: names of the splits that it has.
    """

    digests: dict[str, str]
    notes: list[str]
    splits: tuple[str, ...]

    def rows(self, split: str, account: Account) -> Iterator[Row]:
        """The kept rows of a split, in file order; the account is complete at the end."""
        ...

    def facts(self) -> list[Facts]:
        """What was found of each file."""
        ...


class ParallelText:
    """A `TextCorpus` whose files exist, are UTF-8 and have equally many lines on both sides."""

    def __init__(self, corpus: TextCorpus) -> None:
        pairs = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
        self._pairs = {
            name: (Path(pair.source), Path(pair.target)) for name, pair in pairs.items() if pair
        }
        self._facts = inspect_all([path for pair in self._pairs.values() for path in pair])
        problems = [
            f"{source} has {m} lines, {target} has {n}; line i of one must belong to line i of "
            "the other. Fix: find the missing line, or name the right pair"
            for source, target in self._pairs.values()
            if (m := self._facts[source].lines) != (n := self._facts[target].lines)
        ]
        if problems:
            raise DataError("\n".join(problems))
        self.digests = {
            name: self._facts[Path(name)].digest
            for pair in pairs.values() if pair
            for name in (pair.source, pair.target)
        }  # fmt: skip
        self.notes = [note for facts in self._facts.values() for note in facts.notes]
        self.splits = tuple(self._pairs)

    def rows(self, split: str, account: Account) -> Iterator[Row]:
        """The pairs of a split whose sides both hold something other than white space."""
        source, target = self._pairs[split]
        sides = zip(lines_of(source), lines_of(target), strict=False)
        for line, (one, other) in enumerate(sides, 1):
            account.rows_in += 1
            if not one.strip() or not other.strip():
                account.drop("empty", line)
            else:
                yield Row(one, other, line)
        refuse_changed([self._facts[source], self._facts[target]])

    def facts(self) -> list[Facts]:
        """What was found of each file."""
        return list(self._facts.values())


def open_corpus(task: Task) -> Corpus:
    """Inspects every file of a task's corpus, before any work is done with one.

    Raises:
        DataError: a file is missing, unreadable, empty, not UTF-8, or sides differ in lines; all
            problems of all files at once, each with path, line and byte column.
        ConfigError: a `package:` path whose package is not installed.
    """
    if isinstance(task.corpus, TextCorpus):
        return ParallelText(task.corpus)
    return Lexicon(task.corpus)


def read(task: Task, split: SplitName, *, account: Account | None = None) -> Iterator[Row]:
    """The rows of a split, in file order and constant memory (a lexicon is held whole).

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
    return corpus.rows(split, account or Account())


def source_digests(task: Task) -> dict[str, str]:
    """Path, as the task names it -> SHA-256 in hex of the file's bytes; absent lists left out."""
    return open_corpus(task).digests


def splits(task: Task) -> tuple[str, ...]:
    """Which of train, dev, test a task has, without reading a file."""
    corpus = task.corpus
    has_test = corpus.test is not None if isinstance(corpus, TextCorpus) else corpus.test_words
    return ("train", "dev", "test") if has_test else ("train", "dev")
