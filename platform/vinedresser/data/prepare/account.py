"""What a manifest says of a preparation: drops, lengths, padding, leakage, references."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vinedresser.config.task import Task
from vinedresser.data.batching.plan import Histogram, Ints, plan_cells
from vinedresser.data.corpora.corpus import Corpus
from vinedresser.data.corpora.row import Account
from vinedresser.data.prepare.clean import HELD, Count, Found, Held, hashes_file
from vinedresser.data.prepare.encode import LENGTHS, Encoded
from vinedresser.data.prepare.hashing import count_repeats
from vinedresser.errors import DamagedError, DataError

# Token budget that the manifest's padding figures are taken at.
PADDING_TOKENS = 4096
# Lengths of true translations correlate at 0.8 and more; sides that were shifted against each
# other by one line are near 0.
MIN_CORRELATION, MIN_ROWS = 0.3, 100
# Drops that the task asks for; the others are losses, which `max_drop_ratio` limits.
_CHOSEN = frozenset({"variant", "excluded", "beyond_train_words"})


class Tally:
    """What the blocks answered, in whatever order they did; a block answered twice counts once.

    Holds the cells of all blocks: about a byte a row.
    """

    def __init__(self, splits: Iterable[str]) -> None:
        self.splits = tuple(splits)
        self._of: dict[tuple[str, int], Encoded] = {}
        self._cells: dict[tuple[str, int], tuple[NDArray[np.int32], ...]] = {}

    def add(self, encoded: Encoded) -> None:
        """Takes one block's answer."""
        key = (encoded.split, encoded.block)
        self._cells[key] = tuple(np.asarray(c, dtype=np.int32) for c in encoded.cells)
        self._of[key] = Encoded(**{**vars(encoded), "cells": ([], [], [])})

    def blocks(self, split: str) -> list[Encoded]:
        """The answers for a split, in block order, without their cells."""
        return [self._of[key] for key in sorted(self._of) if key[0] == split]

    def account(self, split: str) -> Account:
        """What became of the rows of a split."""
        total = Account()
        for encoded in self.blocks(split):
            total.add(encoded.account)
        return total

    def found(self, split: str) -> Found:
        """What was seen in a split without being dropped for it."""
        total = Found()
        for encoded in self.blocks(split):
            total.add(encoded.found)
        return total

    def histogram(self, split: str) -> Histogram:
        """The cells of a split."""
        total: dict[int, int] = {}
        for (name, _), (source, target, count) in self._cells.items():
            if name == split:
                keys = (source.astype(np.int64) << 32) | target
                for key, rows in zip(keys.tolist(), count.tolist(), strict=True):
                    total[key] = total.get(key, 0) + rows
        cells = np.asarray(sorted(total), dtype=np.int64)
        counts = np.asarray([total[key] for key in cells.tolist()], dtype=np.int64)
        return Histogram(cells >> 32, cells & 0xFFFFFFFF, counts)

    def lengths(self) -> pa.Table:
        """The rows of `lengths.parquet`, in its order."""
        keys = [
            (at, block)
            for at, split in enumerate(self.splits)
            for block in sorted(b for s, b in self._cells if s == split)
        ]
        parts = [self._cells[self.splits[at], block] for at, block in keys]
        sizes = [len(part[0]) for part in parts]
        splits, blocks = (
            np.repeat(np.asarray(of, np.int32), sizes) for of in zip(*keys, strict=True)
        )
        columns = [np.concatenate(of) for of in zip(*parts, strict=True)]
        names = pa.DictionaryArray.from_arrays(pa.array(splits), pa.array(self.splits))
        arrays = [names, blocks, columns[0], columns[1], columns[2].astype(np.int64)]
        return pa.table(arrays, schema=LENGTHS)

    def refuse_missing(self, folder: Path) -> None:
        """Refuses to commit a set that lacks a shard.

        Raises:
            DamagedError: which one; a node that does not see the same folder wrote elsewhere.
        """
        for encoded in self._of.values():
            if encoded.shard and not (folder / encoded.shard).is_file():
                raise DamagedError(
                    f"{folder / encoded.shard}: written by a worker but not here. Fix: name a "
                    'workspace that every node sees, or prepare with executor="in_process"'
                )


