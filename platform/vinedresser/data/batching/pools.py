"""Pools: a split as chunks of up to a million rows that are shuffled together.

Batches never span chunks. The lengths in a chunk are in `lengths.parquet`; its rows are read when
a batch needs them, and only those of the buckets (row groups) it needs.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vinedresser.batch import Batch
from vinedresser.data.batching.plan import (
    Cells,
    Histogram,
    Ints,
    bucket_of,
    firsts_of,
    group,
    mixed,
)
from vinedresser.data.batching.side import Side, batch_of, join
from vinedresser.data.prepare.encode import LENGTHS_FILE
from vinedresser.data.shards import ShardSet
from vinedresser.errors import DamagedError, DataError

# Rows of a chunk, at most about: 60 MB of ids in memory at 15 tokens per side, and 50 shards.
CHUNK_ROWS = 1_000_000
# Bytes of the frames of a chunk, at most about: 60,000 utterances of 2.2 s in 40 bands, 5,600 of
# 12 s in 80 bands. Two chunks may be in memory at a time.
CHUNK_BYTES = 1 << 30

# Chunks of lanes in the place of one: as many are open at a time as a worker has lanes. Of a
# synthetic corpus of 5 to 60 tokens, 99.8 % of the tokens at a budget of 4096 are real in a chunk
# of 1,000,000 rows, 99.4 % in one of 250,000, 98.8 % of 100,000 and 95.9 % of 20,000.
LANE_CHUNKS = 4

# Makes the sequences of a batch anew; as many of them, and within the batch's budget.
Change = Callable[[Side, Side], tuple[Side, Side]]


@dataclass(frozen=True)
class Bucket:
    """The rows of a bucket in memory.

    `rows` (n,) are the numbers of the rows in their split, `members` (n,) their positions here,
    cell after cell; inside a cell by a fixed hash of the row, so that the first k are the same k
    whatever the subset.
    """

    source: Side
    target: Side
    rows: Ints
    members: Ints

    @classmethod
    def of(cls, source: Side, target: Side, rows: Ints) -> tuple["Bucket", Histogram]:
        """Return a bucket and its cells, ascending by (source, target)."""
        shuffled = np.argsort(mixed(rows.astype(np.uint64), salt=0), kind="stable")
        cells: Cells = group(source.lengths[shuffled], target.lengths[shuffled])
        return cls(source, target, rows, shuffled[cells.members]), cells.histogram


@dataclass(frozen=True)
class Chunk:
    """Rows that batches are made of.

    Attributes:
        histogram: its cells, ascending by (bucket, source, target).
        edges: (buckets + 1,) the first cell of each bucket.
        load: reads a bucket, 0 <= bucket < buckets.
    """

    histogram: Histogram
    edges: Ints
    load: Callable[[int], Bucket]
    _loaded: dict[int, Bucket] = field(default_factory=dict)

    def rows(self, cells_B: Ints, ranks_B: Ints) -> Ints:
        """Return (B,) numbers in the split of the ranks-th rows of some cells."""
        return self._take(cells_B, ranks_B)[2]

    def batch(self, cells_B: Ints, ranks_B: Ints, change: Change | None = None) -> Batch:
        """Return the ranks-th rows of some cells, bucket after bucket."""
        source, target, rows = self._take(cells_B, ranks_B)
        if change is not None:
            source, target = change(source, target)
        return batch_of(source, target, rows)

    def _take(self, cells_B: Ints, ranks_B: Ints) -> tuple[Side, Side, Ints]:
        starts = self.histogram.starts
        of_B = np.searchsorted(self.edges, cells_B, side="right") - 1
        at_B = starts[cells_B] - starts[self.edges[of_B]] + ranks_B
        sources, targets, rows = list[Side](), list[Side](), list[Ints]()
        for index in np.unique(of_B).tolist():
            if index not in self._loaded:
                self._loaded[index] = self.load(index)
            bucket = self._loaded[index]
            chosen = bucket.members[at_B[of_B == index]]
            sources.append(bucket.source.take(chosen))
            targets.append(bucket.target.take(chosen))
            rows.append(bucket.rows[chosen])
        return join(sources), join(targets), np.concatenate(rows)


class MemoryPool:
    """Sequences in memory as one chunk of one bucket."""

    def __init__(self, name: str, source: Side, target: Side) -> None:
        self.name = name
        rows = np.arange(len(source.lengths), dtype=np.int64)
        bucket, self._histogram = Bucket.of(source, target, rows)
        self._window = Chunk(
            self._histogram, np.array([0, len(self._histogram.counts)]), lambda _: bucket
        )

    def __len__(self) -> int:
        return 1

    def histogram(self, chunk: int) -> Histogram:
        """Return the cells of the one chunk."""
        return self.open(chunk).histogram

    def open(self, chunk: int) -> Chunk:
        """Return the one chunk."""
        assert chunk == 0
        return self._window


@dataclass(frozen=True)
class _Layout:
    """Places of the rows of a chunk.

    `histogram` holds the chunk's cells, ascending by (bucket, source, target). Of each of the
    chunk's g row groups: its block, its bucket, its place in its shard (`group`) and its rows, (g,)
    each.
    """

    histogram: Histogram
    block: Ints
    bucket: Ints
    group: Ints
    rows: Ints


class ShardPool:
    """A split of a shard set as chunks of consecutive blocks.

    Holds the cells of `lengths.parquet`, 24 bytes per cell of a chunk, and no row.
    """

    def __init__(self, shards: ShardSet, split: str, *, lanes: int = 1) -> None:
        """Read the histogram.

        Args:
            shards: the set.
            split: which part of it.
            lanes: parts that are read side by side; see `chunks_of`.

        Raises:
            DataError: the set has no such split.
            DamagedError: the histogram cannot be read or contradicts the manifest.
        """
        if split not in shards.counts:
            have = ", ".join(shards.counts)
            raise DataError(f"{shards.folder} has no {split} split; it has {have}")
        self.name = split
        self._folder, self._features = shards.folder, shards.features
        self._width = shards.task.bucket_width
        self._layouts = list(_layouts(shards, split, lanes))

    def __len__(self) -> int:
        return len(self._layouts)

    def histogram(self, chunk: int) -> Histogram:
        """Return the cells of a chunk."""
        return self._layouts[chunk].histogram

    def open(self, chunk: int) -> Chunk:
        """Return a chunk of which nothing is read yet."""
        layout = self._layouts[chunk]
        cells = layout.histogram
        buckets = bucket_of(cells.source, cells.target, width=self._width)
        found, firsts = np.unique(buckets, return_index=True)
        edges = np.append(firsts, len(buckets))
        footers: dict[int, Any] = {}

        def load(index: int) -> Bucket:
            """Read a bucket from the row groups of all its shards; no file stays open."""
            bucket, (lo, hi) = int(found[index]), edges[index : index + 2]
            sources, targets, rows = list[Side](), list[Side](), list[Ints]()
            for at in np.flatnonzero(layout.bucket == bucket):
                block = int(layout.block[at])
                path = self._folder / f"{self.name}-{block:05d}.parquet"
                with parquet_errors(path):
                    table = _row_group(path, int(layout.group[at]), footers, block)
                    rows.append(table["row"].to_numpy())
                    sources.append(side_of(table["source"], self._features))
                    targets.append(side_of(table["target"]))
                if len(table) != layout.rows[at]:
                    raise DamagedError(
                        f"{path}: {len(table)} rows of bucket {bucket}, but {layout.rows[at]} in "
                        f"{LENGTHS_FILE}; re-run `prepare`"
                    )
            made, read = Bucket.of(join(sources), join(targets), np.concatenate(rows))
            planned = (cells.source[lo:hi], cells.target[lo:hi], cells.counts[lo:hi])
            if not all(map(np.array_equal, planned, (read.source, read.target, read.counts))):
                raise DamagedError(
                    f"{self._folder}: the shards' lengths are not those of {LENGTHS_FILE}; "
                    "re-run `prepare`"
                )
            return made

        return Chunk(cells, edges, load)


Pool = MemoryPool | ShardPool


def _layouts(shards: ShardSet, split: str, lanes: int) -> Iterator[_Layout]:
    """Yield the chunks of a split, in block order; holds the histogram of one at a time."""
    path, width = shards.folder / LENGTHS_FILE, shards.task.bucket_width
    rows_of_block = np.zeros(0, dtype=np.int64)
    for block, count in _entries(path, split, ["block", "count"]):
        found = np.bincount(block, weights=count).astype(np.int64)
        size = max(len(found), len(rows_of_block))
        rows_of_block = np.pad(found, (0, size - len(found))) + np.pad(
            rows_of_block, (0, size - len(rows_of_block))
        )
    total = int(rows_of_block.sum())
    if total != shards.counts[split]:
        raise DamagedError(
            f"{path}: {total} {split} rows, but {shards.counts[split]} in the manifest; "
            "re-run `prepare`"
        )
    at_most = CHUNK_ROWS
    if shards.features:
        frames = shards.meta["lengths"][split]["source"]["mean"]
        at_most = min(at_most, int(CHUNK_BYTES / (frames * shards.features * 2)))
    chunks = chunks_of(rows_of_block, at_most, lanes)
    held, at = list[list[Ints]](), 0
    for columns in _entries(path, split, ["block", "source", "target", "count"]):
        chunk = chunks[columns[0]]
        for index in np.unique(chunk).tolist():
            if index != at and held:
                yield _layout(held, width)
                held = []
            at = index
            held.append([column[chunk == index] for column in columns])
    if held:
        yield _layout(held, width)


def chunks_of(rows_of_block: Ints, at_most: int, lanes: int = 1) -> Ints:
    """Return (blocks,) the chunk of each block: equal parts of about `at_most` rows or fewer.

    Equal, because a short last chunk would pad more and be shuffled less than the others. With
    lanes the parts are a quarter of that, or less where there is too little data for it, and their
    number is a multiple of the lanes; never less than a block.
    """
    total = int(rows_of_block.sum())
    chunks = max(1, -(-total // max(1, at_most)))
    if lanes > 1:
        blocks = int((rows_of_block > 0).sum())
        chunks = max(1, min(-(-chunks * LANE_CHUNKS // lanes), blocks // lanes) * lanes)
    middles = 2 * np.cumsum(rows_of_block) - rows_of_block
    found: Ints = np.minimum(middles * chunks // max(1, 2 * total), chunks - 1)
    return found


def _entries(path: Path, split: str, columns: list[str]) -> Iterator[list[Ints]]:
    """Yield the given columns of a split's cells, a piece of the file at a time."""
    with parquet_errors(path), path.open("rb") as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        for batch in file.iter_batches(columns=["split", *columns], use_threads=False):
            chosen = batch.filter(pc.equal(batch["split"], split))
            if len(chosen):
                yield [chosen[name].to_numpy().astype(np.int64) for name in columns]


