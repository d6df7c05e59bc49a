"""Corpus metrics: unit, range, direction and signature of each. sacreBLEU and jiwer compute them.

Every metric is a percentage or points, so that the same thresholds mean the same everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vinedresser.config import MetricName
from vinedresser.errors import DataError

# Largest absolute difference between the log-probabilities of a model and of what replaces it.
PARITY_TOLERANCE = 1e-5

LOWER_IS_BETTER = frozenset({"per", "wer", "cer", "ter"})


@dataclass(frozen=True)
class Measured:
    """A metric's value and how it was computed, in the scorer's own words."""

    value: float
    signature: str


def is_lower_better(metric: str) -> bool:
    """Direction of a metric."""
    return metric in LOWER_IS_BETTER


def is_better(metric: str, challenger: float, champion: float) -> bool:
    """Whether the challenger is strictly better; NaN is never better."""
    return challenger < champion if is_lower_better(metric) else challenger > champion


def worst(metric: str) -> float:
    """A value that every finite one beats."""
    return float("inf") if is_lower_better(metric) else float("-inf")


def measure(
    metric: MetricName,
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    folds_case: bool = False,
) -> Measured:
    """One corpus score; the signature says whether case was looked at.

    bleu, chrf: points in [0, 100], higher is better. ter: edits per 100 reference words, in
    [0, inf), lower is better. per, wer, cer: edits per 100 reference phones (separated by
    spaces), words or characters, in [0, inf), lower is better, one reference each.

    Args:
        metric: which score.
        hypotheses: decoded text.
        references: text of the corpus, in the same order.
        folds_case: capitals and small letters count as equal: what a tokenizer without capitals
            asks for.

    Raises:
        DataError: no sentences, or not as many hypotheses as references; sacreBLEU alone scores
            2 hypotheses against 1 reference as 100.0.
    """
    if len(hypotheses) != len(references) or not references:
        raise DataError(
            f"{len(hypotheses)} hypotheses for {len(references)} references; "
            "score one hypothesis a reference, and at least one"
        )
    if metric in {"per", "wer", "cer"}:
        return _edits(metric, hypotheses, references, folds_case=folds_case)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    scorer = (
        BLEU(lowercase=folds_case) if metric == "bleu"
        else CHRF(lowercase=folds_case) if metric == "chrf"
        else TER()  # never looks at case
    )  # fmt: skip
    value = scorer.corpus_score(list(hypotheses), [list(references)]).score
    return Measured(float(value), f"{metric}|{scorer.get_signature()}")


def _edits(
    metric: str, hypotheses: Sequence[str], references: Sequence[str], *, folds_case: bool
) -> Measured:
    import jiwer

    if folds_case:
        hypotheses, references = ([t.lower() for t in side] for side in (hypotheses, references))
    rate = jiwer.cer if metric == "cer" else jiwer.wer
    value = 100 * float(rate(list(references), list(hypotheses)))
    unit = {"per": "phones", "wer": "words", "cer": "characters"}[metric]
    case = "|case:lc" * folds_case
    return Measured(value, f"{metric}|nrefs:1{case}|unit:{unit}|jiwer:{_version('jiwer')}")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def exact_error_rate(
    hypotheses: Sequence[str], references: Sequence[str], *, folds_case: bool = False
) -> float:
    """Sentences that are not exactly right, in percent (word error rate of pronunciations)."""
    if folds_case:
        hypotheses, references = ([t.lower() for t in side] for side in (hypotheses, references))
    wrong = sum(h != r for h, r in zip(hypotheses, references, strict=True))
    return 100 * wrong / len(references)
