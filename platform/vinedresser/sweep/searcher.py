"""Searcher: Optuna's proposals for Ray Tune, and the true end of each trial for Optuna."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from ray import tune

from vinedresser.sweep.journal import FAILURE, OUTCOME

# A trial reports its own exceptions; Tune alone sees the end of its process.
DIED = "its process died; too little memory is the usual reason"
# Between two looks at the size of the cluster; Tune asks for proposals several times per second.
_ROOM_SECONDS = 1.0


class Searcher(tune.search.Searcher):
    """Optuna behind Tune's public interface for searchers.

    Ray 2.60 has OptunaSearch, which is not enough: a trial that was stopped early is recorded as
    COMPLETE with its early score, a trial with NaN stays RUNNING for ever, a missing metric
    ends the sweep, and finished trials are repeated when its storage outlives the process.

    A proposal is {"number": Optuna's number, "params": dotted keys -> values}.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Mapping[str, BaseDistribution],
        keys: list[str],
        room: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """Propose values of a space.

        Args:
            study: the record of proposals and ends.
            space: distributions of the values.
            keys: names of the objectives in the reports of trials.
            room: returns how many trials may be open at a time, on the cluster as it is now.
        """
        super().__init__()
        self._study, self._space, self._keys = study, dict(space), keys
        self._open: dict[str, optuna.Trial] = {}
        self._find_room, self._room, self._room_from = room, 0.0, -math.inf

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next proposal; None while the cluster has no room for another trial."""
        now = time.monotonic()
        if now - self._room_from > _ROOM_SECONDS:
            self._room, self._room_from = self._find_room(), now
        if len(self._open) >= self._room:
            return None
        trial = self._open[trial_id] = self._study.ask(fixed_distributions=self._space)
        return {"number": trial.number, "params": trial.params}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Record an intermediate value, if it is finite and the study has one objective."""
        value = result.get(self._keys[0])
        is_known = trial_id in self._open and value is not None and math.isfinite(value)
        if is_known and len(self._keys) == 1:
            self._open[trial_id].report(float(result[self._keys[0]]), int(result["step"]))

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the final state, once: COMPLETE after the last step, PRUNED before it, or FAIL."""
        if trial_id not in self._open:
            return
        trial, result = self._open[trial_id], result or {}
        values = [float(result.get(key, math.nan)) for key in self._keys]
        missing = [k for k, v in zip(self._keys, values, strict=True) if not math.isfinite(v)]
        if error or missing:
            reason = DIED if error else f"{', '.join(missing)} missing or not finite"
            trial.set_user_attr(FAILURE, str(result.get(FAILURE, reason)))
            self._study.tell(trial, state=TrialState.FAIL)
        elif result.get("is_last"):
            trial.set_user_attr(OUTCOME, _plain(result))
            self._study.tell(trial, values, state=TrialState.COMPLETE)
        else:
            # Optuna takes the value of its last report, which Tune passes on here only.
            self.on_trial_result(trial_id, result)
            trial.set_user_attr(OUTCOME, _plain(result))
            self._study.tell(trial, state=TrialState.PRUNED)
        del self._open[trial_id]


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics and paths of a report: what JSON can hold of the keys with a slash."""
    return {
        key: value
        for key, value in result.items()
        if "/" in str(key) and (isinstance(value, str) or math.isfinite(value))
    }
