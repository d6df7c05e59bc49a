import itertools
import tracemalloc
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vinedresser.config import BatchOrder
from vinedresser.data.batching.plan import (
    Histogram,
    Ints,
    PaddingEfficiency,
    arrange,
    bucket_of,
    group,
    plan_cells,
    refuse_longer,
)
from vinedresser.errors import DataError

STRATEGIES = get_args(BatchOrder)

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=200)
ORDERS = st.sampled_from(STRATEGIES)


def padding_efficiency(source: Ints, target: Ints, batches: list[Ints]) -> PaddingEfficiency:
    """Return the share of real tokens in some batches, row by row; all 1 for no batches."""
    sides = (source, target)
    real = [sum(int(side[rows].sum()) for rows in batches) for side in sides]
    padded = [sum(len(rows) * int(side[rows].max()) for rows in batches) for side in sides]
    shares = [r / p if p else 1.0 for r, p in zip(real, padded, strict=True)]
    both = sum(real) / sum(padded) if batches else 1.0
    return PaddingEfficiency(shares[0], shares[1], both, len(batches))


def columns(pairs):
    array = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def cost(source, target, rows):
    return len(rows) * max(source[rows].max(), target[rows].max())


def sorted_rows(pairs, order):
    """The order as its definition says it, in plain Python."""
    rows = range(len(pairs))
    if order == "bucket_by_source":
        return sorted(rows, key=lambda i: ((pairs[i][0] - 1) // 5, pairs[i][1], pairs[i][0], i))
    maxima = sorted({max(pair) for pair in pairs})

    def key(i):
        source, target = pairs[i]
        rises = maxima.index(max(source, target)) % 2 == 0
        return max(source, target), (source - target if rises else target - source), i

    return sorted(rows, key=key)


def greedy(pairs, rows, tokens, order):
    """Batches of rows in a given order, one row after the other."""
    batches = [[rows[0]]]
    for row in rows[1:]:
        more = [*batches[-1], row]
        fits = len(more) * max(max(pairs[i]) for i in more) <= tokens
        crosses = order == "bucket_by_source" and len({(pairs[i][0] - 1) // 5 for i in more}) > 1
        if fits and not crosses:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@given(LENGTHS, st.integers(40, 400), ORDERS)
def test_each_row_once_and_the_budget_holds(pairs, tokens, order):
    source, target = columns(pairs)
    batches = arrange(source, target, tokens=tokens, order=order)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(pairs)))
    assert all(cost(source, target, rows) <= tokens for rows in batches)
    again = arrange(source, target, tokens=tokens, order=order)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@given(LENGTHS, st.integers(1, 400), st.sampled_from(["alternating_max", "bucket_by_source"]))
def test_the_plan_of_a_histogram_is_the_plan_of_its_rows(pairs, tokens, order):
    # Also below the longest row: it comes alone.
    expected = greedy(pairs, sorted_rows(pairs, order), tokens, order)
    found = arrange(*columns(pairs), tokens=tokens, order=order)
    assert [rows.tolist() for rows in found] == expected


@given(LENGTHS, st.integers(40, 400))
def test_random_batches_are_the_greedy_cuts_of_a_permutation(pairs, tokens):
    found = [rows.tolist() for rows in arrange(*columns(pairs), tokens=tokens, order="random")]
    assert found == greedy(pairs, list(itertools.chain(*found)), tokens, "random")


def fewest(longest, tokens):
    """Over all ways to form batches: best[set of rows] by dynamic programming."""
    best = {0: 0}
    for rows in range(1, 1 << len(longest)):
        best[rows], part = len(longest), rows
        while part:
            lengths = [n for i, n in enumerate(longest) if part >> i & 1]
            if len(lengths) * max(lengths) <= tokens:
                best[rows] = min(best[rows], best[rows ^ part] + 1)
            part = (part - 1) & rows
    return best[(1 << len(longest)) - 1]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7))
def test_no_way_to_form_batches_needs_fewer(pairs):
    assert len(arrange(*columns(pairs), tokens=12)) == fewest([max(pair) for pair in pairs], 12)


def test_the_orders_of_given_lengths():
    # Maximum 2 by rising, 3 by falling, 5 by rising source - target; ties stay in row order.
    source, target = columns([(3, 1), (2, 2), (1, 2), (1, 3), (3, 1), (5, 5), (2, 1), (3, 3)])
    (rows,) = arrange(source, target, tokens=100)
    assert rows.tolist() == [2, 1, 6, 0, 4, 7, 3, 5]
    # Hannun's: inputs 1-5, 6-10, 11-15; in each by output, then by input length.
    source, target = columns([(11, 1), (5, 9), (1, 9), (6, 2), (10, 1), (4, 3), (6, 1)])
    batches = arrange(source, target, tokens=100, order="bucket_by_source")
    assert [rows.tolist() for rows in batches] == [[5, 2, 1], [6, 4, 3], [0]]


def test_a_row_longer_than_the_budget_is_refused():
    found = group(np.array([1, 9]), np.array([2, 2])).histogram
    with pytest.raises(DataError, match=r"1 rows are longer than a batch of 8.* has 9.*Fix: raise"):
        refuse_longer(found, tokens=8)
    absent = Histogram(np.array([9]), np.array([2]), np.array([0]))
    refuse_longer(absent, tokens=8)


