"""Breakdown of an evaluation: errors by target position and by length, and the worst sentences.

Each function returns columns of equal length, for a table of the tracking store.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vinedresser.evaluate import Evaluated
from vinedresser.metrics import is_lower_better, measure, sentence_scores

Columns = Mapping[str, Sequence[object]]
# Positions or tokens per row, as in the buckets of methods.md 23.
_WIDTH = 5


def by_position(evaluated: Evaluated) -> Columns:
    """Return teacher-forced and decoded errors per 100 reference tokens by position, EOS included.

    Decoded errors are the edits of an alignment, each at its reference token; an insertion counts
    at the token that follows it. Teacher-forced errors stay level over the positions; decoded ones
    rise where errors accumulate (methods.md 5).
    """
    import jiwer

    size = max(len(target) for target in evaluated.targets)
    tokens, forced, decoded = (np.zeros(size) for _ in range(3))
    for target, is_wrong in zip(evaluated.targets, evaluated.is_wrong, strict=True):
        tokens[: len(target)] += 1
        forced[: len(target)] += is_wrong
    aligned = jiwer.process_words(
        [" ".join(map(str, ids)) for ids in evaluated.targets],
        [" ".join(map(str, ids)) for ids in evaluated.outputs],
    )
    for target, chunks in zip(evaluated.targets, aligned.alignments, strict=True):
        for chunk in chunks:
            if chunk.type == "insert":
                at = min(chunk.ref_start_idx, len(target) - 1)
                decoded[at] += chunk.hyp_end_idx - chunk.hyp_start_idx
            elif chunk.type != "equal":
                decoded[chunk.ref_start_idx : chunk.ref_end_idx] += 1
    starts = np.arange(0, size, _WIDTH)
    tokens, forced, decoded = (np.add.reduceat(each, starts) for each in (tokens, forced, decoded))
    return {
        "position": [f"{start + 1}-{start + _WIDTH}" for start in starts.tolist()],
        "tokens": tokens.astype(int).tolist(),
        "teacher_forced_error": (100 * forced / tokens).tolist(),
        "decoded_error": (100 * decoded / tokens).tolist(),
    }


def by_length(evaluated: Evaluated) -> Columns:
    """Return the metric and the length ratio by tokens of the reference, EOS included."""
    metric, folds = evaluated.scores.metric, evaluated.folds_case
    classes: dict[int, list[int]] = {}
    for i, target in enumerate(evaluated.targets):
        classes.setdefault((len(target) - 1) // _WIDTH, []).append(i)
    columns: dict[str, list[object]] = {
        name: [] for name in ("tokens", "sentences", metric, "length_ratio")
    }
    for number, rows in sorted(classes.items()):
        hypotheses, references = (
            [texts[i] for i in rows] for texts in (evaluated.hypotheses, evaluated.references)
        )
        columns["tokens"].append(f"{number * _WIDTH + 1}-{(number + 1) * _WIDTH}")
        columns["sentences"].append(len(rows))
        measured = measure(metric, hypotheses, references, folds_case=folds)
        columns[metric].append(measured.value)
        lengths = (sum(len(ids[i]) for i in rows) for ids in (evaluated.outputs, evaluated.targets))
        columns["length_ratio"].append(next(lengths) / next(lengths))
    return columns


def sentences(evaluated: Evaluated, *, worst: int = 0) -> Columns:
    """Return source, reference, hypothesis and score of each sentence, or of the worst ones."""
    metric, folds = evaluated.scores.metric, evaluated.folds_case
    scores = sentence_scores(metric, evaluated.hypotheses, evaluated.references, folds_case=folds)
    order = list(range(len(scores)))
    if worst:
        sign = -1 if is_lower_better(metric) else 1
        order = sorted(order, key=lambda i: sign * scores[i])[:worst]
    return {
        "source": [evaluated.sources[i] for i in order],
        "reference": [evaluated.references[i] for i in order],
        "hypothesis": [evaluated.hypotheses[i] for i in order],
        metric: [scores[i] for i in order],
    }
