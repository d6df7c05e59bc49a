"""One block of rows -> one Parquet shard. The same function runs in process and in Ray."""

import functools
import itertools
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vinedresser.config.task import Task
from vinedresser.data.corpora.row import FIRST_LINES, Account, Block, Pairs, Source
from vinedresser.data.prepare.clean import Sieve, clean, hashes_file
from vinedresser.data.prepare.hashing import hash_pairs, save_hashes
from vinedresser.data.tokenizers.flat import take_ragged
from vinedresser.data.tokenizers.tokenizer import UNK, SourceEncoder, load_source
from vinedresser.workspace.commit import file_digest

# `lengths.parquet`: how many kept rows of a block have which lengths, in tokens or frames. Sorted
# by split (train, dev, test), block, source, target. All that planning batches needs: the row
# groups of a shard are its block's distinct buckets, ascending.
LENGTHS_FILE = "lengths.parquet"
LENGTHS = pa.schema(
    {
        "split": pa.dictionary(pa.int32(), pa.string()),
        "block": pa.int32(),
        "source": pa.int32(),
        "target": pa.int32(),
        "count": pa.int64(),
    }
)


@dataclass(frozen=True)
class BlockJob:
    """What encoding needs beside the rows; plain values, so that it travels to any worker.

    Attributes:
        task: limits, rules, bucket width.
        folder: where the saved tokenizers are.
        out: where shards go.
        scratch: where blocks leave and find what is not part of the set.
        source_name: the source side's tokenizer in the folder.
        target_name: the target side's; the same for a joint vocabulary.
        is_parallel: see `Corpus`.
    """

    task: Task
    folder: str
    out: str
    scratch: str
    source_name: str
    target_name: str
    is_parallel: bool


@dataclass(frozen=True)
class Encoded:
    """What a block became.

    Attributes:
        split: train, dev or test.
        block: its number.
        shard: name of its file; "" where no row is kept.
        digest: SHA-256 in hex of that file.
        account: `Account.to_json`.
        found: `Found.to_json`.
        unknown: unknown tokens of kept rows, source and target.
        cells: three lists: source length, target length, kept rows of these.
    """

    split: str
    block: int
    shard: str
    digest: str
    account: dict[str, Any]
    found: dict[str, Any]
    unknown: tuple[int, int]
    cells: tuple[list[int], list[int], list[int]]

    def to_text(self) -> str:
        """JSON, for the way between processes."""
        return json.dumps(vars(self))

    @classmethod
    def from_text(cls, text: str) -> "Encoded":
        """What `to_text` wrote."""
        return cls(**json.loads(text))


# Two sides of one job; a worker process serves one job at a time.
@functools.lru_cache(maxsize=2)
def _encoder(folder: str, name: str) -> SourceEncoder:
    return load_source(Path(folder), name)


