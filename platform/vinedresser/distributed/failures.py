"""Failures of a worker group: which ones are retried, and the error of the last one.

Ray counts in memory and by number alone: a controller that is restarted begins at 0, and 100
deaths in a week of progress are too many for it. Here progress counts: deaths without a new
checkpoint in between, kept in the run's folder, and hangs at one step.
"""

from typing import Any

from vinedresser.distributed.ray_internals import FailureConfig, FailureDecision, FailurePolicy
from vinedresser.errors import MachineError, PreemptedError, TrainingError, VinedresserError
from vinedresser.training.run import RolledBackError
from vinedresser.training.watchdog import Hang, archive_hangs, hangs
from vinedresser.workspace.history import RunHistory
from vinedresser.workspace.layout import RunFolder, checkpoint_step

# Deaths of workers in a row without a new checkpoint: the first may be an accident, the second a
# coincidence.
MAX_DEATHS = 3
# Hangs at one step: a network recovers, a deadlock does not.
_HANGS = 2
# Starts of a group that fail or find no room in a minute each.
_STARTS = 3
_NO_ROOM = {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}


class NoRoomError(MachineError):
    """The cluster has no room left for the worker group."""


class ProgressPolicy(FailurePolicy):
    """Retry after deaths and hangs while the run makes progress; never after a VinedresserError."""

    def __init__(self, folder: RunFolder, *, starts: int = _STARTS) -> None:
        """Args: the run's folder, and how often a group may fail to start."""
        super().__init__(FailureConfig())
        self._folder, self._starts_left = folder, starts

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        """Return Ray's decision after a failure; called by Ray's controller."""
        failures = _failures(training_failed_error)
        if any(isinstance(one, RolledBackError | PreemptedError) for one in failures):
            return FailureDecision.RETRY
        if any(getattr(one, "preempted", False) for one in failures):  # no time for a checkpoint
            return FailureDecision.RETRY
        if any(isinstance(one, VinedresserError) for one in failures):
            return FailureDecision.RAISE
        if not failures:  # the group did not start
            self._starts_left -= 1
            kind = type(getattr(training_failed_error, "controller_failure", None)).__name__
            is_retried = "Startup" in kind and self._starts_left > 0
        elif _repeated_hang(self._folder) is not None:
            is_retried = False
        else:
            is_retried = add_death(self._folder) < MAX_DEATHS
        return FailureDecision.RETRY if is_retried else FailureDecision.RAISE


def newest_step(folder: RunFolder) -> int:
    """Return the step of a run's newest checkpoint, 0 without one."""
    return max(map(checkpoint_step, folder.checkpoints.glob("step-????????")), default=0)


def add_death(folder: RunFolder) -> int:
    """Note that a process of the run died; return the deaths since its newest checkpoint."""
    folder.path.mkdir(parents=True, exist_ok=True)
    return RunHistory(folder.history).add_death(newest_step(folder))


def refuse_repeated_deaths(folder: RunFolder) -> None:
    """Refuse to start a run that died too often without a new checkpoint; resets the count.

    Raises:
        TrainingError: where it died.
    """
    history, newest = RunHistory(folder.history), newest_step(folder)
    if sum(step == newest for step in history.deaths) >= MAX_DEATHS:
        deaths = history.take_deaths()
        raise TrainingError(
            f"its process died {len(deaths)} times without a checkpoint after step {newest}; too "
            "little memory is the usual reason"
        )


def _failures(error: BaseException) -> list[BaseException]:
    """Return the errors of the workers, or how they died."""
    return list(getattr(error, "worker_failures", {}).values())


def _repeated_hang(folder: RunFolder) -> Hang | None:
    """Return the hang at whose step the run has hung too often, if there is one."""
    found = hangs(folder.hangs)
    for hang in found:
        if sum(other.step == hang.step for other in found) >= _HANGS:
            return hang
    return None


def final_error(error: Exception, folder: RunFolder) -> VinedresserError:
    """Return the error that the user sees when a group is given up; resets the counters."""
    failures = _failures(error)
    for one in failures:
        if isinstance(one, VinedresserError):
            return one
    if (hang := _repeated_hang(folder)) is not None:
        return TrainingError(
            f"{folder.name}: {hang.text} hung at step {hang.step}, {_HANGS} times; the stacks of "
            f"all ranks are in {archive_hangs(folder.hangs)}"
        )
    controller: Any = getattr(error, "controller_failure", None)
    if type(controller).__name__ in _NO_ROOM:
        return NoRoomError(
            f"{folder.name}: the cluster has no room for its workers any more; run the same "
            "command when it has, or with fewer compute.workers"
        )
    cause = failures[0] if failures else controller or error
    text = str(cause).strip() or type(cause).__name__
    line = text.splitlines()[-1 if text.startswith("Traceback") else 0]
    if cause is controller:  # Ray's own text is "Training failed due to controller error:"
        line = f"{type(controller).__name__}: {line}"
    history = RunHistory(folder.history)
    if deaths := history.take_deaths():
        history.forget_failures()  # of other ranks, by the same deaths
    if len(deaths) >= MAX_DEATHS:
        return TrainingError(
            f"{folder.name}: workers died {len(deaths)} times without a checkpoint after step "
            f"{deaths[-1]}; check memory and the system's log. Last: {line}"
        )
    return TrainingError(f"{folder.name}: {line}")
