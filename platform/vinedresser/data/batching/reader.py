"""From shards to padded tensors: an endless, resumable stream, and a finite, sorted pass."""

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vinedresser.batch import Batch
from vinedresser.config import Batching
from vinedresser.data.batching.plan import Histogram, Ints, Plan, arrange, plan_cells, refuse_longer
from vinedresser.data.batching.pools import (
    Change,
    Chunk,
    MemoryPool,
    Pool,
    ShardPool,
    parquet_errors,
    side_of,
)
from vinedresser.data.batching.prefetch import prefetched
from vinedresser.data.batching.resegment import Resegmenter, resegmenter, seed_of
from vinedresser.data.batching.side import Side, batch_of
from vinedresser.data.shards import ShardSet
from vinedresser.errors import DamagedError, DataError


@dataclass(frozen=True)
class Split:
    """A split in memory, in the corpus's order: about 2 bytes per token, no object per row.

    Attributes:
        name: train, dev or test.
        source: source ids or frames.
        target: target ids.
        sources: source texts of dev and test; empty for train.
        references: target texts of dev and test; empty for train.
    """

    name: str
    source: Side
    target: Side
    sources: list[str]
    references: list[str]

    def __len__(self) -> int:
        return len(self.source.offsets) - 1

    @property
    def source_lengths(self) -> Ints:
        """(n,) source tokens of each row, EOS included, or frames."""
        return self.source.lengths

    @property
    def target_lengths(self) -> Ints:
        """(n,) target tokens of each row, EOS included."""
        return self.target.lengths

    def batch(self, rows: Ints) -> Batch:
        """Return the given rows, in their order, as padded tensors on the CPU."""
        return batch_of(self.source.take(rows), self.target.take(rows), rows)


def load_split(shards: ShardSet, name: str) -> Split:
    """Read a split whole; page checksums are verified.

    Raises:
        DataError: the set has no such split.
        DamagedError: a shard cannot be read; names it.
    """
    if name not in shards.counts:
        raise DataError(f"{shards.folder} has no {name} split; it has {', '.join(shards.counts)}")
    tables = []
    for file in shards.meta["shards"][name]:
        with parquet_errors(shards.folder / file):
            path = shards.folder / file
            tables.append(pq.read_table(path, page_checksum_verification=True))
    table = pa.concat_tables(tables)
    order = np.argsort(table["row"].to_numpy())
    if len(order) != shards.counts[name]:
        raise DamagedError(
            f"{shards.folder}: {len(order)} {name} rows, but {shards.counts[name]} in the "
            "manifest; re-run `prepare`"
        )
    texts = {"source_text": list[str](), "target_text": list[str]()}
    for column in texts:
        if column in table.column_names:
            texts[column] = table[column].take(pa.array(order)).to_pylist()
    source = side_of(table["source"], shards.features).take(order)
    return Split(name, source, side_of(table["target"]).take(order), *texts.values())


