"""Searcher: Optuna's proposals for Tune, with what became of each trial told truthfully."""

import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from vinedresser.sweep.outcome import OUTCOME, REASON

# An exception in a trial is reported; what Tune alone knows of is the end of its process.
DIED = "its process died; too little memory is the usual reason"


class Searcher(OptunaSearch):
    """OptunaSearch, repaired: stopped trials are PRUNED, NaN and errors are FAIL.

    The stock class tells a stopped trial as COMPLETE with its early score, leaves a NaN trial
    RUNNING for ever and aborts the sweep over a missing metric.
    """

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Tells an intermediate value, unless there is none or it is not finite."""
        if trial_id not in self._completed_trials:
            self._tell_value(trial_id, result)

    def _tell_value(self, trial_id: str, result: Mapping[str, Any]) -> None:
        value = result.get(self.metric) if isinstance(self.metric, str) else None
        if value is not None and math.isfinite(value):
            self._ot_trials[trial_id].report(float(value), int(result["step"]))

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the final state, once; terminal states are final."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        self._completed_trials.add(trial_id)
        trial, result = self._ot_trials[trial_id], result or {}
        metrics = self.metric if isinstance(self.metric, list) else [self.metric]
        values = [float(result.get(metric, math.nan)) for metric in metrics]
        study: Any = self._ot_study
        if error or not all(math.isfinite(value) for value in values):
            missing = DIED if error else f"{metrics[0]} is missing or not finite"
            trial.set_user_attr(REASON, str(result.get(REASON, missing)))
            study.tell(trial, state=TrialState.FAIL)
            return
        kept = {key: result[key] for key in result if isinstance(key, str) and "/" in key}
        trial.set_user_attr(OUTCOME, {k: v for k, v in kept.items() if _is_plain(v)})
        if result.get("is_last"):
            study.tell(trial, values, state=TrialState.COMPLETE)
        else:
            # Optuna takes its value from the last report, and Tune tells that one here only.
            self._tell_value(trial_id, result)
            study.tell(trial, state=TrialState.PRUNED)

    def number_of(self, trial_id: str) -> int:
        """Optuna's number of a Tune trial."""
        return int(self._ot_trials[trial_id].number)


def _is_plain(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, float | int) and math.isfinite(value))