def refuse_empty(task: Task, split: str, account: Account) -> None:
    """Refuses a split without a row.

    Raises:
        DataError: how many there were, and why none is left.
    """
    if not account.rows_out:
        raise DataError(
            f"{task.name}: {split}: 0 of {account.rows_in:,} pairs left: "
            f"{account.reasons() or 'none read'}. Fix: check the files, or raise "
            "max_source_length and max_target_length"
        )


def describe(task: Task, corpus: Corpus, tally: Tally, scratch: Path) -> dict[str, Any]:
    """The part of the manifest that counts and measures.

    Raises:
        DataError: a split without a row, too much of train dropped, test rows in train, or sides
            that seem shifted; the last three as the task's `cleaning` says.
    """
    accounts = {split: tally.account(split) for split in corpus.splits}
    for split, account in accounts.items():
        refuse_empty(task, split, account)
    _refuse_losses(task, accounts["train"])
    lengths = {split: _lengths(tally, split) for split in corpus.splits}
    notes = list(corpus.notes)
    notes += _alignment(task, corpus, lengths["train"])
    notes += _leakage(task, corpus, tally.found("train"))
    notes += _shared(corpus, scratch)
    for split in corpus.splits:
        if (control := tally.found(split).control).rows:
            notes.append(
                f"{split}: {control.rows:,} rows hold control characters, first lines "
                f"{_places(corpus, split, control)}; cleaning.control_characters says what to do"
            )
    shards = {s: [e.shard for e in tally.blocks(s) if e.shard] for s in corpus.splits}
    return {
        "account": {split: account.to_json() for split, account in accounts.items()},
        "lengths": lengths,
        "padding": _padding(tally),
        "buckets": _buckets(task, tally),
        "sources": corpus.digests,
        "overlap": _overlap(task, corpus, tally, scratch),
        "shards": shards,
        "notes": notes,
    }


def _places(corpus: Corpus, split: str, count: Count) -> str:
    return ", ".join(corpus.place(split, line) for line in count.lines)


def _refuse_losses(task: Task, account: Account) -> None:
    lost = {reason: n for reason, n in account.dropped.items() if reason not in _CHOSEN}
    total = account.rows_in - sum(account.dropped.values()) + sum(lost.values())
    limit = task.cleaning.max_drop_ratio
    if sum(lost.values()) > limit * total:
        worst = max(lost, key=lambda reason: lost[reason])
        raise DataError(
            f"{task.name}: train: {sum(lost.values()):,} of {total:,} pairs dropped "
            f"({account.reasons()}), more than cleaning.max_drop_ratio={limit:g} allows; first "
            f"{worst} lines {account.first_lines[worst][:3]}. Fix: raise the limits, or "
            "cleaning.max_drop_ratio"
        )


def _alignment(task: Task, corpus: Corpus, lengths: dict[str, Any]) -> list[str]:
    correlation = lengths["correlation"]
    if not corpus.is_parallel or lengths["rows"] < MIN_ROWS or correlation >= MIN_CORRELATION:
        return []
    text = (
        f"source and target lengths correlate at {correlation:.2f} only; are the files shifted "
        "against each other?"
    )
    if task.cleaning.strict_alignment:
        raise DataError(
            f"{task.name}: train: {text} Fix: align them, or set cleaning.strict_alignment=false"
        )
    return [f"train: warning: {text}"]


def _leakage(task: Task, corpus: Corpus, found: Found) -> list[str]:
    rule = task.cleaning.leakage
    if rule == "refuse" and (pairs := found.pairs.get("test", Count())).rows:
        raise DataError(
            f"{task.name}: {pairs.rows:,} train rows stand in test, source and target; train "
            f"lines {_places(corpus, 'train', pairs)}. Fix: cleaning.leakage=drop takes them out "
            "of train, cleaning.leakage=allow leaves them in"
        )
    verb = "had" if rule == "drop" else "have"
    return [
        f"train: {'' if rule == 'drop' else 'warning: '}{count.rows:,} rows {verb} a source of "
        f"{split}, {found.pairs.get(split, Count()).rows:,} of them its target too; first lines "
        f"{_places(corpus, 'train', count)}" + ("; dropped" if rule == "drop" else "")
        for split, count in sorted(found.sources.items())
    ]


