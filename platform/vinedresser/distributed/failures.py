"""Which failures of a worker group are tried again, and what the user is told in the end.

Ray counts in memory and by number alone: a controller that is started again begins at 0, and 100
deaths in a week of progress are too many for it. Here what counts is progress: deaths without a
new checkpoint in between, kept in the run's folder (fault T22), and hangs at one step (fault T10).
"""

from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.config import FailureConfig

from vinedresser.errors import MachineError, TrainingError, VinedresserError
from vinedresser.training.run import RolledBackError
from vinedresser.training.watchdog import Hang, forget, hangs
from vinedresser.workspace.history import RunHistory
from vinedresser.workspace.layout import RunFolder, checkpoint_step

# Deaths of workers in a row without a new checkpoint: the first may be an accident, the second a
# coincidence.
_DEATHS = 3
# Hangs at one step: a network heals, a deadlock does not.
_HANGS = 2
# Starts of a group that fail or find no room in a minute each.
STARTS = 3
_NO_ROOM = {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}


class NoRoomError(MachineError):
    """The cluster has lost what the group ran on."""


class OwnPolicy(FailurePolicy):
    """Restarts after deaths and hangs while the run gets on; never after an error of ours."""

    def __init__(self, folder: Path, *, starts: int = STARTS) -> None:
        """Args: the run's folder, and how often a group may fail to start."""
        super().__init__(FailureConfig())
        self._folder, self._left = folder, starts

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        """Called by Ray's controller after each failure."""
        return (
            FailureDecision.RETRY if self._again(training_failed_error) else FailureDecision.RAISE
        )

    def _again(self, error: Exception) -> bool:
        failures = _failures(error)
        if any(isinstance(one, RolledBackError) for one in failures):
            return True
        if any(isinstance(one, VinedresserError) for one in failures):
            return False
        if not failures:  # the group did not start
            self._left -= 1
            is_startup = "Startup" in type(getattr(error, "controller_failure", None)).__name__
            return is_startup and self._left > 0
        if _stuck(self._folder) is not None:
            return False
        return _deaths(RunFolder(self._folder)) < _DEATHS


def _failures(error: BaseException) -> list[BaseException]:
    """What the workers raised, or how they died."""
    return list(getattr(error, "worker_failures", {}).values())


def _stuck(folder: Path) -> Hang | None:
    """The hang at whose step the run has hung too often, if there is one."""
    found = hangs(folder)
    for hang in found:
        if sum(other.step == hang.step for other in found) >= _HANGS:
            return hang
    return None


def _deaths(run: RunFolder) -> int:
    """Note a death; return the number of deaths since the newest checkpoint."""
    paths = sorted(run.checkpoints.glob("step-????????"))
    return RunHistory(run.history).add_death(checkpoint_step(paths[-1]) if paths else 0)


def cause(error: Exception, folder: Path) -> VinedresserError:
    """What the user is told when a group is given up; the same command may try once more."""
    failures = _failures(error)
    for one in failures:
        if isinstance(one, VinedresserError):
            return one
    if (hang := _stuck(folder)) is not None:
        told = forget(folder)
        return TrainingError(
            f"{folder.name}: {hang.who} hung at step {hang.step}, {_HANGS} times; the stacks of "
            f"all ranks are in {told}"
        )
    controller: Any = getattr(error, "controller_failure", None)
    if type(controller).__name__ in _NO_ROOM:
        return NoRoomError(
            f"{folder.name}: the cluster has no room for its workers any more; the same command "
            "goes on when it has, or with fewer compute.workers"
        )
    said = str(failures[0] if failures else error).strip() or type(error).__name__
    history = RunHistory(RunFolder(folder).history)
    if deaths := history.take_deaths():
        history.forget_failures()  # of other ranks, by the same deaths
    if len(deaths) >= _DEATHS:
        return TrainingError(
            f"{folder.name}: workers died {len(deaths)} times without a checkpoint after step "
            f"{deaths[-1]}; look into memory and the system's log. Last: {_first_line(said)}"
        )
    return TrainingError(f"{folder.name}: {_first_line(said)}")


def _first_line(said: str) -> str:
    return said.splitlines()[-1 if said.startswith("Traceback") else 0]
