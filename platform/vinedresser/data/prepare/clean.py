"""Cleaning, once per block: rows that are dropped before tokenization, and findings to report.

`clean_block` reads a block, cleans it and writes the rows that are left into the scratch folder,
as Arrow: everything that follows (duplicates, vocabularies, references, shards) reads those.
"""

import functools
import json
import re
import unicodedata
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vinedresser.config.task import Frames, Task
from vinedresser.data.corpora.corpus import without_empty
from vinedresser.data.corpora.row import FIRST_LINES, Block, Pairs, RowCounts
from vinedresser.data.prepare.hashing import hash_pairs, save_hashes

# A piece has at most 16 characters, and normalisation seldom shortens text fourfold: a train row
# with more characters per token than this is too long without tokenizing it, which would make
# 666,666 ids of a line of a million characters.
MAX_CHARACTERS_PER_TOKEN = 64

# The held-out splits, folded, in the scratch folder.
HELD_OUT_FILE = "held_out.json"

# C0 and C1 except tab; a line feed, which ends lines of text files, can be inside a cell.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f]")
_CONTROL_BYTES = bytes(range(9)) + bytes(range(11, 32)) + b"\x7f"
_OTHER_BYTES = bytes(set(range(256)) - set(_CONTROL_BYTES))
# White space that NFKC does not turn into a plain space.
_OTHER_SPACES = "\t\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\u1680\u2028\u2029"


@dataclass(frozen=True)
class PrepareJob:
    """Settings and folders of a preparation; plain values that any worker can receive.

    `folder` holds the saved tokenizers, `out` the shards, `scratch` cleaned blocks and hashes,
    which are not part of the set; `is_parallel`: see `Corpus`.
    """

    task: Task
    folder: str
    out: str
    scratch: str
    is_parallel: bool

    @property
    def names(self) -> tuple[str, str]:
        """Names of the source and target tokenizers in `folder`."""
        return ("joint", "joint") if self.task.has_joint_vocabulary else ("source", "target")


@dataclass
class LineCount:
    """A number of rows, and the first ten lines of them."""

    rows: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, rows: int, lines: list[int]) -> None:
        """Add other rows."""
        self.rows += rows
        self.lines = sorted([*self.lines, *lines])[:FIRST_LINES]


@dataclass
class Findings:
    """Rows to report, kept or dropped.

    `control` are rows with control characters; `sources` and `pairs` map a held-out split to the
    train rows whose source, or source and target as a pair, are in it.
    """

    control: LineCount = field(default_factory=LineCount)
    sources: dict[str, LineCount] = field(default_factory=dict)
    pairs: dict[str, LineCount] = field(default_factory=dict)

    def add(self, other: "Findings") -> None:
        """Add the findings of another block."""
        self.control.add(other.control.rows, other.control.lines)
        for mine, theirs in ((self.sources, other.sources), (self.pairs, other.pairs)):
            for split, count in theirs.items():
                mine.setdefault(split, LineCount()).add(count.rows, count.lines)


@dataclass(frozen=True)
class CleanedBlock:
    """Counts of a cleaned block, whose rows are in the scratch folder."""

    split: str
    number: int
    counts: RowCounts
    findings: Findings


def clean_block(block: Block, job: PrepareJob) -> CleanedBlock:
    """Read and clean a block, and write its rows into the scratch folder.

    Rows of train are compared with the held-out splits here, so these must be cleaned before, and
    hashed, so that repeats are found without the text.

    Raises:
        DataError: a file changed after it was inspected.
    """
    counts, scratch = RowCounts(), Path(job.scratch)
    pairs, findings = clean(block.load(counts), block.split, job.task, counts)
    if block.split == "train" and job.is_parallel:
        is_held_out = load_held_out(str(scratch / HELD_OUT_FILE)).find(pairs, findings)
        if job.task.cleaning.leakage == "drop":
            pairs = pairs.keep(~is_held_out, counts, "leaked")
        # Ray may run a task twice: files appear whole, by renaming, with the same bytes.
        partial = scratch / f"{uuid.uuid4().hex[:8]}.partial.npy"
        save_hashes(partial, hash_pairs(pairs.source, pairs.target), pairs.lines)
        partial.replace(scratch / hashes_file(block.number))
    texts = pa.large_string()
    is_recorded = isinstance(job.task.source_tokenizer, Frames)
    columns = {
        "source": pa.array(pairs.source, pa.list_(texts) if is_recorded else texts),
        "target": pa.array(pairs.target, texts),
        "line": pa.array(pairs.lines),
    }
    table, partial = pa.table(columns), scratch / f"{uuid.uuid4().hex[:8]}.partial"
    with partial.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    partial.replace(_cleaned_file(block, job))
    return CleanedBlock(block.split, block.number, counts, findings)


def read_cleaned(block: Block, job: PrepareJob, counts: RowCounts | None = None) -> Pairs:
    """Return the rows of a cleaned block that do not repeat earlier ones, where these are dropped.

    `counts` counts the repeats.
    """
    with pa.memory_map(str(_cleaned_file(block, job))) as file:
        table = pa.ipc.open_file(file).read_all()
        source, target = table["source"].to_pylist(), table["target"].to_pylist()
        lines = np.array(table["line"])
    if isinstance(job.task.source_tokenizer, Frames):
        source = [tuple(paths) for paths in source]
    pairs = Pairs(source, target, lines)
    if block.split != "train" or not job.is_parallel or not job.task.cleaning.dedup:
        return pairs
    path = Path(job.scratch) / repeats_file(block.number)
    repeats = np.frombuffer(path.read_bytes() if path.exists() else b"", dtype="<i8")
    return pairs.keep(~np.isin(lines, repeats), counts or RowCounts(), "duplicate")


