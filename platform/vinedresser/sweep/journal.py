"""The record of a sweep: Optuna's journal, mended and continued after a killed driver."""

import logging
import os
import warnings
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from vinedresser.config.study import Study
from vinedresser.metrics import is_lower_better
from vinedresser.sweep.outcome import ORPHAN

_log = logging.getLogger("vinedresser")

_DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def mend_journal(path: Path) -> int:
    """Cuts a torn last line, with which Optuna could never open the journal again.

    Returns:
        Bytes cut off.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
            os.fsync(stream.fileno())
    return len(content) - whole


def open_study(folder: Path, study: Study, metric: str) -> tuple[JournalStorage, optuna.Study]:
    """The journal's study, with the trials of a killed driver marked and proposed again."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "journal.log"
    if cut := mend_journal(path):
        _log.warning("%s: cut %d bytes of a torn last line", path, cut)
    # We hold the folder's lock, so a lock file that is still there belongs to a dead process.
    for left in folder.glob("journal.log.*lock*"):
        left.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(path)))
    lower, higher = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
    direction = lower if is_lower_better(metric) else higher
    directions = [direction, lower] if has_two(study) else [direction]
    opened = optuna.create_study(
        storage=storage, study_name=study.name, directions=directions, load_if_exists=True
    )
    for trial in opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        storage.set_trial_user_attr(trial._trial_id, ORPHAN, True)
        opened.tell(trial.number, state=TrialState.FAIL)
        opened.enqueue_trial(trial.params, skip_if_exists=False)
    return storage, opened


def has_two(study: Study) -> bool:
    """Whether a study looks for a front of score and heads."""
    return study.objective == "inferred_and_heads"


def counted(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that used up a part of the budget: ended, and not cut short with their driver."""
    return [t for t in trials if t.state in _DONE and not t.user_attrs.get(ORPHAN)]
