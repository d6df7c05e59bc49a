import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vinedresser.data import padding, plan
from vinedresser.errors import DataError

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=200)


def columns(pairs):
    array = np.asarray(pairs, dtype=np.int64)
    return array[:, 0], array[:, 1]


@given(LENGTHS, st.integers(40, 400))
def test_each_row_once_and_the_budget_holds(pairs, tokens):
    source, target = columns(pairs)
    batches = plan(source, target, tokens=tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(pairs)))
    for rows in batches:
        assert len(rows) * max(source[rows].max(), target[rows].max()) <= tokens
    again = plan(source, target, tokens=tokens)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@given(LENGTHS)
def test_greedy_cuts_are_maximal(pairs):
    source, target = columns(pairs)
    batches = plan(source, target, tokens=100)
    for rows, after in itertools.pairwise(batches):
        more = np.append(rows, after[0])
        assert len(more) * max(source[more].max(), target[more].max()) > 100


def test_the_order_of_given_lengths():
    # Maximum 2 by falling, 3 by rising, 5 by falling source - target; ties stay in row order.
    source, target = columns([(3, 1), (2, 2), (1, 2), (1, 3), (3, 1), (5, 5), (2, 1), (3, 3)])
    (rows,) = plan(source, target, tokens=100)
    assert rows.tolist() == [2, 1, 6, 0, 4, 7, 3, 5]


def test_a_row_longer_than_the_budget_is_named():
    with pytest.raises(DataError, match=r"row 1 has 9 tokens, a batch holds 8. Fix: raise"):
        plan(np.array([1, 9]), np.array([2, 2]), tokens=8)


def test_nothing_to_plan():
    none = np.zeros(0, dtype=np.int64)
    assert plan(none, none, tokens=8) == []
    assert padding(none, none, []).both == 1.0


def test_less_padding_than_random_batches_and_less_with_more_rows():
    random = np.random.default_rng(0)

    def share(count):
        source = random.integers(1, 60, count)
        target = np.clip(source + random.integers(-5, 6, count), 1, None)
        shuffled = np.array_split(random.permutation(count), max(1, count // 80))
        sorted_ = padding(source, target, plan(source, target, tokens=2048)).both
        assert sorted_ > padding(source, target, shuffled).both + 0.2
        return sorted_

    assert share(500) < share(5_000) < share(50_000)


def test_a_million_rows_in_seconds():
    random = np.random.default_rng(0)
    source = random.integers(1, 200, 1_000_000)
    target = random.integers(1, 200, 1_000_000)
    start = time.process_time()
    plan(source, target, tokens=4096)
    assert time.process_time() - start < 3  # measured: 0.2 s
