"""Gate: conditions under which a challenger becomes champion, as a function of scores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat

from vinedresser.config import Section
from vinedresser.metrics import PARITY_TOLERANCE, is_lower_better
from vinedresser.significance import PairedBootstrap

StoredScores = Mapping[str, Any]
# Keys that are equal in scores that can be compared.
COMPARED = ("metric", "reference_digest")


class Gate(Section):
    """Conditions under which a challenger replaces the champion."""

    # Split of the scores; `test` unless the task has none.
    split: Literal["test", "dev"] = "test"
    # Points of the metric by which a challenger may be worse. At 0 an equal one is promoted: it
    # is the newer, and often the smaller.
    max_regression: NonNegativeFloat = 0.0
    # Share of the samples of a paired bootstrap in which the challenger must stay within
    # `max_regression`; both models decode the split for it. 0 compares the scores alone.
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class Decision:
    """Decision of the gate.

    Attributes:
        promoted: whether the challenger may become champion.
        reason: why, with the numbers.
        challenger: score of the challenger on the gate's split; None if there is none.
        champion: that of the champion.
    """

    promoted: bool
    reason: str
    challenger: float | None = None
    champion: float | None = None


def _number(scores: StoredScores, gate: Gate) -> float | None:
    """Return the ranking metric on the gate's split; None if it is missing or not finite."""
    split = scores.get(gate.split)
    value = split.get(scores.get("metric")) if isinstance(split, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def are_comparable(challenger: StoredScores, champion: StoredScores) -> bool:
    """Return whether two models were scored by the same metric on the same references."""
    return all(challenger.get(key) == champion.get(key) for key in COMPARED)


def decide(
    challenger: StoredScores,
    champion: StoredScores | None,
    gate: Gate,
    resampled: PairedBootstrap | None = None,
) -> Decision:
    """Decide whether a challenger may become champion, by decoded scores only.

    Args:
        challenger: content of a bundle's `scores.json`.
        champion: that of the present champion; None if there is none.
        gate: split and tolerance.
        resampled: the difference of both in samples of the split, if both have decoded it.
    """
    metric, new = challenger.get("metric"), _number(challenger, gate)
    old = _number(champion, gate) if champion is not None else None

    def refused(reason: str) -> Decision:
        return Decision(False, reason, new, old)

    parity = challenger.get("parity_max_abs")
    if parity is not None and not (isinstance(parity, int | float) and parity <= PARITY_TOLERANCE):
        return refused(
            f"parity {parity} is above {PARITY_TOLERANCE}: not the model that was scored"
        )
    if new is None:
        return refused(f"no finite {gate.split} {metric}; score the bundle again")
    if not challenger.get("reference_digest"):
        return refused("no reference_digest: unknown on what it was scored; score it again")
    if champion is None:
        return Decision(True, f"first champion, {gate.split} {metric} {new:g}", new)
    for key in COMPARED:
        if challenger.get(key) != champion.get(key):
            found, wanted = challenger.get(key), champion.get(key)
            return refused(
                f"{key} is {found}, the champion's is {wanted}; score both on the same set"
            )
    if old is None:
        return refused(f"the champion has no finite {gate.split} {metric}; score it again")
    worse = new - old if is_lower_better(str(metric)) else old - new
    numbers = f"{gate.split} {metric} {new:g} against the champion's {old:g}"
    if resampled is not None:
        low, high = resampled.interval()
        numbers += f" (better by {low:.2f} to {high:.2f} at 95%, paired bootstrap)"
    if worse > gate.max_regression:
        return refused(f"{numbers}, worse by more than {gate.max_regression:g}")
    share = resampled.share(at_least=-gate.max_regression) if resampled is not None else 0.0
    if share < gate.confidence:
        return refused(
            f"{numbers}; within {gate.max_regression:g} in {share:.0%} of the samples, expected "
            f"{gate.confidence:.0%}"
        )
    return Decision(True, numbers, new, old)
