"""What is dropped of a block before a tokenizer sees it, and what is only counted."""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vinedresser.config.task import Task
from vinedresser.data.corpora.corpus import Corpus, without_empty
from vinedresser.data.corpora.row import FIRST_LINES, Account, Pairs
from vinedresser.data.prepare.hashing import load_lines

# A piece has at most 16 characters, and normalisation seldom shortens text fourfold: a train row
# with more characters a token than this is too long without asking a tokenizer, which would make
# 666,666 ids of a line of a million characters.
MAX_CHARACTERS_PER_TOKEN = 64

# C0 and C1 but for tab; a line feed ends a line of a text file, and may stand inside a cell.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def folded(text: str) -> str:
    """Text as it is compared between splits: NFKC, without case, single spaces."""
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


@dataclass
class Found:
    """Rows of a block that are worth a word, whether they are kept or not.

    Attributes:
        control: rows with control characters, and the first lines of them.
        sources: held-out split -> train rows whose source stands in it.
        pairs: held-out split -> those whose target stands there with it.
    """

    control: "Count" = field(default_factory=lambda: Count())
    sources: dict[str, "Count"] = field(default_factory=dict)
    pairs: dict[str, "Count"] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "control": self.control.to_json(),
            "sources": {split: count.to_json() for split, count in self.sources.items()},
            "pairs": {split: count.to_json() for split, count in self.pairs.items()},
        }

    def add(self, other: dict[str, Any]) -> None:
        """Takes in what `to_json` said of another block."""
        self.control.add(other["control"])
        for mine, theirs in ((self.sources, other["sources"]), (self.pairs, other["pairs"])):
            for split, count in theirs.items():
                mine.setdefault(split, Count()).add(count)


@dataclass
class Count:
    """How many rows, and the first ten lines of them."""

    rows: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        """Takes in another count of other rows."""
        self.rows += other["rows"]
        self.lines = sorted([*self.lines, *other["lines"]])[:FIRST_LINES]

    def take(self, lines: NDArray[np.int64]) -> None:
        """Counts some rows by their lines, ascending."""
        self.add({"rows": len(lines), "lines": lines[:FIRST_LINES].tolist()})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"rows": self.rows, "lines": self.lines}


