"""What a sweep leaves: its trials as plain rows, ranked, and their Pareto front."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from vinedresser.metrics import is_lower_better

# User attributes of Optuna trials; a trial that failed reports under the last one.
OUTCOME, ORPHAN, REASON = "outcome", "orphan", "reason"


@dataclass(frozen=True)
class TrialRow:
    """One trial of a sweep.

    Attributes:
        number: Optuna's, 0-based, in the order of proposals.
        state: complete, pruned (stopped early) or fail.
        params: dotted keys -> values.
        value: best inferred score so far, NaN where there is none; with an
            inferred_and_heads objective the last inferred score.
        heads: open heads, for gated trials.
        bundle: folder of the trained model, "" unless complete.
        reason: why it failed.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    value: float
    heads: float | None
    bundle: str
    reason: str = ""


@dataclass(frozen=True)
class SweepOutcome:
    """A finished sweep, trials ranked best first.

    Attributes:
        key: content digest of study and data.
        folder: of the sweep; `journal.log` in it is an Optuna journal.
        metric: name of the trials' value.
        trials: every trial.
        run_id: its tracking run.
    """

    key: str
    folder: str
    metric: str
    trials: list[TrialRow]
    run_id: str

    @property
    def complete(self) -> list[TrialRow]:
        """Trials that ran to their end, best first."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def best(self) -> TrialRow:
        """The complete trial with the best inferred score."""
        return self.complete[0]

    def pareto(self) -> list[TrialRow]:
        """Complete trials that no other beats in both score and heads, by heads."""
        sign = 1 if is_lower_better(self.metric) else -1

        def beaten(t: TrialRow) -> bool:
            point = (sign * t.value, t.heads or 0.0)
            others = [(sign * o.value, o.heads or 0.0) for o in self.complete]
            return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in others)

        front = [trial for trial in self.complete if not beaten(trial)]
        return sorted(front, key=lambda t: (t.heads or 0.0, sign * t.value))


def short_params(params: Mapping[str, Any]) -> str:
    """`probability 0.21, clip_norm 1.3`: the last parts of keys, three digits."""
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in params.items()}
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in shown.items())


def rank(trials: list[FrozenTrial], metric: str) -> list[TrialRow]:
    """Complete trials best first, then the pruned and the failed."""
    rows = [_row(trial) for trial in trials]
    sign = 1 if is_lower_better(metric) else -1
    order = {"complete": 0, "pruned": 1, "fail": 2}
    return sorted(
        rows,
        key=lambda r: (
            order[r.state],
            math.isnan(r.value),
            sign * r.value if r.value == r.value else 0,
        ),
    )


def _row(trial: FrozenTrial) -> TrialRow:
    outcome = trial.user_attrs.get(OUTCOME, {})
    values = trial.values or [trial.value if trial.value is not None else math.nan]
    heads = outcome.get("dev/heads")
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        params=dict(trial.params),
        value=float(values[0]),
        heads=None if heads is None else float(heads),
        bundle=str(outcome.get("run/bundle", "")) if trial.state == TrialState.COMPLETE else "",
        reason=str(trial.user_attrs.get(REASON, "")),
    )