class Batches:
    """An endless sequence of training batches: a pure function of (seed, index).

    Index i is batch i // lanes of lane i % lanes. A lane is an endless sequence over some of the
    chunks, and goes through epochs of its own: each holds each row of the lane's subset once. With
    one lane, the default, batch i is batch i % per_epoch of epoch i // per_epoch. Chunks come in a
    new order each epoch, the batches of a chunk too, and rows of equal lengths change places
    between them, so that epochs differ in composition at the same padding and the same number of
    batches.

    A worker whose number of workers divides the lanes reads its own lanes' chunks only: 1/N of the
    data, where one lane has each of N workers read nearly all of it.

    Attributes:
        per_epoch: batches of an epoch, over all lanes.
    """

    def __init__(self, data: Split | ShardSet, batching: Batching, *, seed: int) -> None:
        """Plan the epoch from the lengths alone; no row is read.

        Args:
            data: a split in memory, or the train split of a shard set, read as it is needed.
            batching: budget, order and subset.
            seed: the same seed, the same batches; >= 0.

        Raises:
            DataError: a single row is longer than the budget, or there is none, or there are fewer
                chunks than lanes.
            DamagedError: the shards' histogram cannot be read.
        """
        self._pool: Pool = (
            MemoryPool(data.name, data.source, data.target)
            if isinstance(data, Split)
            else ShardPool(data, "train", lanes=batching.lanes)
        )
        self._batching, self._seed = batching, seed
        # A split in memory has no tokenizers, and is not segmented again.
        self._resegment: Resegmenter | None = None
        if isinstance(data, ShardSet) and batching.subword_alpha:
            dev = load_split(data, "dev")
            self._resegment = resegmenter(data, batching, (dev.source, dev.target))
        room = self._resegment.room if self._resegment else 1.0
        self._tokens = int(batching.max_padded_tokens / room)
        sizes = np.array([len(self._plan(w)[1]) for w in range(len(self._pool))], np.int64)
        self.per_epoch = int(sizes.sum())
        if not self.per_epoch:
            part = f" in a subset of {batching.subset:g}" if batching.subset < 1 else ""
            fix = ". Fix: raise batch.subset" if part else ""
            raise DataError(f"{self._pool.name}: 0 rows{part}; nothing to train on{fix}")
        self._lanes = [_Lane(chunks, sizes[chunks]) for chunks in dealt(sizes, batching.lanes)]
        if not all(len(lane) for lane in self._lanes):
            raise DataError(
                f"{self._pool.name}: {len(sizes)} chunks of a block of rows or more, too few for "
                f"{batching.lanes} lanes. Fix: lower batch.lanes"
            )

    def _plan(self, chunk: int) -> tuple[Histogram, Plan]:
        """Return the cells of a chunk's subset, and how they are cut."""
        batching = self._batching
        cells = self._pool.histogram(chunk).subset(batching.subset, chunk=chunk)
        refuse_longer(cells, tokens=batching.max_padded_tokens, name=self._pool.name)
        plan = plan_cells(cells, tokens=self._tokens, order=batching.order, salt=chunk)
        return cells, plan

    def _at(self, index: int) -> tuple["_Shuffled", int]:
        """Return the shuffled chunk of a batch, and its place there."""
        index, number = divmod(index, len(self._lanes))
        lane = self._lanes[number]
        epoch, at = divmod(index, len(lane))
        if epoch != lane.epoch:
            lane.order = _random(self._seed, epoch, 0, number).permutation(len(lane.sizes))
            lane.ends = np.cumsum(lane.sizes[lane.order])
            lane.epoch = epoch
        slot = int(np.searchsorted(lane.ends, at, side="right"))
        place = int(lane.order[slot])
        chunk, shuffled = int(lane.chunks[place]), lane.shuffled
        if shuffled is None or (shuffled.epoch, shuffled.number) != (epoch, chunk):
            # Buckets already read are kept for the next epoch if it starts with the same chunk.
            is_same = shuffled is not None and shuffled.number == chunk
            opened = shuffled.chunk if shuffled and is_same else self._pool.open(chunk)
            shuffled = _Shuffled(opened, *self._plan(chunk), self._seed, epoch, chunk)
            lane.shuffled = shuffled
        return shuffled, at - int(lane.ends[slot] - lane.sizes[place])

    def rows(self, index: int) -> Ints:
        """Return row numbers of a batch. A new epoch or chunk costs its plan, not its rows."""
        shuffled, at = self._at(index)
        return shuffled.chunk.rows(*shuffled.picks(at))

    def __getitem__(self, index: int) -> Batch:
        shuffled, at = self._at(index)
        change: Change | None = None
        if self._resegment is not None:
            change = partial(self._resegment, seed=seed_of(self._seed, index))
        return shuffled.chunk.batch(*shuffled.picks(at), change)

    def steps(self, *, rank: int = 0, of: int = 1, at: int = 0) -> Generator[Batch, None, None]:
        """Return batches without end; the caller counts steps.

        Step s (0-based) of rank r is the batch of global index s * of + r. So ranks never
        overlap, lose nothing, have equally many steps, and a stream resumes at any step in
        constant time. Where an epoch's batches are no multiple of the ranks, the step in which it
        ends is filled up from the next epoch.

        Args:
            rank: which worker, 0 <= rank < of.
            of: how many workers.
            at: steps already taken.
        """
        if not 0 <= rank < of or at < 0:
            raise ValueError(f"rank {rank} of {of} at {at}: expected 0 <= rank < of and at >= 0")
        return (self[index] for index in itertools.count(at * of + rank, of))


