"""Ray Train: a group of N workers, restarted after deaths, ended by errors that would recur."""

import contextlib
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.tune
import torch
from ray.train.torch import TorchConfig
from ray.tune.integration.ray_train import TuneReportCallback

from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.failures import NoRoomError, ProgressPolicy, final_error
from vinedresser.distributed.notices import forwarding_stop, receiving_notices
from vinedresser.distributed.ray_internals import GroupTrainer, group_start_callback
from vinedresser.distributed.relay import GroupListener, logging_to, relaying
from vinedresser.distributed.resources import (
    GROUP,
    START_SECONDS,
    TRIAL_CPUS,
    num_groups,
    require,
    start_seconds,
    worker_resources,
)
from vinedresser.distributed.train import run_worker
from vinedresser.errors import InterruptedRunError, PreemptedError, VinedresserError
from vinedresser.training.listener import Listener
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.stopping import stop_on_sigterm
from vinedresser.workspace.storage import follow_mode

_log = logging.getLogger(__name__)

# Ray's stubs describe the first version of Train; at run time these are the second's classes.
_API: Any = ray.train
_FORWARD: Any = TuneReportCallback


def train_in_group(
    experiment: Experiment, context: RunContext, folder: RunFolder, *, listener: Listener
) -> None:
    """Train with N workers; folders and the tracking store must be shared between nodes.

    Raises:
        MachineError: the cluster has too little for the group, or no longer enough.
        VinedresserError: an error of a worker that would recur.
        TrainingError: workers died or hung too often at one step.
        InterruptedRunError: a stop was requested; there is a checkpoint.
    """
    require(experiment.compute, folder.name)
    while True:
        try:
            if _fit(experiment, context, folder, listener):
                raise InterruptedRunError("stopped on request; run the same command to resume")
        except NoRoomError as error:
            fewer = _with_fewer_workers(experiment)
            if fewer is None:
                raise
            _log.warning("%s. Continuing with %d now", error.args[0], fewer.compute.workers)
            experiment = fewer
        else:
            return


def _with_fewer_workers(experiment: Experiment) -> Experiment | None:
    """Return the same run with as many workers as there is room for, down to min_workers."""
    compute, batches = experiment.compute, experiment.batches_per_update
    for count in range(compute.workers - 1, (compute.min_workers or compute.workers) - 1, -1):
        smaller = compute.model_copy(update={"workers": count})
        if batches % count == 0 and num_groups(smaller):
            return experiment.override({"compute.workers": count, "batch.per_update": batches})
    return None


def _fit(
    experiment: Experiment, context: RunContext, folder: RunFolder, listener: Listener
) -> bool:
    """Train with exactly as many workers as configured; return whether they stopped on request."""
    compute = experiment.compute
    resources = worker_resources(compute)
    gpus = resources.get("GPU", 0.0)
    tune_context = ray.tune.get_context()
    in_trial = tune_context is not None and bool(tune_context.get_trial_id())
    # The trial holds a share of a CPU itself: without room for it the group would wait for ever.
    resources["CPU"] -= TRIAL_CPUS if in_trial else 0.0
    starts = 1 if compute.min_workers else math.ceil(start_seconds(compute) / START_SECONDS)
    # Ray Train's own files, by which it resumes: they start empty, checkpoints are the run's.
    shutil.rmtree(folder.ray_scratch, ignore_errors=True)
    trainer = GroupTrainer(
        work,
        policy=ProgressPolicy(folder, starts=max(starts, 1)),
        # Signals arrive in a worker's main thread, which is Ray's; the run has another one.
        callback=group_start_callback(stop_on_sigterm),
        train_loop_config={
            "experiment": experiment.to_json(),
            "context": context,
            "folder": folder,
        },
        # NCCL refuses two ranks on one GPU.
        torch_config=TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),
        scaling_config=_API.ScalingConfig(
            num_workers=compute.workers,
            use_gpu=gpus > 0,
            resources_per_worker=resources,
            placement_strategy=compute.placement.upper(),
        ),
        run_config=_API.RunConfig(
            name=folder.ray_scratch.name,
            storage_path=str(folder.ray_scratch),
            callbacks=[_FORWARD()] if in_trial else [],
        ),
    )
    try:
        # The command of a sweep sends the request to the workers of its trials itself.
        forwarding = contextlib.nullcontext() if in_trial else forwarding_stop(folder)
        with relaying(folder, listener, reports=not in_trial), forwarding:
            return bool(trainer.fit().return_value)
    except Exception as error:
        if isinstance(error, VinedresserError):
            raise
        raise final_error(error, folder) from error
    finally:
        shutil.rmtree(folder.ray_scratch, ignore_errors=True)


def work(config: Mapping[str, Any]) -> bool:
    """Run one Ray Train worker; return whether it stopped on request.

    Every rank reports equally often: a report is a barrier.
    """
    rank = _API.get_context().get_world_rank()
    group = ray.util.get_current_placement_group()
    group_key = {} if group is None else {GROUP: group.id.hex()}
    folder, context = config["folder"], config["context"]
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    follow_mode(context.workspace.path)
    nodes = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    listener = GroupListener(folder, lambda report: _API.report({**report, **group_key}))
    try:
        with logging_to(folder, rank), receiving_notices(nodes):
            shards = open_shards(context.shards.folder, digest=context.shards.digest)
            experiment = Experiment.from_json(config["experiment"])
            run_worker(
                experiment, replace(context, shards=shards), folder, rank=rank, listener=listener
            )
    except PreemptedError:
        raise  # the policy starts the group again
    except InterruptedRunError:
        return True
    return False