def test_nothing_to_plan():
    none = np.zeros(0, dtype=np.int64)
    for order in STRATEGIES:
        assert arrange(none, none, tokens=8, order=order) == []
    assert padding_efficiency(none, none, []).both == 1.0
    empty = Histogram(none, none, none)
    assert plan_cells(empty, tokens=8).padding_efficiency(empty).batches == 0


@given(LENGTHS, st.integers(1, 400), ORDERS)
def test_padding_efficiency_by_cells_is_that_by_rows(pairs, tokens, order):
    source, target = columns(pairs)
    histogram = group(source, target).histogram
    by_rows = padding_efficiency(
        source, target, arrange(source, target, tokens=tokens, order=order)
    )
    assert (
        plan_cells(histogram, tokens=tokens, order=order).padding_efficiency(histogram) == by_rows
    )


@given(LENGTHS, st.integers(0, 9))
def test_cells_hold_each_row_once_bucket_after_bucket(pairs, width):
    source, target = columns(pairs)
    cells = group(source, target, bucket_width=width)
    owners = np.repeat(np.arange(len(cells.histogram.counts)), cells.histogram.counts)
    assert sorted(cells.members.tolist()) == list(range(len(pairs)))
    assert (source[cells.members] == cells.histogram.source[owners]).all()
    assert (target[cells.members] == cells.histogram.target[owners]).all()
    assert (np.diff(cells.members)[np.diff(owners) == 0] > 0).all()
    lengths = zip(cells.histogram.source, cells.histogram.target, strict=True)
    buckets = bucket_of(cells.histogram.source, cells.histogram.target, width=width)
    keys = [(b, *pair) for b, pair in zip(buckets, lengths, strict=True)]
    assert keys == sorted(set(keys))


@given(LENGTHS, st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 3))
def test_subsets_contain_each_other(pairs, one, other, chunk):
    histogram = group(*columns(pairs)).histogram
    small, large = (histogram.subset(f, chunk=chunk) for f in sorted((one, other)))
    assert (small.counts <= large.counts).all()
    assert (large.counts <= histogram.counts).all()
    assert (abs(small.counts - min(one, other) * histogram.counts) < 1).all()
    assert (histogram.subset(1.0).counts == histogram.counts).all()


def test_a_subset_is_unbiased_and_a_wrong_one_is_refused():
    # 2,500 cells of one row: rows kept are binomial, 750 +- 23.
    source, target = columns(list(itertools.product(range(1, 51), range(1, 51))))
    histogram = Histogram(source, target, np.ones_like(source))
    kept = [histogram.subset(0.3, chunk=chunk).rows for chunk in range(8)]
    assert len(set(kept)) > 4
    assert all(abs(rows - 750) < 115 for rows in kept)
    for fraction in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="more than 0 and at most 1"):
            histogram.subset(fraction)


def test_less_padding_than_random_batches_and_less_with_more_rows():
    random = np.random.default_rng(0)

    def share(count):
        source = random.integers(1, 60, count)
        target = np.clip(source + random.integers(-5, 6, count), 1, None)
        of = {}
        for order in STRATEGIES:
            batches = arrange(source, target, tokens=2048, order=order)
            of[order] = padding_efficiency(source, target, batches).both
        assert min(of["alternating_max"], of["bucket_by_source"]) > of["random"] + 0.2
        return of["alternating_max"]

    assert share(500) < share(5_000) < share(50_000)


def test_a_plan_grows_with_the_cells_and_not_with_the_rows():
    # 10^7 rows in 40,000 cells: 8 bytes a row would be 80 MB; the cuts are 2.5 MB.
    source, target = columns(list(itertools.product(range(1, 201), range(1, 201))))
    histogram = Histogram(source, target, np.full(40_000, 250))
    tracemalloc.start()
    try:
        found = plan_cells(histogram, tokens=4096)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e7
    assert int(found.counts.sum()) == found.cuts[-1] == 10**7


@pytest.mark.parametrize("order", STRATEGIES)
def test_an_update_of_four_ranks_is_near_its_tokens(order):
    """methods.md 33: 4 batches of 4,000 padded tokens per update, of rows of all lengths."""
    random = np.random.default_rng(1)
    source = np.clip(random.lognormal(3, 0.6, 20_000).astype(np.int64), 1, 150)
    target = np.clip(source + random.integers(-6, 7, len(source)), 1, 150)
    batches = arrange(source, target, tokens=4_000, order=order)
    sizes = np.array([cost(source, target, rows) for rows in batches])
    updates = sizes[: len(sizes) // 4 * 4].reshape(-1, 4).sum(axis=1)
    assert updates.max() <= 16_000
    # Each batch lacks less than one more row: its longest side, or that of the next row. Only the
    # last batch of a group of `bucket_by_source` may hold fewer.
    longest = np.array([max(source[rows].max(), target[rows].max()) for rows in batches])
    following = np.maximum(longest, np.append(longest[1:], 0))
    count = np.array([len(rows) for rows in batches])
    lacks_less_than_a_row = (count + 1) * following > 4_000
    ends = np.ones(len(batches), dtype=bool)
    if order == "bucket_by_source":
        groups = np.array([(source[rows[0]] - 1) // 5 for rows in batches])
        ends = np.append(groups[1:] == groups[:-1], False)
    ends[-1] = False
    assert lacks_less_than_a_row[ends].all()
    assert ends.sum() > 50
    assert np.mean(updates) > (15_500 if order == "alternating_max" else 13_000)
