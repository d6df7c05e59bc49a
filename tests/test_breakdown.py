"""Errors by position and by length against counts by hand."""

from typing import Any

import pytest

from vinedresser.breakdown import by_length, by_position, sentences
from vinedresser.evaluate import Evaluated, Scores

EOS = 2


def evaluated(rows: list[tuple[list[int], list[int]]], **changes: Any) -> Evaluated:
    """An evaluation of (reference, hypothesis) ids, EOS left out, without teacher-forced errors."""
    targets, outputs = ([[*ids, EOS] for ids in side] for side in zip(*rows, strict=True))
    texts = [[" ".join(map(str, ids[:-1])) for ids in side] for side in (outputs, targets)]
    wrong = changes.pop("is_wrong", [[False] * len(ids) for ids in targets])
    metric = changes.pop("metric", "per")
    scores = Scores(metric, 0.0, "", 0.0, 0.0, 0.0, len(rows), 1.0)
    return Evaluated(scores, texts[1], *texts, outputs, targets, wrong)


def test_edits_count_at_the_reference_token_where_they_are():
    found = by_position(
        evaluated(
            [
                ([4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8]),  # the 6th deleted
                ([4, 5], [4, 9]),  # the 2nd replaced
                ([4], [4, 6, 6]),  # two inserted before the end, the 2nd token
            ],
            is_wrong=[[0, 0, 0, 0, 0, 1, 1], [0, 0, 0], [1, 0]],
        )
    )
    assert found["position"] == ["1-5", "6-10"]
    assert found["tokens"] == [10, 2]
    assert found["decoded_error"] == pytest.approx([30, 50])
    assert found["teacher_forced_error"] == pytest.approx([10, 100])


def test_nothing_decoded_is_all_deleted():
    found = by_position(evaluated([([4, 5, 6], []), ([], [])]))
    # The end is right both times.
    assert found["decoded_error"] == pytest.approx([60])


def test_lengths_and_worst_sentences():
    of_all = evaluated([([4, 5], [4, 9]), ([4, 5, 6, 7, 8, 9], [4, 5]), ([7], [7])])
    found = by_length(of_all)
    assert found["tokens"] == ["1-5", "6-10"]
    assert found["sentences"] == [2, 1]
    assert found["per"] == pytest.approx([100 / 3, 400 / 6])
    assert found["length_ratio"] == pytest.approx([1.0, 3 / 7])
    worst = sentences(of_all, worst=2)
    assert worst["reference"] == ["4 5 6 7 8 9", "4 5"]
    assert worst["hypothesis"] == ["4 5", "4 9"]
    assert worst["per"] == pytest.approx([400 / 6, 50])
    assert sentences(of_all)["source"] == of_all.sources


def test_the_worst_have_the_lowest_points():
    found = sentences(evaluated([([4, 5], [4, 5]), ([4, 5], [7])], metric="chrf"), worst=1)
    assert found["hypothesis"] == ["7"]
