"""What is said of a shard set, against its own rows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.memory_tracker import MemoryTracker
from vinedresser.data.batching.reader import load_split
from vinedresser.data.shards import ShardSet
from vinedresser.figures.corpus import buckets, corpus_figures, coverage, histogram_of, log_corpus


@pytest.mark.parametrize("split", ["train", "dev"])
def test_the_histogram_is_that_of_the_rows(reversal: ShardSet, split: str) -> None:
    cells, rows = histogram_of(reversal, split), load_split(reversal, split)
    pairs, counts = np.unique(
        np.stack([rows.source_lengths, rows.target_lengths]), axis=1, return_counts=True
    )
    found = {(s, t): c for s, t, c in zip(cells.source, cells.target, cells.counts, strict=True)}
    assert found == {(s, t): c for s, t, c in zip(*pairs, counts, strict=True)}


def test_buckets_hold_every_row_once(reversal: ShardSet) -> None:
    rows = load_split(reversal, "train")
    longest = np.maximum(rows.source_lengths, rows.target_lengths)
    found = buckets(reversal, tokens=64)
    assert sum(bucket.rows for bucket in found) == len(rows)
    for bucket in found:
        inside = (longest >= bucket.first) & (longest <= bucket.last)
        assert bucket.rows == inside.sum()
        assert 0.5 < bucket.padding_efficiency <= 1
    assert len(found) == len(reversal.meta["buckets"]["rows"])


def test_coverage_is_complete_where_nothing_is_unknown(reversal: ShardSet) -> None:
    known = coverage(reversal)
    assert known == {split: {"source": 100.0, "target": 100.0} for split in ("train", "dev")}
    half = {"source": {"unknown": 5, "tokens": 50}, "target": {"unknown": 0, "tokens": 40}}
    meta = {**reversal.meta, "lengths": {"dev": half}}
    assert coverage(replace(reversal, meta=meta))["dev"] == {"source": 90.0, "target": 100.0}


def test_pictures_are_left_with_a_run(reversal: ShardSet) -> None:
    assert set(corpus_figures(reversal, tokens=64)) == {"lengths.png", "padding.png", "rows.png"}
    tracker = MemoryTracker()
    log_corpus(tracker, reversal)
    names = {"data/account.json", "data/lengths.png", "data/padding.png", "data/rows.png"}
    assert names <= set(tracker.artifacts)
    drawn = tracker.artifacts["data/lengths.png"].axes[0]
    assert len(drawn.patches) == 2
    account = json.loads(str(tracker.artifacts["data/account.json"]))
    assert account["account"]["train"]["rows_out"] == len(load_split(reversal, "train"))