def _cleaned_file(block: Block, job: PrepareJob) -> Path:
    return Path(job.scratch) / f"{block.split}-{block.number:05d}.arrow"


def repeats_file(number: int) -> str:
    """Return the name of the file with the lines of a train block that repeat earlier rows."""
    return f"repeats-{number:05d}"


def hashes_file(number: int) -> str:
    """Return the name of the file with the hashes of a train block's pairs."""
    return f"hashes-{number:05d}.npy"


def clean(pairs: Pairs, split: str, task: Task, counts: RowCounts) -> tuple[Pairs, Findings]:
    """Drop the rows of a block that no tokenizer should see, leakage and repeats aside.

    Rows that are not empty are dropped from train alone.
    """
    findings = Findings()
    pairs = without_empty(pairs, counts)
    if not pairs.source:
        return pairs, findings
    has_control = np.zeros(len(pairs), dtype=np.bool_)
    limits = (task.max_source_length, task.max_target_length)
    is_short = np.ones(len(pairs), dtype=np.bool_)
    for side, limit in zip((pairs.source, pairs.target), limits, strict=True):
        if not isinstance(side[0], str):
            continue
        texts: Sequence[Any] = side
        if _may_have_control(texts):
            has_control |= [bool(_CONTROL.search(text)) for text in texts]
        is_short &= np.fromiter(map(len, texts), np.int64) <= limit * MAX_CHARACTERS_PER_TOKEN
    if has_control.any():
        lines = pairs.lines[has_control]
        findings.control.add(len(lines), lines[:FIRST_LINES].tolist())
    if split != "train":
        return pairs, findings
    if task.cleaning.control_characters == "drop":
        is_short = is_short[~has_control]
        pairs = pairs.keep(~has_control, counts, "control_characters")
    return pairs.keep(is_short, counts, "too_long"), findings


def _may_have_control(texts: Sequence[str]) -> bool:
    """Return False if no text holds a control character; ten times as fast as a search."""
    joined = "\n".join(texts)
    if joined.count("\n") >= len(texts):
        return True
    raw = joined.encode(errors="surrogatepass")
    return bool(raw.translate(None, _OTHER_BYTES)) or (
        b"\xc2" in raw and _CONTROL.search(joined.replace("\n", "")) is not None
    )


class HeldOut:
    """Folded rows of the held-out splits, which train is compared with.

    `targets`: split -> source -> its targets.
    """

    def __init__(self, targets: dict[str, dict[str, list[str]]]) -> None:
        self.targets = targets
        self._sources = frozenset(source for found in targets.values() for source in found)

    @classmethod
    def of(cls, blocks: Sequence[Block], job: PrepareJob) -> "HeldOut":
        """Fold the cleaned blocks of dev and test, whole: they are small."""
        found: dict[str, dict[str, list[str]]] = {}
        for block in blocks:
            targets = found.setdefault(block.split, {})
            pairs = read_cleaned(block, job)
            folds = (fold_all(pairs.source), fold_all(pairs.target))
            for source, target in zip(*folds, strict=True):
                targets.setdefault(source, []).append(target)
        return cls(found)

    def shared(self, one: str, other: str) -> tuple[int, int]:
        """Count distinct sources that two splits share, and those with a target in both."""
        mine, theirs = self.targets.get(one, {}), self.targets.get(other, {})
        sources = mine.keys() & theirs.keys()
        return len(sources), sum(not set(mine[s]).isdisjoint(theirs[s]) for s in sources)

    def find(self, pairs: Pairs, findings: Findings) -> NDArray[np.bool_]:
        """Return (n,) rows that have a source of a held-out split; count them in `findings`."""
        sources = fold_all(pairs.source)
        is_held_out = np.zeros(len(pairs), dtype=np.bool_)
        if self._sources.isdisjoint(sources):
            return is_held_out
        is_held_out[:] = [source in self._sources for source in sources]
        for at in np.flatnonzero(is_held_out).tolist():
            lines = [int(pairs.lines[at])]
            for split, targets in self.targets.items():
                if (known := targets.get(sources[at])) is None:
                    continue
                findings.sources.setdefault(split, LineCount()).add(1, lines)
                if folded(pairs.target[at]) in known:
                    findings.pairs.setdefault(split, LineCount()).add(1, lines)
        return is_held_out


# A worker process reads the held-out splits once.
@functools.lru_cache(maxsize=1)
def load_held_out(path: str) -> HeldOut:
    """Read the held-out splits from the scratch folder."""
    return HeldOut(json.loads(Path(path).read_text(encoding="utf-8")))


def folded(text: str) -> str:
    """Return text as it is compared between splits: NFKC, without case, single spaces."""
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def fold_all(texts: Sequence[Any]) -> list[str]:
    """Return `folded` of each text, 0.7 us each: most need no more than their case removed."""
    lines = "\n".join(texts)
    if lines.count("\n") >= max(1, len(texts)):  # a cell with a line feed inside
        return [folded(text) for text in texts]
    odd: list[int] = []
    if not unicodedata.is_normalized("NFKC", lines):
        odd = [i for i, text in enumerate(texts) if not unicodedata.is_normalized("NFKC", text)]
    lines = lines.casefold()
    for space in _OTHER_SPACES:
        if space in lines:
            lines = lines.replace(space, " ")
    while "  " in lines:
        lines = lines.replace("  ", " ")
    parts = lines.replace(" \n", "\n").replace("\n ", "\n").strip(" ").split("\n")
    for i in odd:
        parts[i] = folded(texts[i])
    return parts if texts else []
