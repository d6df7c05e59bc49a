"""Ray Train: a group of N workers, started again after deaths, ended by errors that would recur."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.tune
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.tune.integration.ray_train import TuneReportCallback

from vinedresser.config import Experiment
from vinedresser.distributed.failures import STARTS, NoRoomError, OwnPolicy, cause
from vinedresser.distributed.resources import GROUP, TRIAL_CPUS, is_on_gpus, num_groups, require
from vinedresser.distributed.site import Site
from vinedresser.distributed.telling import FileTell, relaying, write_words
from vinedresser.distributed.worker import execute
from vinedresser.errors import InterruptedRunError, VinedresserError
from vinedresser.training.progress import Tell, untold
from vinedresser.workspace.lease import ask, listen

_log = logging.getLogger("vinedresser")

# Ray's stubs describe the first version of Train; at run time these are the second's classes.
_API: Any = ray.train
_FORWARD: Any = TuneReportCallback
_BASE: Any = TorchTrainer

# Actors of Ray Train that serve nothing here, each a process of 1.1 s of processor time that the
# workers wait for: we pass no datasets, and a placement group that outlives its controller is the
# concern of trials only, elsewhere the driver ends with it. Left out by name: where Ray renames
# them, they are started again.
_IDLE = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


class _Listening(WorkerGroupCallback):
    """SIGTERM to a worker asks the run to stop: its main thread is Ray's, the run has another."""

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Called by Ray's controller before training begins."""
        worker_group.execute(listen)


class _OneMachine(FixedScalingPolicy):
    """Asks no autoscaler for what is here: workers would wait for its actor, 1.1 s of processor."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for nothing."""

    def _maybe_send_resource_request(self) -> None:
        pass


class _Trainer(_BASE):  # type: ignore[misc]
    """Ray's, with our own judgement of failures and without its idle actors."""

    def __init__(self, *args: Any, policy: OwnPolicy, in_trial: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._policy, self._in_trial = policy, in_trial

    def _create_default_callbacks(self) -> list[Any]:
        made: list[Any] = super()._create_default_callbacks()
        if not self._in_trial:
            made = [one for one in made if type(one).__name__ not in _IDLE]
        return [*made, _Listening()]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to the command, which stops politely; Ray's handler aborts and exits 1."""

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        own: dict[str, Any] = {"failure_policy": self._policy}
        if not self._in_trial and _is_one_machine():
            own["scaling_policy"] = _OneMachine(self.scaling_config)
        return super()._initialize_and_run_controller(**{**settings, **own})


def _is_one_machine() -> bool:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return len([node for node in nodes if node["Alive"]]) == 1


def train_in_group(
    experiment: Experiment, site: Site, folder: Path, *, tell: Tell = untold
) -> None:
    """Trains with N workers; folders and the tracking store must be shared between nodes.

    Raises:
        MachineError: the cluster has too little for the group, or no longer enough.
        VinedresserError: what a worker raised that would come again.
        TrainingError: workers died or hung too often at one step.
    """
    require(experiment.compute, folder.name)
    while True:
        try:
            return _train(experiment, site, folder, tell)
        except NoRoomError as error:
            fewer = _fewer(experiment)
            if fewer is None:
                raise
            _log.warning("%s. Going on with %d now", error.args[0], fewer.compute.workers)
            experiment = fewer


def _fewer(experiment: Experiment) -> Experiment | None:
    """The same run with as many workers as there is room for now, if it may have so few."""
    compute, batches = experiment.compute, experiment.batches_an_update
    for count in range(compute.workers - 1, (compute.min_workers or compute.workers) - 1, -1):
        smaller = compute.model_copy(update={"workers": count})
        if batches % count == 0 and num_groups(smaller):
            return experiment.override({"compute.workers": count, "batch.per_update": batches})
    return None


def _train(experiment: Experiment, site: Site, folder: Path, tell: Tell) -> None:
    compute = experiment.compute
    is_cuda = is_on_gpus(compute)
    context = ray.tune.get_context()
    in_trial = context is not None and bool(context.get_trial_id())
    # The trial holds a share of a CPU itself: without room for it the group would wait for ever.
    threads = compute.threads - (TRIAL_CPUS if in_trial else 0.0)
    resources = {"CPU": threads} | ({"GPU": 1.0} if is_cuda else {})
    # Ray Train's own notes, which resume by name: ours start empty, the checkpoints are ours too.
    scratch = folder / "group"
    shutil.rmtree(scratch, ignore_errors=True)
    config = {
        "experiment": experiment.to_json(),
        "site": site,
        "folder": str(folder),
        "tells": tell is not untold,
    }
    trainer = _Trainer(
        work,
        policy=OwnPolicy(folder, starts=1 if compute.min_workers else STARTS),
        in_trial=in_trial,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if is_cuda else "gloo"),
        scaling_config=_API.ScalingConfig(
            num_workers=compute.workers, use_gpu=is_cuda, resources_per_worker=resources
        ),
        run_config=_API.RunConfig(
            name="group",
            storage_path=str(scratch),
            callbacks=[_FORWARD()] if in_trial else [],
        ),
    )
    try:
        with _lean(), relaying(folder, tell):
            trainer.fit()
    except VinedresserError:
        raise
    except Exception as error:
        raise cause(error, folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """Without the watcher of preempted nodes on a cluster that is one machine, unless told so."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    if name in os.environ or not _is_one_machine():
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def work(config: Mapping[str, Any]) -> None:
    """What each Ray Train worker runs. Every rank reports equally often: it is a barrier."""
    rank = _API.get_context().get_world_rank()
    group = ray.util.get_current_placement_group()
    mine = {} if group is None else {GROUP: group.id.hex()}
    folder = Path(config["folder"])
    write_words(folder, rank)
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        execute(
            Experiment.from_json(config["experiment"]),
            config["site"],
            folder=folder,
            rank=rank,
            report=lambda metrics: _API.report({**metrics, **mine}),
            tell=FileTell(folder) if config["tells"] and rank == 0 else untold,
        )
    except InterruptedRunError:
        # A group that was told to stop ends well, or Ray would start it anew; the driver sees why.
        ask(folder)
