import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vinedresser.config import Batching, BatchOrder
from vinedresser.data.batching.reader import Batches, Split, _random, in_order, stream
from vinedresser.data.batching.side import Side
from vinedresser.errors import DataError
from vinedresser.special_ids import EOS, PAD

STRATEGIES = get_args(BatchOrder)


def split_of(count: int, seed: int = 0) -> Split:
    random = np.random.default_rng(seed)

    def side() -> Side:
        lengths = random.integers(1, 20, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        values = random.integers(4, 99, offsets[-1]).astype(np.uint16)
        values[offsets[1:] - 1] = EOS
        return Side(values, offsets)

    return Split("train", side(), side(), [], [])


def rows(batches, count):
    return [batch.rows_B.tolist() for batch in itertools.islice(batches, count)]


def test_padding_and_lengths():
    split = split_of(50)
    for batch in in_order(split, tokens=100):
        for i, row in enumerate(batch.rows_B.tolist()):
            for side, ids, lengths in (
                (split.source, batch.source_BS, batch.source_lengths_B),
                (split.target, batch.target_BT, batch.target_lengths_B),
            ):
                length = int(lengths[i])
                real = side.values[side.offsets[row] : side.offsets[row + 1]]
                assert ids[i, :length].tolist() == real.tolist()
                assert (ids[i, length:] == PAD).all()
        assert batch.source_BS.dtype == batch.rows_B.dtype == torch.int64
        assert batch.source_BS.shape[1] == batch.source_lengths_B.max()


@given(st.integers(1, 80), st.integers(0, 3), st.integers(1, 4), st.integers(0, 40))
def test_ranks_are_disjoint_complete_and_resumable(count, seed, of, at):
    split = split_of(count)
    batches = Batches(split, Batching(max_padded_tokens=60), seed=seed)
    steps = 3 * batches.per_epoch
    by_rank = [
        rows(stream(split, Batching(max_padded_tokens=60), seed=seed, rank=r, of=of), steps)
        for r in range(of)
    ]
    together = [step for group in zip(*by_rank, strict=True) for step in group]
    assert together[:steps] == [batches.rows(i).tolist() for i in range(steps)]
    for start in range(0, steps, batches.per_epoch):
        epoch = together[start : start + batches.per_epoch]
        assert sorted(itertools.chain(*epoch)) == list(range(count))
    resumed = stream(split, Batching(max_padded_tokens=60), seed=seed, rank=of - 1, of=of, at=at)
    skipped = itertools.islice(
        stream(split, Batching(max_padded_tokens=60), seed=seed, rank=of - 1, of=of), at, None
    )
    assert rows(resumed, 3) == rows(skipped, 3)


def test_a_batch_depends_on_seed_and_index_alone():
    split = split_of(300)
    forward = Batches(split, Batching(max_padded_tokens=60), seed=7)
    backward = Batches(split, Batching(max_padded_tokens=60), seed=7)
    indices = range(3 * forward.per_epoch)
    expected = [forward.rows(i).tolist() for i in indices]
    assert [backward.rows(i).tolist() for i in reversed(indices)][::-1] == expected
    other = Batches(split, Batching(max_padded_tokens=60), seed=8)
    assert [other.rows(i).tolist() for i in indices] != expected


def test_epochs_differ_in_composition_at_equal_cost():
    split = split_of(3000)
    batches = Batches(split, Batching(max_padded_tokens=200), seed=1)
    epochs = [
        [batches.rows(e * batches.per_epoch + i) for i in range(batches.per_epoch)] for e in (0, 1)
    ]
    compositions = [{frozenset(rows.tolist()) for rows in epoch} for epoch in epochs]
    assert len(compositions[0] & compositions[1]) < 0.1 * batches.per_epoch
    shapes = [
        sorted(
            (
                len(rows),
                int(split.source_lengths[rows].max()),
                int(split.target_lengths[rows].sum()),
            )
            for rows in epoch
        )
        for epoch in epochs
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("sentences", [0, 1, 7, 50, 99])
def test_in_order_gives_each_row_once_or_a_spread_subset(sentences):
    split = split_of(50)
    found = [
        row for batch in in_order(split, tokens=60, sentences=sentences) for row in batch.rows_B
    ]
    count = min(sentences, 50) or 50
    assert sorted(map(int, found)) == [i * 50 // count for i in range(count)]
    again = [
        row for batch in in_order(split, tokens=60, sentences=sentences) for row in batch.rows_B
    ]
    assert again == found


def test_a_row_longer_than_the_budget_trains_not_but_is_evaluated():
    split = split_of(50)
    with pytest.raises(DataError, match=r"train: [0-9]+ rows are longer than a batch of 16"):
        stream(split, Batching(max_padded_tokens=16), seed=0)
    sizes = [len(batch.rows_B) for batch in in_order(split, tokens=5)]
    assert sum(sizes) == 50


def test_wrong_ranks_and_no_rows():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        stream(split_of(5), Batching(max_padded_tokens=60), seed=0, rank=2, of=2)
    none = Side(np.zeros(0, np.uint16), np.zeros(1, np.int64))
    empty = Split("train", none, none, [], [])
    assert list(in_order(empty, tokens=60)) == []
    with pytest.raises(DataError, match="0 rows"):
        stream(empty, Batching(max_padded_tokens=60), seed=0)


def test_frames_are_padded_with_zeros():
    offsets = np.array([0, 2, 5, 6])
    frames = np.arange(6 * 4, dtype=np.float16)
    source = Side(frames, offsets, features=4)
    target = Side(np.array([5, 2, 2, 6, 2], np.uint16), np.array([0, 2, 3, 5]))
    batch = Split("train", source, target, [], []).batch(np.array([2, 1]))
    assert batch.source_BS.dtype == torch.float32
    assert batch.source_BS.shape == (2, 3, 4)
    assert batch.source_BS[0].tolist() == [[20, 21, 22, 23], [0] * 4, [0] * 4]
    assert batch.source_BS[1].flatten().tolist() == list(range(8, 20))
    assert batch.source_lengths_B.tolist() == [1, 3]
    assert batch.target_BT.tolist() == [[6, 2], [2, 0]]


@pytest.mark.parametrize("order", STRATEGIES)
def test_a_subset_trains_on_some_rows_in_every_epoch(order):
    split = split_of(2000)
    used = []
    for share in (0.1, 0.5, 1.0):
        batching = Batching(max_padded_tokens=100, order=order, subset=share)
        batches = Batches(split, batching, seed=1)
        epochs = [
            np.concatenate([batches.rows(e * batches.per_epoch + i)
                            for i in range(batches.per_epoch)])
            for e in (0, 1)
        ]  # fmt: skip
        assert sorted(epochs[0]) == sorted(epochs[1])
        assert epochs[0].tolist() != epochs[1].tolist()
        assert len(set(epochs[0])) == len(epochs[0]) == pytest.approx(share * 2000, abs=60)
        used.append(set(epochs[0].tolist()))
    assert used[0] < used[1] < used[2] == set(range(2000))


def test_a_subset_without_a_row_says_so():
    with pytest.raises(DataError, match=r"0 rows in a subset of 1e-09; .*raise batch\.subset"):
        Batches(split_of(20), Batching(max_padded_tokens=100, subset=1e-9), seed=1)


def test_neighbours_of_seeds_epochs_and_chunks_draw_differently():
    keys = [(1,), (1, 1), (1, 0, 1), (1, 0, 1, 1), (0, 1), (1, 1, 0, 1), (2, 1)]
    draws = {float(_random(*key).random()) for key in keys}
    assert len(draws) == len(keys)
