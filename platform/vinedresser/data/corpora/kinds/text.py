"""Parallel text files: line n of the source file belongs to line n of the target file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vinedresser.config.corpus import CorpusConfig, Files, names_of
from vinedresser.config.section import Section
from vinedresser.config.task import Task
from vinedresser.data.corpora.corpus import Corpus, line_of_file, together
from vinedresser.data.corpora.inputs import expand
from vinedresser.data.corpora.row import Block, Pairs, Row, RowCounts
from vinedresser.data.corpora.textfile import Span, inspect_all, parting, unpacked
from vinedresser.errors import DataError


class Pair(Section):
    """Two parallel text files: line n of one belongs to line n of the other.

    Where each side names several files, the first source file belongs to the first target file,
    and so on.
    """

    source: Files
    target: Files


class TextCorpus(CorpusConfig):
    """Parallel UTF-8 text files, one sentence per line; no character but a line feed ends one."""

    kind: Literal["text"] = "text"
    train: Pair
    dev: Pair
    test: Pair | None = None

    def open(self, task: Task) -> "ParallelText":
        """See `CorpusConfig.open`."""
        return ParallelText(self, task)


@dataclass(frozen=True)
class TextBlock(Block):
    """Lines of one or several pairs of files.

    `first` is the number of raw rows of the split before it; source and target are the same lines.
    """

    first: int
    source: tuple[Span, ...]
    target: tuple[Span, ...]

    def load(self, counts: RowCounts) -> Pairs:
        """Return all its rows, empty sides included."""
        sides = [
            spans[0].lines() if len(spans) == 1 else [x for span in spans for x in span.lines()]
            for spans in (self.source, self.target)
        ]
        counts.rows_in += self.count
        lines = np.arange(self.first + 1, self.first + self.count + 1, dtype=np.int64)
        return Pairs(sides[0], sides[1], lines)

    def rows(self, counts: RowCounts) -> Iterator[Row]:
        """Return all its rows, empty sides included."""
        pairs = self.load(counts)
        return map(Row, pairs.source, pairs.target, pairs.lines.tolist())


class ParallelText(Corpus):
    """A `TextCorpus` whose files exist, are UTF-8 and have equally many lines on both sides."""

    is_parallel = True

    def __init__(self, corpus: TextCorpus, task: Task) -> None:
        del task
        pairs = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
        self._files = {
            split: (expand(names_of(pair.source)), expand(names_of(pair.target)))
            for split, pair in pairs.items()
            if pair
        }
        self.splits = tuple(self._files)
        for split, (source, target) in self._files.items():
            if len(source) != len(target):
                raise DataError(
                    f"{split}: {len(source)} source files ({source[0]} ...) and {len(target)} "
                    f"target files ({target[0]} ...); the i-th of one belongs to the i-th of the "
                    "other. Fix: name as many on both sides"
                )
        every = [name for sides in self._files.values() for side in sides for name in side]
        super().__init__(inspect_all(every))
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
        """Return the digests of every split's files."""
        files = {
            split: [[self.digests[name] for name in side] for side in sides]
            for split, sides in self._files.items()
        }
        return {"kind": "text", **files}

    def blocks(self, split: str) -> Iterator[TextBlock]:
        """Yield blocks over all files of a split."""
        source, target = (
            [span for name in side for span in self._facts[name].spans()]
            for side in self._files[split]
        )
        for number, first, count, part in together([span.count for span in source]):
            spans = (tuple(source[part]), tuple(target[part]))
            yield TextBlock(split, number, count, first, *spans)

    def unpack(self, folder: Path) -> None:
        """Write the content of compressed files into the folder."""
        self._facts = {name: unpacked(facts, folder) for name, facts in self._facts.items()}

    def place(self, split: str, line: int) -> str:
        """Return the line, with its source file where there are several."""
        files = [(name, self._facts[name].lines) for name in self._files[split][0]]
        return line_of_file(files, line)
