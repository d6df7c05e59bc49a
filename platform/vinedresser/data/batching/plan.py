"""Plans of batches: little padding, a budget never exceeded. NumPy only.

Planning uses the two lengths of rows alone: a `Histogram` counts the rows per pair of lengths, a
`Plan` cuts it into batches. So 10^8 rows are planned from a few hundred thousand numbers, and
the place of a row is computed when its batch is read.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vinedresser.config import BatchOrder
from vinedresser.errors import DataError

Ints = NDArray[np.int64]

# alternating_max: by max(source, target), then by source - target in alternating direction.
# bucket_by_source: source lengths 1-5, 6-10, ...; in each by target, then by source (methods.md
# 23), no batch across two of them. random: no order at all; for comparison, it pads half away.

# Source lengths of a bucket in `bucket_by_source`.
SOURCE_BUCKET = 5


@dataclass(frozen=True)
class PaddingEfficiency:
    """Share of real tokens in padded tensors, each in (0, 1].

    `both` is that of the two sides together.
    """

    source: float
    target: float
    both: float
    batches: int


@dataclass(frozen=True)
class Histogram:
    """Rows per pair of lengths. A cell is a pair of lengths; cells are distinct.

    Attributes:
        source: (C,) source tokens of the cell's rows, >= 1.
        target: (C,) target tokens, >= 1.
        counts: (C,) rows, >= 0.
    """

    source: Ints
    target: Ints
    counts: Ints

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.counts.sum())

    @property
    def longest(self) -> Ints:
        """(C,) the longer side of each cell, in tokens."""
        return np.maximum(self.source, self.target)

    @property
    def starts(self) -> Ints:
        """(C,) rows in the cells before each."""
        return np.cumsum(self.counts) - self.counts

    def subset(self, fraction: float, *, chunk: int = 0) -> "Histogram":
        """Return a part of the rows of all lengths: floor(fraction x count + u) of each cell.

        u in [0, 1) is a fixed hash of (chunk, source, target), so that the parts of growing
        fractions contain each other, and the expected number of rows is fraction x rows (methods.md
        79: a smaller data set as the fidelity of a search). A fraction of 1 is the histogram
        itself.

        Raises:
            ValueError: a fraction outside (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"a subset of {fraction}: expected more than 0 and at most 1")
        keys = (self.source.astype(np.uint64) << np.uint64(32)) + self.target.astype(np.uint64)
        share = (mixed(keys, salt=chunk) >> np.uint64(11)) * 2.0**-53
        counts = np.floor(fraction * self.counts + share).astype(np.int64)
        return Histogram(self.source, self.target, np.minimum(counts, self.counts))


def mixed(keys: NDArray[np.uint64], *, salt: int) -> NDArray[np.uint64]:
    """Return a fixed hash of 64-bit keys: splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = keys + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


@dataclass(frozen=True)
class Cells:
    """Rows by their lengths.

    Attributes:
        histogram: ascending by (bucket, source, target).
        members: (n,) row numbers, cell after cell; inside a cell in the order they came in.
    """

    histogram: Histogram
    members: Ints


def group(source_lengths: Ints, target_lengths: Ints, *, bucket_width: int = 0) -> Cells:
    """Find the cells of some rows. O(n log n).

    Lengths are >= 1; with `bucket_width` 0 there are no buckets, else cells ascend by `bucket_of`
    first.
    """
    source = np.asarray(source_lengths, dtype=np.int64)
    target = np.asarray(target_lengths, dtype=np.int64)
    buckets = bucket_of(source, target, width=bucket_width)
    members = np.lexsort((target, source, buckets))
    source, target = source[members], target[members]
    firsts = firsts_of(source, target)
    counts = np.diff(np.append(firsts, len(members)))
    return Cells(Histogram(source[firsts], target[firsts], counts), members)


def firsts_of(*columns: Ints) -> Ints:
    """Return positions where any of some columns of equal, sorted tuples changes; 0 is one."""
    is_new = np.ones(len(columns[0]), dtype=bool)
    is_new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(is_new)


def bucket_of(source_lengths: Ints, target_lengths: Ints, *, width: int) -> Ints:
    """Return the shards' buckets, (max(source, target) - 1) // width; all 0 where width is 0."""
    longest = np.maximum(source_lengths, target_lengths)
    return (longest - 1) // width if width else np.zeros_like(longest)


@dataclass(frozen=True)
class Plan:
    """The rows of a histogram in batching order, and where they are cut.

    Run r is `counts[r]` rows of cell `cells[r]`, the first of them the cell's row `ranks[r]`.

    Attributes:
        cells: (R,) cell of each run.
        ranks: (R,) >= 0.
        counts: (R,) >= 1.
        cuts: (batches + 1,) ascending positions in the order; batch i is cuts[i] to cuts[i + 1].
    """

    cells: Ints
    ranks: Ints
    counts: Ints
    cuts: Ints

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def picks(self, first: int, last: int) -> tuple[Ints, Ints]:
        """Return cell and rank inside it of the rows at positions first to last, last excluded."""
        ends = np.cumsum(self.counts)
        at = np.arange(first, last)
        runs = np.searchsorted(ends, at, side="right")
        return self.cells[runs], self.ranks[runs] + at - (ends - self.counts)[runs]

    def batch(self, index: int) -> tuple[Ints, Ints]:
        """Return cell and rank inside it of each row of a batch, both (B,)."""
        return self.picks(int(self.cuts[index]), int(self.cuts[index + 1]))

    def padding_efficiency(self, histogram: Histogram) -> PaddingEfficiency:
        """Return the share of real tokens in its batches; all 1 for no batches."""
        if not len(self):
            return PaddingEfficiency(1.0, 1.0, 1.0, 0)
        ends = np.cumsum(self.counts)
        # Runs cut again where batches are cut: each piece is of one run and one batch.
        edges = np.union1d(np.append(0, ends), self.cuts)
        cells = self.cells[np.searchsorted(ends, edges[:-1], side="right")]
        firsts = np.searchsorted(edges[:-1], self.cuts[:-1])
        sizes, rows = np.diff(edges), np.diff(self.cuts)
        real = [int((side[cells] * sizes).sum()) for side in (histogram.source, histogram.target)]
        padded = [
            int((np.maximum.reduceat(side[cells], firsts) * rows).sum())
            for side in (histogram.source, histogram.target)
        ]
        shares = (real[0] / padded[0], real[1] / padded[1], sum(real) / sum(padded))
        return PaddingEfficiency(*shares, batches=len(self))