class Held:
    """The held-out splits, folded: what train must not hold."""

    def __init__(self, pairs: dict[str, dict[str, list[str]]]) -> None:
        """Takes split -> source -> targets, all folded."""
        self._targets = pairs
        self.sources = frozenset(source for found in pairs.values() for source in found)

    def save(self, path: Path) -> None:
        """Writes it for other processes; a dev and a test set are a megabyte."""
        path.write_text(json.dumps(self._targets), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Held":
        """What `save` wrote."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def shared(self, one: str, other: str) -> tuple[int, int]:
        """Distinct sources that two held-out splits share, and those with a target of both."""
        mine, theirs = self._targets.get(one, {}), self._targets.get(other, {})
        sources = mine.keys() & theirs.keys()
        return len(sources), sum(not set(mine[s]).isdisjoint(theirs[s]) for s in sources)

    def look(self, pairs: Pairs, found: Found) -> NDArray[np.bool_]:
        """(n,) which rows have a source of a held-out split; counts them."""
        sources = fold_all(pairs.source)
        is_held = np.zeros(len(pairs), dtype=np.bool_)
        if self.sources.isdisjoint(sources):
            return is_held
        is_held[:] = [source in self.sources for source in sources]
        for at in np.flatnonzero(is_held).tolist():
            line = pairs.lines[at : at + 1]
            for split, targets in self._targets.items():
                if (known := targets.get(sources[at])) is None:
                    continue
                found.sources.setdefault(split, Count()).take(line)
                if folded(pairs.target[at]) in known:
                    found.pairs.setdefault(split, Count()).take(line)
        return is_held


def fold_all(texts: Sequence[Any]) -> list[str]:
    """`folded` of each text, 0.7 us each: most need no more than their case removed."""
    joined = "\n".join(texts)
    if joined.count("\n") >= max(1, len(texts)):  # a cell with a line feed inside
        return [folded(text) for text in texts]
    odd: list[int] = []
    if not unicodedata.is_normalized("NFKC", joined):
        odd = [i for i, text in enumerate(texts) if not unicodedata.is_normalized("NFKC", text)]
    parts = _single_spaces(joined.casefold()).split("\n")
    for i in odd:
        parts[i] = folded(texts[i])
    return parts if texts else []


# White space that NFKC does not make a plain space of.
_OTHER_SPACES = "\t\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\u1680\u2028\u2029"


def _single_spaces(lines: str) -> str:
    """Each line of a text as `" ".join(line.split())` would have it."""
    for space in _OTHER_SPACES:
        if space in lines:
            lines = lines.replace(space, " ")
    while "  " in lines:
        lines = lines.replace("  ", " ")
    return lines.replace(" \n", "\n").replace("\n ", "\n").strip(" ")


def clean(pairs: Pairs, split: str, task: Task, account: Account) -> tuple[Pairs, Found]:
    """What of a block a tokenizer is to see, leakage and repeats aside.

    Args:
        pairs: all rows of a block.
        split: whose block it is; train alone loses more than its empty rows.
        task: limits and rules.
        account: where dropped rows are counted.
    """
    found = Found()
    pairs = without_empty(pairs, account)
    if not pairs.source:
        return pairs, found
    has_control = np.zeros(len(pairs), dtype=np.bool_)
    limits = (task.max_source_length, task.max_target_length)
    is_short = np.ones(len(pairs), dtype=np.bool_)
    for side, limit in zip((pairs.source, pairs.target), limits, strict=True):
        if not isinstance(side[0], str):
            continue
        if _has_control(side):
            has_control |= [bool(_CONTROL.search(text)) for text in _texts(side)]
        lengths = np.fromiter(map(len, side), np.int64, len(side))
        is_short &= lengths <= limit * MAX_CHARACTERS_PER_TOKEN
    if has_control.any():
        found.control.take(pairs.lines[has_control])
    if split != "train":
        return pairs, found
    if task.cleaning.control_characters == "drop":
        is_short = is_short[~has_control]
        pairs = pairs.keep(~has_control, account, "control_characters")
    return pairs.keep(is_short, account, "too_long"), found


_CONTROL_BYTES = bytes(range(9)) + bytes(range(11, 32)) + b"\x7f"
_OTHER_BYTES = bytes(set(range(256)) - set(_CONTROL_BYTES))


def _has_control(side: Sequence[Any]) -> bool:
    """Whether any text may hold a control character: a screen, ten times as fast as a search."""
    joined = "\n".join(side)
    if joined.count("\n") >= len(side):
        return True
    raw = joined.encode(errors="surrogatepass")
    return bool(raw.translate(None, _OTHER_BYTES)) or (
        b"\xc2" in raw and _CONTROL.search(joined.replace("\n", "")) is not None
    )


def _texts(side: Sequence[Any]) -> Iterable[str]:
    return side


@dataclass(frozen=True)
class Sieve:
    """What is dropped of train because of other rows: leakage and repeats.

    Attributes:
        scratch: the folder of `HELD` and of the lines to drop.
        is_parallel: whether either is asked for.
    """

    scratch: Path
    is_parallel: bool

    def sift(
        self, pairs: Pairs, block: tuple[str, int], task: Task, account: Account, found: Found
    ) -> Pairs:
        """The rows that are left of a cleaned block."""
        split, number = block
        if split != "train" or not self.is_parallel or not len(pairs):
            return pairs
        is_held = _held(str(self.scratch / HELD)).look(pairs, found)
        if task.cleaning.leakage == "drop":
            pairs = pairs.keep(~is_held, account, "leaked")
        if task.cleaning.dedup:
            lines = load_lines(self.scratch / repeats_file(number))
            pairs = pairs.keep(~np.isin(pairs.lines, lines), account, "duplicate")
        return pairs


HELD = "held.json"


def repeats_file(number: int) -> str:
    """Where the lines of a train block that repeat earlier rows are kept."""
    return f"repeats-{number:05d}"


def hashes_file(number: int) -> str:
    """Where the hashes of a train block's pairs are kept."""
    return f"hashes-{number:05d}.npy"


@functools.lru_cache(maxsize=1)
def _held(path: str) -> Held:
    return Held.load(Path(path))


def held_out(corpus: Corpus, task: Task) -> Held:
    """Folds dev and test; they are small, and read whole."""
    found: dict[str, dict[str, list[str]]] = {}
    for split in corpus.splits[1:]:
        targets = found.setdefault(split, {})
        for block in corpus.blocks(split):
            pairs, _ = clean(block.load(Account()), split, task, Account())
            for source, target in zip(
                fold_all(pairs.source), fold_all(pairs.target), strict=True
            ):  # fmt: skip
                targets.setdefault(source, []).append(target)
    return Held(found)