def dealt(sizes: Ints, lanes: int) -> list[Ints]:
    """Deal chunks out to lanes, the largest first to the lane with the fewest batches.

    Args:
        sizes: (chunks,) batches of each.
        lanes: how many.

    Returns:
        The chunks of each lane, ascending.
    """
    held, batches = [list[int]() for _ in range(lanes)], np.zeros(lanes, dtype=np.int64)
    for chunk in np.argsort(-sizes, kind="stable").tolist():
        least = int(batches.argmin())
        held[least].append(chunk)
        batches[least] += sizes[chunk]
    return [np.array(sorted(chunks), dtype=np.int64) for chunks in held]


class _Lane:
    """Some chunks in the order of the present epoch, and the one that is being read."""

    def __init__(self, chunks: Ints, sizes: Ints) -> None:
        self.chunks, self.sizes, self.epoch = chunks, sizes, -1
        self.order = self.ends = sizes
        self.shuffled: _Shuffled | None = None

    def __len__(self) -> int:
        return int(self.sizes.sum())


def _random(*key: int) -> np.random.Generator:
    """Return the random generator of a key; keys of one length never share one."""
    return np.random.default_rng((*key, *(0,) * (4 - len(key)), 1))


class _Shuffled:
    """A chunk in one epoch: the order of its batches, and its rows within their cells."""

    def __init__(
        self, chunk: Chunk, cells: Histogram, plan: Plan, seed: int, epoch: int, number: int
    ) -> None:
        self.chunk, self.epoch, self.number = chunk, epoch, number
        self._cells, self._plan, self._key = cells, plan, (seed, epoch, number + 1)
        self._starts = cells.starts
        self._turns = _random(*self._key).permutation(len(plan))
        self._places: dict[int, Ints] = {}

    def picks(self, at: int) -> tuple[Ints, Ints]:
        """Return cell and rank inside it of each row of the at-th batch of the epoch, both (B,)."""
        cells_B, ranks_B = self._plan.batch(int(self._turns[at]))
        edges = self.chunk.edges
        of_B = np.searchsorted(edges, cells_B, side="right") - 1
        for bucket in np.unique(of_B).tolist():
            first = edges[bucket]
            chosen = of_B == bucket
            start_B = self._starts[cells_B[chosen]] - self._starts[first]
            if bucket not in self._places:  # cells shuffled: 0.2 s per million rows
                counts = self._cells.counts[first : edges[bucket + 1]]
                cell = np.repeat(np.arange(len(counts)), counts)
                draws = _random(*self._key, bucket + 1).random(len(cell))
                self._places[bucket] = np.lexsort((draws, cell))
            ranks_B[chosen] = self._places[bucket][start_B + ranks_B[chosen]] - start_B
        return cells_B, ranks_B


def stream(
    data: Split | ShardSet,
    batching: Batching,
    *,
    seed: int,
    rank: int = 0,
    of: int = 1,
    at: int = 0,
) -> Generator[Batch, None, None]:
    """Return training batches without end, see `Batches.steps`; those of shards are read ahead.

    Args:
        data: what to train on.
        batching: budget, order and subset.
        seed: the same seed, the same batches; >= 0.
        rank: which worker, 0 <= rank < of.
        of: how many workers.
        at: steps already taken.

    Raises:
        DataError: a single row is longer than the budget, or there is none.
    """
    batches = Batches(data, batching, seed=seed)
    steps = batches.steps(rank=rank, of=of, at=at)
    return steps if isinstance(data, Split) else prefetched(steps)


def in_order(split: Split, *, tokens: int, sentences: int = 0) -> Iterator[Batch]:
    """Yield each row once, sorted by length, for evaluation; `rows_B` is its place in the split.

    Args:
        split: what to evaluate on.
        tokens: sentences x longest side of a batch; a longer row comes alone.
        sentences: 0 for all rows, else this many, evenly spread over the split and the same for
            every seed.
    """
    total = len(split)
    count = min(sentences, total) if sentences else total
    chosen = np.arange(count, dtype=np.int64) * total // max(1, count)
    lengths = (split.source_lengths[chosen], split.target_lengths[chosen])
    for rows in arrange(*lengths, tokens=tokens):
        yield split.batch(chosen[rows])
