"""Paired bootstrap: how sure it is that one model is better than another on the same sentences.

Sentences are drawn with replacement, the same ones for both models, and the corpus score of each
sample is computed from per-sentence statistics (Koehn 2004). Error rates are ratios of sums; BLEU,
chrF and TER come from sacreBLEU's own statistics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vinedresser.metrics import is_lower_better, measure, sentence_scores

_SACREBLEU = {"bleu": "BLEU", "chrf": "CHRF", "ter": "TER"}
# Length of a reference in the unit of an error rate; other metrics weigh all sentences equally.
_LENGTHS: dict[str, Callable[[str], int]] = {
    "per": lambda text: len(text.split()),
    "wer": lambda text: len(text.split()),
    "cer": lambda text: len(text.strip()),
}


@dataclass(frozen=True)
class PairedBootstrap:
    """Scores of two sides on the same sentences, and the spread of their difference.

    A side is a model, or several that were trained alike with other seeds; its score is their mean.

    Attributes:
        metric: name of the score.
        values: corpus scores of the first and the second side.
        gains: by how much the first is better in each sample, whatever the direction of the metric.
    """

    metric: str
    values: tuple[float, float]
    gains: NDArray[np.float64]

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the two-sided interval of the gain by percentiles."""
        tail = 50 * (1 - confidence)
        low, high = np.percentile(self.gains, [tail, 100 - tail])
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Return the smallest 1 - confidence whose interval leaves out 0, at most 1."""
        count = len(self.gains)
        tails = ((self.gains <= 0).sum(), (self.gains >= 0).sum())
        return float(min(1.0, 2 * (1 + min(tails)) / (count + 1)))

    def share(self, *, at_least: float) -> float:
        """Return the share of samples in which the gain is at least as large."""
        return float((self.gains >= at_least).mean())


def paired_bootstrap(
    metric: str,
    hypotheses: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
    references: Sequence[str],
    *,
    folds_case: bool = False,
    samples: int = 1000,
) -> PairedBootstrap:
    """Compare two sides by resampling sentences; the same inputs give the same numbers.

    The models of a side are drawn with replacement too, so that the spread between seeds counts.

    Args:
        metric: a name of METRICS.
        hypotheses: of each model of the first and of the second side, in the order of the
            references.
        references: text of the corpus.
        folds_case: capitals and small letters count as equal.
        samples: number of draws.

    Raises:
        DataError: no sentences, or not one hypothesis per reference.
    """
    values = [
        float(
            np.mean(
                [measure(metric, texts, references, folds_case=folds_case).value for texts in side]
            )
        )
        for side in hypotheses
    ]
    sides = [
        [_statistics(metric, texts, references, folds_case=folds_case) for texts in side]
        for side in hypotheses
    ]
    draw, count = np.random.default_rng(0), len(references)
    gains = np.empty(samples)
    for sample in range(samples):
        times = np.bincount(draw.integers(count, size=count), minlength=count)
        means = []
        for side in sides:
            models = draw.integers(len(side), size=len(side)) if len(side) > 1 else (0,)
            means.append(
                np.mean([score(times @ rows) for rows, score in (side[m] for m in models)])
            )
        gains[sample] = means[1] - means[0] if is_lower_better(metric) else means[0] - means[1]
    return PairedBootstrap(metric, (values[0], values[1]), gains)


def _statistics(
    metric: str, hypotheses: Sequence[str], references: Sequence[str], *, folds_case: bool
) -> tuple[NDArray[Any], Callable[[NDArray[Any]], float]]:
    """Return a row of additive statistics per sentence, and the score of their sum."""
    if metric in _SACREBLEU:
        name = _SACREBLEU[metric]
        options = {} if metric == "ter" else {"lowercase": folds_case}
        scorer: Any = getattr(import_module(f"sacrebleu.metrics.{metric}"), name)(**options)
        stats = scorer._extract_corpus_statistics(list(hypotheses), [list(references)])

        def points(sums: NDArray[Any]) -> float:
            return float(scorer._compute_score_from_stats([float(each) for each in sums]).score)

        return np.array(stats), points
    length = _LENGTHS.get(metric)
    lengths = np.array([length(text) if length else 1 for text in references], np.float64)
    scores = np.array(sentence_scores(metric, hypotheses, references, folds_case=folds_case))
    # Of an empty reference, an error rate is 100 per inserted token, as in jiwer.
    rows = np.stack([scores * np.maximum(lengths, 1), lengths], 1)
    return rows, lambda sums: float(sums[0] / max(sums[1], 1))
