"""Gate: conditions under which a challenger becomes champion, as a function of scores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import NonNegativeFloat

from vinedresser.config import Section
from vinedresser.metrics import PARITY_TOLERANCE, is_lower_better

StoredScores = Mapping[str, Any]


class Gate(Section):
    """Conditions under which a challenger replaces the champion."""

    # Split of the scores; `test` unless the task has none.
    split: Literal["test", "dev"] = "test"
    # Points of the metric by which a challenger may be worse. At 0 an equal one is promoted: it
    # is the newer, and often the smaller.
    max_regression: NonNegativeFloat = 0.0


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


def decide(challenger: StoredScores, champion: StoredScores | None, gate: Gate) -> Decision:
    """Decide whether a challenger may become champion, by decoded scores only.

    Args:
        challenger: content of a bundle's `scores.json`.
        champion: that of the present champion; None if there is none.
        gate: split and tolerance.
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
    for key in ("metric", "reference_digest"):
        if challenger.get(key) != champion.get(key):
            found, wanted = challenger.get(key), champion.get(key)
            return refused(
                f"{key} is {found}, the champion's is {wanted}; score both on the same set"
            )
    if old is None:
        return refused(f"the champion has no finite {gate.split} {metric}; score it again")
    worse = new - old if is_lower_better(str(metric)) else old - new
    numbers = f"{gate.split} {metric} {new:g} against the champion's {old:g}"
    if worse > gate.max_regression:
        return refused(f"{numbers}, worse by more than {gate.max_regression:g}")
    return Decision(True, numbers, new, old)
