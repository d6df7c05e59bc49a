"""Metrics of decoded text: one table of unit, direction, corpus score and sentence score.

Every metric is a percentage or points, so that the same thresholds mean the same everywhere.
sacreBLEU, jiwer and rouge-score compute them. A new metric is one line of METRICS; a learned one,
as COMET, is a module of its own that calls its library and returns the same two values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from vinedresser.errors import ConfigError, DataError

# Largest absolute difference between the log-probabilities of a model and of what replaces it.
PARITY_TOLERANCE = 1e-5

# (hypotheses, references, folds_case) -> value and how it was computed, without the metric's name.
CorpusScorer = Callable[[Sequence[str], Sequence[str], bool], tuple[float, str]]


@dataclass(frozen=True)
class Measured:
    """The value of a metric and its signature: how it was computed."""

    value: float
    signature: str


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        unit: what a value counts, in words.
        is_lower_better: direction.
        corpus: score of a whole corpus.
        sentence: score of one pair, by the same interface with one hypothesis and one reference.
    """

    unit: str
    is_lower_better: bool
    corpus: CorpusScorer
    sentence: CorpusScorer


def _points(unit: str, name: str, *, is_lower_better: bool = False) -> Metric:
    """Return a metric of sacreBLEU; `name` is its class."""

    def scored(
        hypotheses: Sequence[str], references: Sequence[str], folds_case: bool, is_sentence: bool
    ) -> tuple[float, str]:
        scorer_class = getattr(import_module(f"sacrebleu.metrics.{name.lower()}"), name)
        # TER never looks at case.
        options = {} if name == "TER" else {"lowercase": folds_case}
        # Without it a sentence of fewer than 4 words has no 4-grams and scores 0 (sacreBLEU's own
        # advice for single sentences).
        options |= {"effective_order": True} if name == "BLEU" and is_sentence else {}
        scorer = scorer_class(**options)
        score = scorer.corpus_score(list(hypotheses), [list(references)]).score
        return float(score), str(scorer.get_signature())

    return Metric(
        unit,
        is_lower_better,
        lambda hyps, refs, folds: scored(hyps, refs, folds, False),
        lambda hyps, refs, folds: scored(hyps, refs, folds, True),
    )


def _errors(unit: str, per: str) -> Metric:
    """Return an error rate in percent per reference phone, word, character or sentence.

    `exact` is the share of sentences without an error.
    """

    def scored(
        hypotheses: Sequence[str], references: Sequence[str], folds_case: bool
    ) -> tuple[float, str]:
        if folds_case:
            hypotheses, references = (
                [text.lower() for text in side] for side in (hypotheses, references)
            )
        signature = (
            f"nrefs:1{'|case:lc' * folds_case}|unit:{'sentences' if per == 'exact' else per}"
        )
        if per in ("sentences", "exact"):
            wrong = sum(h != r for h, r in zip(hypotheses, references, strict=True))
            share = 100 * wrong / len(references)
            return share if per == "sentences" else 100 - share, signature
        import jiwer

        rate = jiwer.cer if per == "characters" else jiwer.wer
        value = 100 * float(rate(list(references), list(hypotheses)))
        return value, f"{signature}|jiwer:{version('jiwer')}"

    return Metric(unit, per != "exact", scored, scored)


def _overlap(unit: str, name: str) -> Metric:
    """Return the mean F1 of rouge-score over sentences; it folds case and drops non-ASCII signs."""

    def scored(
        hypotheses: Sequence[str], references: Sequence[str], _folds_case: bool
    ) -> tuple[float, str]:
        try:
            scorer_class = import_module("rouge_score.rouge_scorer").RougeScorer
        except ModuleNotFoundError:
            raise ConfigError(
                f"metric {name.lower()}: rouge-score is not installed. Fix: pip install "
                "'vinedresser[rouge]'"
            ) from None
        scorer = scorer_class([name])
        pairs = zip(references, hypotheses, strict=True)
        total = sum(scorer.score(*pair)[name].fmeasure for pair in pairs)
        signature = f"nrefs:1|case:lc|stem:no|tok:ascii|version:{version('rouge-score')}"
        return 100 * total / len(references), signature

    return Metric(unit, False, scored, scored)


METRICS: Mapping[str, Metric] = {
    "bleu": _points("points of BLEU, 0 to 100", "BLEU"),
    "chrf": _points("points of chrF, 0 to 100", "CHRF"),
    "ter": _points("edits and shifts per 100 reference words", "TER", is_lower_better=True),
    "per": _errors("edits per 100 reference phones, which spaces separate", "phones"),
    # On targets of symbols the words are the symbols: `wer` of pronunciations counts phones.
    "wer": _errors("edits per 100 reference words; a symbol counts as a word", "words"),
    "cer": _errors("edits per 100 reference characters", "characters"),
    # What papers on grapheme-to-phoneme conversion call word error rate.
    "ser": _errors("percent of sentences with any error; the WER of pronunciations", "sentences"),
    "exact": _errors("percent of sentences without any error", "exact"),
    "rouge1": _overlap("points of ROUGE-1 F1, 0 to 100; needs the extra `rouge`", "rouge1"),
    "rouge2": _overlap("points of ROUGE-2 F1, 0 to 100; needs the extra `rouge`", "rouge2"),
    "rougel": _overlap("points of ROUGE-L F1, 0 to 100; needs the extra `rouge`", "rougeL"),
}


def metric_name(name: str) -> str:
    """Return the name of a metric.

    Raises:
        ValueError: no such metric; lists the known ones with their units.
    """
    if name not in METRICS:
        known = ", ".join(f"{key} ({metric.unit})" for key, metric in METRICS.items())
        raise ValueError(f"expected one of {known}")
    return name


def is_lower_better(metric: str) -> bool:
    """Return the direction of a metric; a name outside the table grows with quality."""
    return metric in METRICS and METRICS[metric].is_lower_better


def is_better(metric: str, challenger: float, champion: float) -> bool:
    """Return true if the challenger is strictly better; NaN is never better."""
    return challenger < champion if is_lower_better(metric) else challenger > champion


def worst(metric: str) -> float:
    """Return a value that every finite one beats."""
    return float("inf") if is_lower_better(metric) else float("-inf")


def measure(
    metric: str,
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    folds_case: bool = False,
) -> Measured:
    """Return one corpus score with its signature, in the unit of METRICS.

    Args:
        metric: a name of METRICS.
        hypotheses: decoded text.
        references: text of the corpus, in the same order.
        folds_case: capitals and small letters count as equal, for tokenizers without capitals.

    Raises:
        DataError: no sentences, or not as many hypotheses as references; sacreBLEU alone scores
            2 hypotheses against 1 reference as 100.0.
    """
    if len(hypotheses) != len(references) or not references:
        raise DataError(
            f"{len(hypotheses)} hypotheses for {len(references)} references; "
            "score one hypothesis per reference, and at least one"
        )
    value, signature = METRICS[metric].corpus(hypotheses, references, folds_case)
    return Measured(value, f"{metric}|{signature}")


def sentence_scores(
    metric: str,
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    folds_case: bool = False,
) -> list[float]:
    """Return the score of each sentence, for objectives that reward whole outputs.

    The direction is that of `is_lower_better`. BLEU leaves out the orders that a sentence is too
    short for.
    """
    score = METRICS[metric].sentence
    return [
        score([hypothesis], [reference], folds_case)[0]
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
