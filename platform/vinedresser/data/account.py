"""What a manifest says of a preparation: drops, lengths, padding, overlap, references."""

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vinedresser.config.corpus import TextCorpus
from vinedresser.config.task import Task
from vinedresser.data.corpus import Corpus
from vinedresser.data.encode import LENGTHS
from vinedresser.data.order import arrange, padding
from vinedresser.data.row import FIRST_LINES, Account, Row
from vinedresser.errors import DamagedError, DataError

# A piece has at most 16 characters, and normalisation seldom shortens text fourfold: a train row
# with more characters a token than this is too long without asking a tokenizer, which would make
# 666,666 ids of a line of a million characters.
MAX_CHARACTERS_PER_TOKEN = 64
# Token budget that the manifest's padding figures are taken at.
PADDING_TOKENS = 4096
# Lengths of true translations correlate at 0.8 and more; sides that were shifted against each
# other by one line are near 0.
MIN_CORRELATION, MIN_ROWS = 0.3, 100


class Clean:
    """The rows that go to a tokenizer, and an account of those that do not.

    Attributes:
        accounts: split -> account of the latest whole pass over it.
        references: split -> SHA-256 in hex of the targets of dev and test.
    """

    def __init__(self, task: Task, corpus: Corpus) -> None:
        self.corpus, self.task = corpus, task
        self.accounts: dict[str, Account] = {}
        self.references: dict[str, str] = {}

    def rows(self, split: str) -> Iterator[Row]:
        """The cleaned rows of a split, in file order."""
        account = self.accounts[split] = Account()
        digest = hashlib.sha256()
        source_limit = self.task.max_source_length * MAX_CHARACTERS_PER_TOKEN
        target_limit = self.task.max_target_length * MAX_CHARACTERS_PER_TOKEN
        for row in self.corpus.rows(split, account):
            is_long = len(row.source) > source_limit or len(row.target) > target_limit
            if is_long and split == "train":
                account.drop("too_long", row.line)
                continue
            if split != "train":
                digest.update(row.target.encode() + b"\n")
            yield row
        if split != "train":
            self.references[split] = digest.hexdigest()

    def refuse_empty(self, split: str) -> None:
        """Refuses a split without a row; makes a pass where none was made yet.

        Raises:
            DataError: how many there were, and why none is left.
        """
        if split not in self.accounts and next(self.rows(split), None) is not None:
            return
        account = self.accounts[split]
        if not account.rows_out:
            raise DataError(
                f"{self.task.name}: {split}: 0 of {account.rows_in:,} pairs left: "
                f"{account.reasons() or 'none read'}. Fix: check the files, or raise "
                "max_source_length and max_target_length"
            )


class Facts:
    """What the blocks answered, in whatever order they did."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, int], dict[str, Any]] = {}

    def add(self, result: dict[str, Any]) -> None:
        """Takes one block's answer; a block answered twice counts once."""
        for side in ("source_lengths", "target_lengths"):
            result[side] = np.asarray(result[side], dtype=np.int32)
        self._results[result["split"], result["block"]] = result

    def of(self, split: str) -> list[dict[str, Any]]:
        """The answers for a split, in block order."""
        return [self._results[key] for key in sorted(self._results) if key[0] == split]

    def lengths(self, split: str, side: str) -> NDArray[np.int64]:
        """(rows,) tokens of one side, EOS included, in row order."""
        parts = [result[f"{side}_lengths"] for result in self.of(split)]
        return np.concatenate(parts).astype(np.int64)

    def histogram(self) -> pa.Table:
        """The rows of `lengths.parquet`, in its order."""
        parts = []
        for split in ("train", "dev", "test"):
            for result in self.of(split):
                keys = np.stack([result["source_lengths"], result["target_lengths"]], axis=1)
                cells, counts = np.unique(keys, axis=0, return_counts=True)
                names = pa.DictionaryArray.from_arrays(
                    pa.array(np.zeros(len(cells), np.int32)), pa.array([split])
                )
                block = np.full(len(cells), result["block"], np.int32)
                columns = [names, block, cells[:, 0], cells[:, 1], counts.astype(np.int64)]
                parts.append(pa.table(columns, schema=LENGTHS))
        return pa.concat_tables(parts).unify_dictionaries()

    def refuse_missing(self, folder: Path) -> None:
        """Refuses to commit a set that lacks a shard.

        Raises:
            DamagedError: which one; a node that does not see the same folder wrote elsewhere.
        """
        for result in self._results.values():
            if result["shard"] and not (folder / result["shard"]).is_file():
                raise DamagedError(
                    f"{folder / result['shard']}: written by a worker but not here. Fix: name a "
                    'workspace that every node sees, or prepare with executor="in_process"'
                )