def plan_cells(
    histogram: Histogram, *, tokens: int, order: BatchOrder = "alternating_max", salt: int = 0
) -> Plan:
    """Cut a histogram into batches: sentences x longest side is at most `tokens`.

    Each batch takes as many rows of the order as the budget holds. In `alternating_max` the longest
    side never falls, so that no way to form batches needs fewer of them; neighbours are near in
    both lengths, also across a change of the maximum: 0.969 real tokens on Multi30k at 4096,
    against 0.935 of a full sort (benchmarks/padding.py). A row longer than the budget is a batch
    alone. O(C log C) for C cells; `random` takes O(n) for n rows. `salt` is that of `random`'s
    permutation.
    """
    if order == "random":
        rows = np.random.default_rng(salt).permutation(histogram.rows)
        owner = np.repeat(np.arange(len(histogram.counts)), histogram.counts)[rows]
        ranks = rows - histogram.starts[owner]
        cuts = _cut(histogram.longest[owner], np.ones_like(rows), np.zeros_like(rows), tokens)
        return Plan(owner, ranks, np.ones_like(rows), cuts)
    cells = np.flatnonzero(histogram.counts)
    source, target = histogram.source[cells], histogram.target[cells]
    longest = np.maximum(source, target)
    groups = np.zeros_like(cells)
    if order == "bucket_by_source":
        groups = (source - 1) // SOURCE_BUCKET
        turn = np.lexsort((source, target, groups))
    elif len(cells):
        # Rank among the maxima that occur: a gap must not make two neighbours run the same way.
        rank = np.cumsum(np.bincount(longest) > 0)[longest]
        turn = np.lexsort(((source - target) * np.where(rank % 2, 1, -1), longest))
    else:
        turn = cells
    counts = histogram.counts[cells][turn]
    cuts = _cut(longest[turn], counts, groups[turn], tokens)
    return Plan(cells[turn], np.zeros_like(cells), counts, cuts)


def _cut(longest: Ints, counts: Ints, groups: Ints, tokens: int) -> Ints:
    """Cut runs of rows greedily; a batch holds one group. O(runs that differ + batches)."""
    firsts = firsts_of(longest, groups)
    runs = np.add.reduceat(counts, firsts) if len(firsts) else counts
    cuts, at, size, top, last = [0], 0, 0, 0, None
    for length, count, owner in zip(
        longest[firsts].tolist(), runs.tolist(), groups[firsts].tolist(), strict=True
    ):
        if size and (owner != last or max(top, length) * (size + 1) > tokens):
            at, size, top = at + size, 0, 0
            cuts.append(at)
        last, top = owner, max(top, length)
        room = max(1, tokens // top) - size
        if count < room:
            size += count
            continue
        # Fills the open batch; then whole ones of this length alone.
        at += size + room
        cuts.append(at)
        each = max(1, tokens // length)
        whole, size = divmod(count - room, each)
        cuts.extend(range(at + each, at + each * whole + 1, each))
        at, top = at + each * whole, length if size else 0
    if size:
        cuts.append(at + size)
    return np.asarray(cuts, dtype=np.int64)


def refuse_longer(histogram: Histogram, *, tokens: int, name: str = "train") -> None:
    """Refuse rows that no batch can hold.

    Raises:
        DataError: naming the lengths, how many there are and the fix.
    """
    longest = histogram.longest
    over = (longest > tokens) & (histogram.counts > 0)
    if over.any():
        raise DataError(
            f"{name}: {int(histogram.counts[over].sum()):,} rows are longer than a batch of "
            f"{tokens}, the longest has {int(longest[over].max())} tokens. Fix: raise the batch's "
            "tokens, or lower max_source_length and max_target_length and prepare again"
        )


def arrange(
    source_lengths: Ints,
    target_lengths: Ints,
    *,
    tokens: int,
    order: BatchOrder = "alternating_max",
) -> list[Ints]:
    """Return the rows of each batch; a row that is longer than the budget comes alone.

    Args:
        source_lengths: (n,) tokens, each >= 1.
        target_lengths: (n,) tokens, each >= 1.
        tokens: sentences x max(longest source, longest target) of a batch of two rows or more.
        order: see `plan_cells`; rows of equal lengths stay in their order.
    """
    cells = group(source_lengths, target_lengths)
    plan = plan_cells(cells.histogram, tokens=tokens, order=order)
    owners, ranks = plan.picks(0, len(cells.members))
    rows = cells.members[cells.histogram.starts[owners] + ranks]
    return np.split(rows, plan.cuts[1:-1]) if len(rows) else []
