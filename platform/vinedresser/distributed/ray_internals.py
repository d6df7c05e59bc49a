"""Private classes of Ray Train, in one place, for what has no public way.

A failure policy of one's own, a callback at the start of a worker group, and Ctrl-C that stays
with the command. `make test` names each of them, so that a new version of Ray shows what moved.
"""

import os
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from vinedresser.errors import MachineError

try:
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2.api.config import FailureConfig
except ImportError as error:
    raise MachineError(
        f"ray {ray.__version__} lacks {error.name}, which worker groups need; Fix: install the "
        "version of ray that constraints.txt names"
    ) from error

__all__ = [
    "FailureConfig", "FailureDecision", "FailurePolicy", "GroupTrainer", "WorkerGroupCallback",
    "group_start_callback",
]  # fmt: skip

# Ray's stubs describe the first version of Train; at run time this is the second's class.
_BASE: Any = TorchTrainer
_OVERRIDDEN = (
    "_create_default_callbacks",
    "_register_sigint_handler",
    "_initialize_and_run_controller",
)
_PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_MISSING = [name for name in _OVERRIDDEN if not hasattr(TorchTrainer, name)]
if _MISSING:
    raise MachineError(
        f"ray {ray.__version__}: TorchTrainer has no {', '.join(_MISSING)}, which worker groups "
        "override; Fix: install the version of ray that constraints.txt names"
    )


class GroupTrainer(_BASE):  # type: ignore[misc]
    """Ray's trainer with a failure policy, a start callback, and no handler of Ctrl-C."""

    def __init__(
        self, *args: Any, policy: FailurePolicy, callback: WorkerGroupCallback, **settings: Any
    ) -> None:
        """Args: those of TorchTrainer; the policy; called when a worker group has started."""
        super().__init__(*args, **settings)
        self._policy, self._callback = policy, callback

    def _create_default_callbacks(self) -> list[Any]:
        return [*super()._create_default_callbacks(), self._callback]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C to the command, which stops gracefully; Ray's handler aborts, exit 1."""

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        # Ray's own watcher of announced losses would end the group when the node is gone; ours
        # ends it after a checkpoint (notices.py). Ray copies the variable for the controller only.
        before = os.environ.get(_PREEMPTION_WATCHER)
        os.environ[_PREEMPTION_WATCHER] = "0"
        try:
            return super()._initialize_and_run_controller(
                **{**settings, "failure_policy": self._policy}
            )
        finally:
            os.environ.pop(_PREEMPTION_WATCHER)
            if before is not None:
                os.environ[_PREEMPTION_WATCHER] = before


def group_start_callback(run_on_workers: Any) -> WorkerGroupCallback:
    """Return a callback that runs a function on every worker of a group that has started."""

    class _Started(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
            worker_group.execute(run_on_workers)

    return _Started()