def _shared(corpus: Corpus, scratch: Path) -> list[str]:
    """What is selected on dev must not be what is reported on test; neither split is touched."""
    if not corpus.is_parallel:
        return []
    sources, pairs = Held.load(scratch / HELD).shared("dev", "test")
    if not sources:
        return []
    return [f"test: warning: {sources:,} sources stand in dev, {pairs:,} of them with their target"]


def _overlap(task: Task, corpus: Corpus, tally: Tally, scratch: Path) -> dict[str, Any]:
    """Train rows that stand in dev or test too, and repeats; none asked of a lexicon."""
    if not corpus.is_parallel:
        return {}
    found = tally.found("train")
    splits = {
        split: {
            "pairs": found.pairs.get(split, Count()).rows,
            "sources": found.sources.get(split, Count()).rows,
            "pair_lines": found.pairs.get(split, Count()).lines,
            "train_lines": found.sources.get(split, Count()).lines,
        }
        for split in corpus.splits[1:]
    }
    files = [scratch / hashes_file(encoded.block) for encoded in tally.blocks("train")]
    files = [] if task.cleaning.dedup else [path for path in files if path.exists()]
    repeats = count_repeats(files)
    return {**splits, "train_repeats": repeats}


def _lengths(tally: Tally, split: str) -> dict[str, Any]:
    cells = tally.histogram(split)
    unknown = [sum(encoded.unknown[side] for encoded in tally.blocks(split)) for side in (0, 1)]
    sides = {
        name: {
            "tokens": int((values * cells.counts).sum()),
            "mean": round(float(np.average(values, weights=cells.counts)), 3),
            "median": _median(values, cells.counts),
            "max": int(values.max()),
            "unknown": unknown[side],
        }
        for side, (name, values) in enumerate((("source", cells.source), ("target", cells.target)))
    }
    correlation = round(_correlation(cells), 4)
    return {"rows": cells.rows, **sides, "correlation": correlation}


def _median(values: Ints, counts: Ints) -> float:
    order = np.argsort(values, kind="stable")
    ends, total = np.cumsum(counts[order]), int(counts.sum())
    middle = [values[order][np.searchsorted(ends, at, side="right")] for at in _middles(total)]
    return float(np.mean(middle))


def _middles(total: int) -> tuple[int, int]:
    return (total - 1) // 2, total // 2


def _correlation(cells: Histogram) -> float:
    """Pearson's, of source and target lengths; 1 where a side does not vary."""
    covariance = np.cov(cells.source, cells.target, fweights=cells.counts) if cells.rows > 1 else 0
    deviations = np.sqrt(np.diag(covariance)) if cells.rows > 1 else np.zeros(2)
    if not deviations.all():
        return 1.0
    return float(np.asarray(covariance)[0, 1] / deviations.prod())


def _padding(tally: Tally) -> dict[str, Any]:
    """Real share of a train epoch at 4096 tokens a batch."""
    cells = tally.histogram("train")
    found = plan_cells(cells, tokens=PADDING_TOKENS).padding(cells)
    shares = {"source": found.source, "target": found.target, "both": found.both}
    rounded = {side: round(share, 4) for side, share in shares.items()}
    return {"tokens": PADDING_TOKENS, "batches": found.batches, **rounded}


def _buckets(task: Task, tally: Tally) -> dict[str, Any]:
    """Upper edges of train's buckets, in tokens of the longer side, and the rows in each."""
    cells, width = tally.histogram("train"), task.bucket_width
    rows = np.bincount((cells.longest - 1) // width, weights=cells.counts).astype(int)
    return {"edges": [width * (i + 1) for i in range(len(rows))], "rows": rows.tolist()}