def describe(task: Task, corpus: Corpus, clean: Clean, facts: Facts) -> dict[str, Any]:
    """The part of the manifest that counts and measures.

    Raises:
        DataError: no train row is short enough.
    """
    notes = list(corpus.notes)
    lengths, shards = {}, {}
    for split in corpus.splits:
        results = facts.of(split)
        for result in results:
            lines = list(result["too_long_lines"])
            clean.accounts[split].drop_many("too_long", result["too_long"], lines)
        clean.refuse_empty(split)
        lengths[split] = _lengths(facts, split)
        shards[split] = [result["shard"] for result in results if result["shard"]]
    correlation = lengths["train"]["correlation"]
    is_parallel = isinstance(task.corpus, TextCorpus) and lengths["train"]["rows"] >= MIN_ROWS
    if is_parallel and correlation < MIN_CORRELATION:
        notes.append(
            f"train: warning: source and target lengths correlate at {correlation:.2f} only; are "
            "the files shifted against each other?"
        )
    return {
        "account": {split: clean.accounts[split].to_json() for split in corpus.splits},
        "lengths": lengths,
        "padding": _padding(facts),
        "sources": corpus.digests,
        "reference_digests": clean.references,
        "shards": shards,
        "notes": notes,
    }


def _lengths(facts: Facts, split: str) -> dict[str, Any]:
    source, target = (facts.lengths(split, side) for side in ("source", "target"))
    varies = len(source) > 1 and source.std() > 0 and target.std() > 0
    unknown = {
        side: sum(int(result[f"unknown_{side}"]) for result in facts.of(split))
        for side in ("source", "target")
    }
    sides = {
        side: {
            "tokens": int(values.sum()),
            "mean": round(float(values.mean()), 3),
            "median": float(np.median(values)),
            "max": int(values.max()),
            "unknown": unknown[side],
        }
        for side, values in (("source", source), ("target", target))
    }
    correlation = float(np.corrcoef(source, target)[0, 1]) if varies else 1.0
    return {"rows": len(source), **sides, "correlation": round(correlation, 4)}


def _padding(facts: Facts) -> dict[str, Any]:
    """Real share of a train epoch at 4096 tokens a batch."""
    source, target = facts.lengths("train", "source"), facts.lengths("train", "target")
    found = padding(source, target, arrange(source, target, tokens=PADDING_TOKENS))
    shares = {"source": found.source, "target": found.target, "both": found.both}
    rounded = {side: round(share, 4) for side, share in shares.items()}
    return {"tokens": PADDING_TOKENS, "batches": found.batches, **rounded}


def overlap(clean: Clean, notes: list[str]) -> dict[str, Any]:
    """Train rows that stand in dev or test too, exactly: as a pair, and as a source alone.

    Also counts the repeated pairs of train. A lexicon is disjoint by construction. Holds dev and
    test in memory, and 8 bytes a train row.
    """
    if not isinstance(clean.task.corpus, TextCorpus):
        return {}
    held = [split for split in clean.corpus.splits if split != "train"]
    pairs = {s: {(r.source, r.target) for r in clean.corpus.rows(s, Account())} for s in held}
    sources = {split: {source for source, _ in found} for split, found in pairs.items()}
    counts = {split: {"pairs": 0, "sources": 0, "train_lines": list[int]()} for split in held}
    hashes = array("q")  # 8 bytes a row
    for row in clean.corpus.rows("train", Account()):
        pair = (row.source, row.target)
        hashes.append(hash(pair))
        for split in held:
            if row.source in sources[split]:
                _count(counts[split], is_pair=pair in pairs[split], line=row.line)
    repeated = len(hashes) - len(np.unique(np.asarray(hashes, dtype=np.int64)))
    for split, found in counts.items():
        if found["sources"]:
            notes.append(
                f"train: warning: {found['sources']} rows have a source of {split}, "
                f"{found['pairs']} of them its target too; first lines {found['train_lines']}"
            )
    return {**counts, "train_repeats": repeated}


def _count(found: dict[str, Any], *, is_pair: bool, line: int) -> None:
    found["sources"] += 1
    found["pairs"] += is_pair
    if len(found["train_lines"]) < FIRST_LINES:
        found["train_lines"].append(line)