def _layout(held: list[list[Ints]], width: int) -> _Layout:
    block, source, target, count = (np.concatenate(parts) for parts in zip(*held, strict=True))
    bucket = bucket_of(source, target, width=width)
    by_cell = np.lexsort((target, source, bucket))
    cells = firsts_of(source[by_cell], target[by_cell])
    chosen = by_cell[cells]
    counts = np.add.reduceat(count[by_cell], cells)
    histogram = Histogram(source[chosen], target[chosen], counts)
    by_group = np.lexsort((bucket, block))
    groups = firsts_of(block[by_group], bucket[by_group])
    block, bucket = block[by_group][groups], bucket[by_group][groups]
    place = np.arange(len(block)) - np.searchsorted(block, block)
    rows = np.add.reduceat(count[by_group], groups)
    return _Layout(histogram, block, bucket, place, rows)


def _row_group(path: Path, index: int, footers: dict[int, Any], block: int) -> pa.Table:
    """Read one row group and verify its checksums; a footer is parsed once per chunk."""
    columns = ["row", "source", "target"]
    with path.open("rb") as stream:
        file = pq.ParquetFile(stream, metadata=footers.get(block), page_checksum_verification=True)
        footers[block] = file.metadata
        return file.read_row_group(index, columns=columns, use_threads=False)


@contextlib.contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn every error of reading a Parquet file into one line that names it.

    Raises:
        DamagedError: the file is absent, truncated, changed, or without a row group or column.
    """
    try:
        yield
    # A changed footer may name other columns, in no known encoding, or of another type.
    except (
        OSError,
        pa.ArrowException,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: unreadable ({reason}); re-run `prepare`") from None


def side_of(column: pa.ChunkedArray, features: int = 0) -> Side:
    """Return a list column as a side, without a copy where it is one chunk of whole arrays."""
    sides = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy().astype(np.int64)
        values = chunk.values.to_numpy()[offsets[0] : offsets[-1]]
        sides.append(Side(values, (offsets - offsets[0]) // (features or 1), features))
    return join(sides)
