"""One block of rows -> one Parquet shard. The same function runs in process and in Ray."""

import functools
import itertools
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vinedresser.data.row import FIRST_LINES, Row
from vinedresser.data.tokenizers import EOS, UNK, TextTokenizer, load_tokenizer

# Rows of a block: about 3 MB of text, so that memory stays at 160-170 MB for any corpus size,
# and Ray has 50 tasks a million rows (performance.md 5).
BLOCK_ROWS = 20_000

# What `encode_block` answers, one row a block; Ray carries it as an Arrow table.
RESULT = pa.schema(
    {
        "split": pa.string(),
        "block": pa.int32(),
        "shard": pa.string(),
        "source_lengths": pa.list_(pa.int32()),
        "target_lengths": pa.list_(pa.int32()),
        "unknown_source": pa.int64(),
        "unknown_target": pa.int64(),
        "too_long": pa.int64(),
        "too_long_lines": pa.list_(pa.int64()),
    }
)

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


def write_lengths(folder: Path, table: pa.Table) -> None:
    """Writes a table of the schema `LENGTHS` beside the shards."""
    pq.write_table(table, folder / LENGTHS_FILE, compression="zstd", write_page_checksum=True)


@dataclass(frozen=True)
class BlockJob:
    """What encoding needs beside the rows; plain values, so that it travels to any worker.

    Attributes:
        folder: where the saved tokenizers are, and where shards go.
        source_name: the source side's tokenizer in that folder.
        target_name: the target side's; the same for a joint vocabulary.
        max_source: tokens, EOS included; longer train rows are dropped.
        max_target: the same for targets.
        bucket_width: lengths of the longer side in one bucket.
    """

    folder: str
    source_name: str
    target_name: str
    max_source: int
    max_target: int
    bucket_width: int


def block_table(split: str, block: int, rows: list[Row]) -> pa.Table:
    """A block as Arrow. Row numbers count the cleaned rows of the split from 0."""
    start = block * BLOCK_ROWS
    return pa.table(
        {
            "split": pa.array([split] * len(rows), pa.string()),
            "block": pa.array([block] * len(rows), pa.int32()),
            "row": pa.array(range(start, start + len(rows)), pa.int64()),
            "line": pa.array([row.line for row in rows], pa.int64()),
            "source": pa.array([row.source for row in rows], pa.string()),
            "target": pa.array([row.target for row in rows], pa.string()),
        }
    )


# Two sides of one job; a worker process serves one job at a time.
@functools.lru_cache(maxsize=2)
def _tokenizer(folder: str, name: str) -> TextTokenizer:
    return load_tokenizer(Path(folder), name)


@dataclass(frozen=True)
class _Side:
    """Ids of one side, EOS appended: flat, and the length of each row."""

    values: NDArray[Any]
    lengths: NDArray[np.int32]
    dtype: Any

    @property
    def ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths, dtype=np.int64)


def _encode(texts: list[str], tokenizer: TextTokenizer) -> _Side:
    # 65,536 ids fit in two bytes; that halves shards and the memory of a loaded split.
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.int32
    ids = tokenizer.encode_many(texts)
    for row in ids:
        row.append(EOS)
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    flat = itertools.chain.from_iterable(ids)
    return _Side(np.fromiter(flat, dtype, int(lengths.sum())), lengths, dtype)


def take_ragged(
    values: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[Any]:
    """The slices values[start : start + length] one after the other, without a Python loop."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return values[shift + np.arange(len(shift))]


def _list_array(side: _Side, rows: NDArray[np.int64]) -> pa.Array:
    lengths = side.lengths[rows].astype(np.int64)
    flat = take_ragged(side.values, side.ends[rows] - lengths, lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def encode_block(table: pa.Table, job: BlockJob) -> pa.Table:
    """Tokenises a block, sorts it by (bucket, row), writes its shard, answers what it counted.

    The shard is written beside its place and renamed, so that a task that Ray runs twice, or that
    dies in the middle, is harmless. Its bytes depend on the rows and the job alone. Ids carry EOS
    on both sides; bucket = (longer side - 1) // bucket_width, one row group each. Too long rows
    are dropped from train only: dev and test scores must be comparable between models.

    Args:
        table: of `block_table`, one split and block.
        job: see there.

    Returns:
        One row of the schema `RESULT`; lengths are of the kept rows, in row order.
    """
    split, block = table["split"][0].as_py(), table["block"][0].as_py()
    source = _encode(table["source"].to_pylist(), _tokenizer(job.folder, job.source_name))
    target = _encode(table["target"].to_pylist(), _tokenizer(job.folder, job.target_name))
    fits = (source.lengths <= job.max_source) & (target.lengths <= job.max_target)
    is_kept = fits if split == "train" else np.ones_like(fits)
    kept = np.flatnonzero(is_kept)
    shard = f"{split}-{block:05d}.parquet"
    if len(kept):
        _write(Path(job.folder) / shard, _shard_table(table, kept, (source, target), job))
    long_lines = table["line"].to_numpy()[~is_kept]
    result = {
        "split": [split],
        "block": [block],
        "shard": [shard if len(kept) else None],
        "source_lengths": [source.lengths[kept]],
        "target_lengths": [target.lengths[kept]],
        "unknown_source": [int((source.values == UNK).sum())],
        "unknown_target": [int((target.values == UNK).sum())],
        "too_long": [len(long_lines)],
        "too_long_lines": [long_lines[:FIRST_LINES]],
    }
    return pa.table(result, schema=RESULT)


def _shard_table(
    table: pa.Table, kept: NDArray[np.int64], sides: tuple[_Side, _Side], job: BlockJob
) -> pa.Table:
    source, target = sides
    longest = np.maximum(source.lengths[kept], target.lengths[kept])
    buckets = (longest - 1) // job.bucket_width
    order = np.argsort(buckets, kind="stable")
    rows = kept[order]
    columns = {
        "row": pa.array(table["row"].to_numpy()[rows]),
        "bucket": pa.array(buckets[order].astype(np.int32)),
        "source": _list_array(source, rows),
        "target": _list_array(target, rows),
    }
    if table["split"][0].as_py() != "train":  # metrics compare with the text itself
        text = table.take(pa.array(rows)).combine_chunks()
        columns |= {"source_text": text["source"], "target_text": text["target"]}
    return pa.table(columns)


def _write(path: Path, table: pa.Table) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with pq.ParquetWriter(
            partial, table.schema, compression="zstd", write_page_checksum=True
        ) as writer:
            cuts = np.flatnonzero(np.diff(table["bucket"].to_numpy())) + 1
            edges = [0, *cuts.tolist(), len(table)]
            for start, end in itertools.pairwise(edges):
                writer.write_table(table.slice(start, end - start))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
