"""Paired bootstrap against scores computed whole, and against the textbook interval."""

import random

import numpy as np
import pytest

from vinedresser.metrics import METRICS, measure
from vinedresser.significance import _statistics, paired_bootstrap


def texts(count: int, noise: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """References of five to nine words, and copies in which a share of the words is another."""
    draw = random.Random(seed)
    references = [" ".join(draw.choices("abcdefgh", k=draw.randint(5, 9))) for _ in range(count)]
    copies = random.Random(seed + 1 + int(100 * noise))
    return references, [
        " ".join(w if copies.random() > noise else copies.choice("xyz") for w in text.split())
        for text in references
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_statistics_of_all_sentences_give_the_corpus_score(metric: str) -> None:
    references, hypotheses = texts(40, 0.3)
    rows, score = _statistics(metric, hypotheses, references, folds_case=False)
    value = measure(metric, hypotheses, references).value
    assert score(rows.sum(0)) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("metric", ["per", "bleu"])
def test_the_better_model_gains(metric: str) -> None:
    references, good = texts(300, 0.1)
    _, bad = texts(300, 0.2)
    found = paired_bootstrap(metric, ([good], [bad]), references)
    low, high = found.interval()
    assert 0 < low < abs(found.values[0] - found.values[1]) < high
    assert found.share(at_least=0) == 1
    assert paired_bootstrap(metric, ([bad], [good]), references).share(at_least=0) == 0
    again = paired_bootstrap(metric, ([good], [bad]), references)
    assert np.array_equal(again.gains, found.gains)


def test_the_interval_of_a_mean_is_that_of_the_textbook() -> None:
    """`ser` is a mean over sentences, whose standard error is known."""
    references, good = texts(400, 0.03)
    _, bad = texts(400, 0.05)
    found = paired_bootstrap("ser", ([good], [bad]), references, samples=4000)
    rows = zip(good, bad, references, strict=True)
    per_sentence = np.array([100.0 * ((b != r) - (g != r)) for g, b, r in rows])
    error = 1.96 * per_sentence.std() / np.sqrt(400)
    low, high = found.interval()
    assert low == pytest.approx(per_sentence.mean() - error, abs=0.6)
    assert high == pytest.approx(per_sentence.mean() + error, abs=0.6)


def test_equal_models_differ_in_no_sample() -> None:
    references, some = texts(50, 0.2)
    found = paired_bootstrap("bleu", ([some], [some]), references, samples=50)
    assert found.interval() == (0.0, 0.0)
    assert found.share(at_least=0) == 1


def test_the_p_value_agrees_with_the_interval() -> None:
    references, good = texts(120, 0.1)
    for noise in (0.1, 0.12, 0.14, 0.16, 0.18):
        _, other = texts(120, noise)
        found = paired_bootstrap("per", ([good], [other]), references, samples=400)
        for confidence in (0.9, 0.95, 0.99):
            low, high = found.interval(confidence)
            if abs(found.p_value - (1 - confidence)) > 0.01:
                assert (low > 0 or high < 0) == (found.p_value < 1 - confidence)
    same = paired_bootstrap("per", ([good], [good]), references, samples=50)
    assert same.p_value == 1


def test_the_spread_between_seeds_widens_the_interval() -> None:
    references, good = texts(100, 0.1)
    _, bad = texts(100, 0.3)
    _, base = texts(100, 0.2)
    seeds = paired_bootstrap("per", ([good, bad], [base, base]), references)
    value = (measure("per", good, references).value + measure("per", bad, references).value) / 2
    assert seeds.values[0] == pytest.approx(value)
    alone = paired_bootstrap("per", ([good], [base]), references)
    widths = [high - low for low, high in (seeds.interval(), alone.interval())]
    assert widths[0] > 1.5 * widths[1]
    assert seeds.p_value > 0.05 > alone.p_value


@pytest.mark.parametrize("metric", ["per", "wer", "cer"])
def test_an_empty_reference_counts_what_was_inserted(metric: str) -> None:
    hypotheses, references = ["a", "b c"], ["a", ""]
    rows, score = _statistics(metric, hypotheses, references, folds_case=False)
    assert score(rows.sum(0)) == pytest.approx(measure(metric, hypotheses, references).value)
    assert score(rows[1]) > 0