@dataclass(frozen=True)
class _Side:
    """One side of some rows; `width` values stand for one position: 1 for ids."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]
    width: int

    @classmethod
    def of(cls, items: Sequence[Any], encoder: SourceEncoder) -> "_Side":
        values, lengths = encoder.flat(items)
        if encoder.features:
            return cls(values, lengths, encoder.features)
        # 65,536 ids fit in two bytes; that halves shards and the memory of a loaded split.
        dtype = np.uint16 if encoder.size <= 1 << 16 else np.int32
        return cls(values.astype(dtype), lengths, 1)

    def unknown(self, kept: NDArray[np.int64]) -> int:
        """Unknown ids in some rows."""
        if self.values.dtype == np.float16:
            return 0
        values = self.values if len(kept) == len(self.lengths) else self._taken(kept)
        return int((values == UNK).sum())

    def array(self, rows: NDArray[np.int64]) -> pa.Array:
        """Some rows as lists, in their order."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows] * self.width)])
        # ListArray counts in int32; 20,000 utterances of 1,000 frames of 80 would not fit.
        kind = pa.ListArray if offsets[-1] < 2**31 else pa.LargeListArray
        dtype = np.int32 if kind is pa.ListArray else np.int64
        return kind.from_arrays(pa.array(offsets.astype(dtype)), pa.array(self._taken(rows)))

    def _taken(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        starts = np.cumsum(self.lengths) - self.lengths
        return take_ragged(self.values, starts[rows] * self.width, self.lengths[rows] * self.width)


def shard_name(split: str, number: int) -> str:
    """The file of a block."""
    return f"{split}-{number:05d}.parquet"


def encode_block(block: Block, job: BlockJob) -> Encoded:
    """Reads a block, cleans and tokenises it, sorts it by (bucket, row), writes its shard.

    The shard is written beside its place and renamed, so that a task that Ray runs twice, or that
    dies in the middle, is harmless. Its bytes depend on the rows and the job alone. Ids carry EOS
    on both sides; bucket = (longer side - 1) // bucket_width, one row group each. Too long rows
    are dropped from train only: dev and test scores must be comparable between models.

    Args:
        block: which rows; `row` of the shard is their line less one.
        job: see there.

    Raises:
        DataError: a file is not what it was when it was inspected.
    """
    account = Account()
    pairs, found = clean(block.load(account), block.split, job.task, account)
    sieve = Sieve(Path(job.scratch), job.is_parallel)
    pairs = sieve.sift(pairs, (block.split, block.number), job.task, account, found)
    if block.split == "train" and job.is_parallel and not job.task.cleaning.dedup:
        save_pairs(block.number, pairs, Path(job.scratch))
    source = _Side.of(pairs.source, _encoder(job.folder, job.source_name))
    target = _Side.of(pairs.target, _encoder(job.folder, job.target_name))
    kept = np.flatnonzero(_fits(block.split, (source, target), job.task, pairs, account))
    name = shard_name(block.split, block.number) if len(kept) else ""
    digest = ""
    if name:
        table = _shard_table(block.split, pairs, kept, (source, target), job.task.bucket_width)
        digest = _write(Path(job.out) / name, table)
    return Encoded(
        block.split,
        block.number,
        name,
        digest,
        account.to_json(),
        found.to_json(),
        (source.unknown(kept), target.unknown(kept)),
        _cells(source.lengths[kept], target.lengths[kept]),
    )


def save_pairs(number: int, pairs: Pairs, scratch: Path) -> None:
    """Leaves the hashes of a train block for `hashing.count_repeats`."""
    path = scratch / hashes_file(number)
    # A task that Ray runs twice writes the same bytes; its name ends in .npy for NumPy's sake.
    partial = path.with_name(f"{uuid.uuid4().hex[:8]}.partial.npy")
    save_hashes(partial, hash_pairs(list(map(str, pairs.source)), pairs.target), pairs.lines)
    partial.replace(path)


def _fits(
    split: str, sides: tuple[_Side, _Side], task: Task, pairs: Pairs, account: Account
) -> NDArray[np.bool_]:
    """(n,) which rows are within the limits; all of dev and test."""
    source, target = (side.lengths for side in sides)
    if split != "train":
        return np.ones(len(source), dtype=np.bool_)
    # Signs without width are no white space, and normalisation leaves nothing of them but EOS.
    has_both = np.ones(len(source), dtype=np.bool_)
    for side in sides:
        if side.values.dtype != np.float16:
            has_both &= side.lengths > 1
    _count(has_both, "empty", pairs, account)
    fits = (source <= task.max_source_length) & (target <= task.max_target_length)
    _count(fits | ~has_both, "too_long", pairs, account)
    fits &= has_both
    limit = task.cleaning.max_ratio
    if not limit:
        return fits
    is_even = np.maximum(source, target) <= limit * np.minimum(source, target)
    _count(is_even | ~fits, "ratio", pairs, account)
    return fits & is_even


def _count(is_kept: NDArray[np.bool_], reason: str, pairs: Pairs, account: Account) -> None:
    lines = pairs.lines[~is_kept]
    account.drop_many(reason, len(lines), lines[:FIRST_LINES].tolist())


def _cells(
    source: NDArray[np.int64], target: NDArray[np.int64]
) -> tuple[list[int], list[int], list[int]]:
    keys, counts = np.unique((source << 32) | target, return_counts=True)
    return (keys >> 32).tolist(), (keys & 0xFFFFFFFF).tolist(), counts.tolist()


def _shard_table(
    split: str,
    pairs: Pairs,
    kept: NDArray[np.int64],
    sides: tuple[_Side, _Side],
    bucket_width: int,
) -> pa.Table:
    source, target = sides
    longest = np.maximum(source.lengths[kept], target.lengths[kept])
    buckets = (longest - 1) // bucket_width
    order = np.argsort(buckets, kind="stable")
    rows = kept[order]
    columns = {
        "row": pa.array(pairs.lines[rows] - 1),
        "bucket": pa.array(buckets[order].astype(np.int32)),
        "source": source.array(rows),
        "target": target.array(rows),
    }
    if split != "train":  # metrics compare with the text itself
        texts = {"source_text": pairs.source, "target_text": pairs.target}
        for name, side in texts.items():
            words = [_name(side[i]) for i in rows]
            columns[name] = pa.array(words, pa.string())
    return pa.table(columns)


def _name(item: Source) -> str:
    """Text itself; recordings by their names, which are the same wherever the corpus lies."""
    return item if isinstance(item, str) else " ".join(Path(path).name for path in item)


def _write(path: Path, table: pa.Table) -> str:
    """Writes a shard, a row group a bucket; answers its SHA-256."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with pq.ParquetWriter(
            partial, table.schema, compression="zstd", write_page_checksum=True
        ) as writer:
            cuts = np.flatnonzero(np.diff(table["bucket"].to_numpy())) + 1
            edges = [0, *cuts.tolist(), len(table)]
            for start, end in itertools.pairwise(edges):
                writer.write_table(table.slice(start, end - start))
        digest = file_digest(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def write_lengths(folder: Path, table: pa.Table) -> None:
    """Writes a table of the schema `LENGTHS` beside the shards."""
    pq.write_table(table, folder / LENGTHS_FILE, compression="zstd", write_page_checksum=True)
