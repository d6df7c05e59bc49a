"""Encoding: a cleaned block -> one Parquet shard. Runs in this process and as a Ray task."""

import functools
import itertools
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vinedresser.data.batching.side import Side
from vinedresser.data.corpora.row import FIRST_LINES, Block, Pairs, RowCounts
from vinedresser.data.prepare.clean import PrepareJob, read_cleaned
from vinedresser.data.tokenizers.tokenizer import load_source
from vinedresser.special_ids import UNK

# `lengths.parquet`: kept rows of a block per pair of lengths, in tokens or frames. Sorted by split
# (train, dev, test), block, source, target. Planning batches needs nothing else: the row groups of
# a shard are its block's distinct buckets, ascending.
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
class EncodedBlock:
    """Counts and measures of a block whose shard is written.

    Attributes:
        split: train, dev or test.
        number: of the block in its split.
        shard: name of the file; "" where no row is kept.
        counts: rows that were dropped because of their tokens, or as repeats.
        unknown: unknown tokens of kept rows, source and target.
        cells: three int32 arrays: source length, target length, kept rows of these lengths.
    """

    split: str
    number: int
    shard: str
    counts: RowCounts
    unknown: tuple[int, int]
    cells: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


# Both sides of one job; a worker process serves one job at a time.
_encoder = functools.lru_cache(maxsize=2)(load_source)


def _array(side: Side) -> pa.Array:
    """Return the rows of a side as lists."""
    offsets = side.offsets * (side.features or 1)
    # ListArray counts in int32; 20,000 utterances of 1,000 frames of 80 would not fit.
    kind = pa.ListArray if offsets[-1] < 2**31 else pa.LargeListArray
    dtype = np.int32 if kind is pa.ListArray else np.int64
    return kind.from_arrays(pa.array(offsets.astype(dtype)), pa.array(side.values))


def shard_name(split: str, number: int) -> str:
    """Return the file name of a block's shard."""
    return f"{split}-{number:05d}.parquet"


def encode_block(block: Block, job: PrepareJob) -> EncodedBlock:
    """Tokenize the rows of a cleaned block, sort them by (bucket, row) and write the shard.

    The shard is written under another name and renamed, so that a task that Ray runs twice, or that
    dies in the middle, is harmless. Its bytes depend on the rows and the job alone. Ids carry EOS
    on both sides; bucket = (longer side - 1) // bucket_width, one row group each. Rows are dropped
    from train only: dev and test scores must be comparable between models. `row` of the shard is
    the row's line less one.

    Raises:
        DataError: a tokenizer, or a recording, cannot be read.
    """
    counts, split, task = RowCounts(), block.split, job.task
    pairs = read_cleaned(block, job, counts)
    source, target = (
        Side.of(texts, _encoder(Path(job.folder), name))
        for texts, name in zip((pairs.source, pairs.target), job.names, strict=True)
    )
    is_kept = np.ones(len(pairs), dtype=np.bool_)
    if split == "train":
        longest = np.maximum(source.lengths, target.lengths)
        shortest = np.minimum(source.lengths, target.lengths)
        # A character without width is no white space, and normalisation leaves EOS alone of it.
        has_both = is_kept.copy()
        for side in (source, target):
            if not side.features:
                has_both &= side.lengths > 1
        fits = (source.lengths <= task.max_source_length) & (
            target.lengths <= task.max_target_length
        )
        limit = task.cleaning.max_ratio or np.inf
        for reason, passes in (
            ("empty", has_both),
            ("too_long", fits),
            ("ratio", longest <= limit * shortest),
        ):
            lines = pairs.lines[is_kept & ~passes]
            counts.drop(reason, len(lines), lines[:FIRST_LINES].tolist())
            is_kept &= passes
    kept = np.flatnonzero(is_kept)
    name = shard_name(split, block.number) if len(kept) else ""
    if name:
        # Metrics compare with the text itself.
        with_texts, path = split != "train", Path(job.out) / name
        _write_shard(path, pairs, kept, (source, target), job, with_texts=with_texts)
    sides = (source, target)
    if len(kept) < len(pairs):
        sides = (source.take(kept), target.take(kept))
    unknown = [0 if side.features else int((side.values == UNK).sum()) for side in sides]
    keys = (sides[0].lengths << 32) | sides[1].lengths
    keys, rows = np.unique(keys, return_counts=True)
    cells = (keys >> 32, keys & 0xFFFFFFFF, rows)
    return EncodedBlock(
        split,
        block.number,
        name,
        counts,
        (unknown[0], unknown[1]),
        (cells[0].astype(np.int32), cells[1].astype(np.int32), cells[2].astype(np.int32)),
    )


def _write_shard(
    path: Path,
    pairs: Pairs,
    kept: NDArray[np.int64],
    sides: tuple[Side, Side],
    job: PrepareJob,
    *,
    with_texts: bool,
) -> None:
    """Write some rows as a shard, one row group per bucket."""
    source, target = sides
    longest = np.maximum(source.lengths[kept], target.lengths[kept])
    buckets = (longest - 1) // job.task.bucket_width
    order = np.argsort(buckets, kind="stable")
    rows, buckets = kept[order], buckets[order].astype(np.int32)
    columns = {
        "row": pa.array(pairs.lines[rows] - 1),
        "bucket": pa.array(buckets),
        "source": _array(source.take(rows)),
        "target": _array(target.take(rows)),
    }
    texts = {"source_text": pairs.source, "target_text": pairs.target} if with_texts else {}
    for name, side in texts.items():
        # Recordings by their file names, which do not depend on the folder of the corpus.
        words = [
            item if isinstance(item, str) else " ".join(Path(each).name for each in item)
            for item in (side[i] for i in rows)
        ]
        columns[name] = pa.array(words, pa.string())
    table = pa.table(columns)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with pq.ParquetWriter(
            partial, table.schema, compression="zstd", write_page_checksum=True
        ) as writer:
            cuts = np.flatnonzero(np.diff(buckets)) + 1
            for start, end in itertools.pairwise([0, *cuts.tolist(), len(table)]):
                writer.write_table(table.slice(start, end - start))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
