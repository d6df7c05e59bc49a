"""Record of a sweep: an Optuna journal that is repaired and continued after a killed driver."""

import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from vinedresser.config.study import Study
from vinedresser.sweep.outcome import Direction, TrialRow

_log = logging.getLogger(__name__)

# User attributes of Optuna's trials: the last report of a trial, the error message of a failed one.
OUTCOME, FAILURE = "outcome", "reason"


def repair_journal(path: Path) -> int:
    """Cut a torn last line, which prevents Optuna from opening the journal; return bytes cut."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
            os.fsync(stream.fileno())
    return len(content) - whole


def open_study(path: Path, study: Study, objectives: Mapping[str, Direction]) -> optuna.Study:
    """Open the journal's study; trials that a killed driver left open are proposed again first.

    The caller holds the lease of the sweep's folder: one process writes the journal.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if cut := repair_journal(path):
        _log.warning("%s: cut %d bytes of a torn last line", path, cut)
    # A lock file that is still there belongs to a dead process.
    for left in path.parent.glob(f"{path.name}.*lock*"):
        left.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(path)))
    opened = optuna.create_study(
        storage=storage,
        study_name=study.name,
        directions=["minimize" if way == "min" else "maximize" for way in objectives.values()],
        load_if_exists=True,
    )
    # A continued search must not repeat the random proposals of its beginning.
    seed = study.seed + len(opened.get_trials(deepcopy=False))
    opened.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    for trial in opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        opened.tell(trial.number, state=TrialState.FAIL)
        if FAILURE not in trial.user_attrs:
            opened.enqueue_trial(trial.params, skip_if_exists=False)
    return opened


def ended_trials(study: optuna.Study, objectives: Mapping[str, Direction]) -> list[TrialRow]:
    """Return the trials that used up a part of the budget: those that a driver saw end.

    A trial that failed has a reason; without one it was cut short together with its driver.
    """
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [
        _row(trial, objectives)
        for trial in ended
        if trial.state != TrialState.FAIL or FAILURE in trial.user_attrs
    ]


def _row(trial: FrozenTrial, objectives: Mapping[str, Direction]) -> TrialRow:
    is_complete = trial.state == TrialState.COMPLETE
    values = trial.values or [math.nan] * len(objectives)
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        params=dict(trial.params),
        values=dict(zip(objectives, map(float, values), strict=True)),
        bundle=str(trial.user_attrs[OUTCOME]["run/bundle"]) if is_complete else "",
        reason=str(trial.user_attrs.get(FAILURE, "")),
    )
