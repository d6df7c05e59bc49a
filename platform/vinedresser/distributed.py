"""One experiment on N workers -> Outcome. N = 1 runs in this process, without a worker group."""

import contextlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vinedresser.attempt import held, stopping_politely, was_asked
from vinedresser.config import Compute, Experiment
from vinedresser.data.shards.shard_set import open_shards
from vinedresser.diagnostics.corpus import picture
from vinedresser.errors import (
    InterruptedRunError,
    MachineError,
    TrainingError,
    VinedresserError,
)
from vinedresser.run import (
    Outcome,
    Report,
    RolledBackError,
    Run,
    clear,
    finished,
    run_folder,
    tell_changes,
)
from vinedresser.tracking import NullTracker, Store, Tracker, ending, open_run
from vinedresser.train import place

_log = logging.getLogger("vinedresser")

# What a trial of several workers takes while it waits for them; Tune refuses 0.
TRIAL_CPUS = 0.01
# Under this key a worker reports its placement group.
_GROUP = "placement_group"


@dataclass(frozen=True)
class Site:
    """Where runs of a command read, write and report; travels to every worker.

    Attributes:
        shards: folder of the task's shard set.
        workspace: folder of runs, sweeps and the tracking database.
        store: tracking store.
        parent: tracking run that new runs hang under, None for none.
        kind: what a run is called in the tracking store: trial, train or prune.
    """

    shards: str
    workspace: str
    store: Store
    parent: str | None = None
    kind: str = "train"


def train(
    experiment: Experiment, site: Site, *, report: Report, from_scratch: bool = False
) -> Outcome:
    """Trains to the end, or recognises that it was done.

    The same loop runs in two hosts: in place for one worker, which starts in a fraction of the
    time, else in a Ray Train worker group. `report` is called in this process either way, except
    inside a Tune trial of several workers, where Ray Train forwards to Tune.

    Args:
        experiment: what to train.
        site: where.
        report: takes what a scheduler is told.
        from_scratch: forget what the run's folder holds.

    Raises:
        TrainingError: the run diverged, or workers failed more often than allowed.
        MachineError: a device, memory or the disk is in the way.
        BusyError: another command trains this very run; a trial waits for it instead.
        InterruptedRunError: SIGTERM; there is a checkpoint of the last update.
    """
    shards = open_shards(Path(site.shards), task=experiment.task)
    folder = run_folder(experiment, shards, Path(site.workspace))
    outcome = finished(folder)
    if outcome is not None and not from_scratch:
        report(outcome.final_report)
        return outcome
    with held(folder, wait=site.kind != "train"), stopping_politely(folder):
        if from_scratch:
            clear(folder)
        if site.kind == "train":
            tell_changes(experiment, folder)
        outcome = finished(folder)  # by whom this one has waited for
        if outcome is not None:
            report(outcome.final_report)
        elif experiment.compute.workers == 1:
            outcome = execute(experiment, site, folder=folder, rank=0, report=report)
        else:
            _train_in_group(experiment, site, folder)
            outcome = finished(folder)
            if outcome is None and was_asked(folder):
                raise InterruptedRunError("told to stop; the same command goes on from there")
    if outcome is None:
        raise TrainingError(f"{folder.name} ended without an outcome; see its run for the reason")
    return outcome


def execute(
    experiment: Experiment, site: Site, *, folder: Path, rank: int, report: Report
) -> Outcome | None:
    """One worker of a run, with its tracking run opened and closed around it, on rank 0 only."""
    shards = open_shards(Path(site.shards), task=experiment.task)
    where = place(experiment.compute, rank=rank)
    tracker = _open(experiment, site, folder) if rank == 0 else NullTracker()
    with ending(tracker):
        while True:
            run = Run(experiment, shards, folder, place=where, tracker=tracker, report=report)
            try:
                outcome = run.execute()
                break
            except RolledBackError as error:
                if where.workers > 1:  # the group starts anew, all ranks together
                    raise
                _log.warning("%s", error.args[0])
        if site.kind == "train" and rank == 0:  # trials of a search share one corpus
            picture(tracker, shards)
    # Every rank reports equally often; a scheduler may end the process at this last report.
    report(outcome.final_report if outcome is not None else {})
    return outcome


def _open(experiment: Experiment, site: Site, folder: Path) -> Tracker:
    return open_run(
        site.store,
        key=folder.name.rsplit("-", 1)[1],
        name=folder.name,
        parent=site.parent,
        params=experiment.to_json(),
        tags={
            "vinedresser.kind": site.kind,
            "vinedresser.metric": experiment.task.metric,
            "vinedresser.folder": str(folder),
            "vinedresser.task": experiment.task.name,
            "vinedresser.model": type(experiment.model).__module__,
        },
    )


def _train_in_group(experiment: Experiment, site: Site, folder: Path) -> None:
    """Ray Train with N workers; folders and the tracking store must be shared between nodes."""
    import ray.train
    import ray.tune
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    # Ray's stubs describe the first version of Train; at run time these are the second's classes.
    api: Any = ray.train
    forward: Any = TuneReportCallback

    compute = experiment.compute
    require(compute, folder.name)
    is_cuda = compute.device == "cuda" or (
        compute.device == "auto" and bool(_cluster().get("GPU", 0))
    )
    in_trial = ray.tune.get_context() is not None and bool(ray.tune.get_context().get_trial_id())
    # The trial holds a share of a CPU itself: without room for it the group would wait for ever.
    threads = compute.threads - (TRIAL_CPUS if in_trial else 0.0)
    resources = {"CPU": threads} | ({"GPU": 1.0} if is_cuda else {})
    # Ray Train's own notes, which resume by name: ours start empty, the checkpoints are ours too.
    scratch = folder / "group"
    shutil.rmtree(scratch, ignore_errors=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "experiment": experiment.to_json(), "site": site, "folder": str(folder)
        },
        torch_config=TorchConfig(backend="nccl" if is_cuda else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=compute.workers, use_gpu=is_cuda, resources_per_worker=resources
        ),
        run_config=api.RunConfig(
            name="group",
            storage_path=str(scratch),
            callbacks=[forward()] if in_trial else [],
            # A finite limit: the default of -1 retries a group that cannot start for ever.
            failure_config=api.FailureConfig(max_failures=2, controller_failure_limit=3),
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    except VinedresserError:
        raise
    except Exception as error:
        raise TrainingError(f"{folder.name}: {_cause(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cluster() -> dict[str, float]:
    """All resources of the connected cluster."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def require(compute: Compute, what: str) -> None:
    """Fails at once where Ray would wait for resources that never come (fault C10).

    Raises:
        MachineError: the cluster has less in all than one `what` asks for.
    """
    have, wanted = _cluster(), _wanted(compute)
    for name, count in wanted.items():
        if count > have.get(name, 0):
            raise MachineError(
                f"{what} wants {count} {name}, the cluster has {have.get(name, 0):g} in all; "
                "lower compute.workers or compute.threads, or name a larger cluster"
            )


def num_groups(compute: Compute) -> int:
    """How many worker groups the connected cluster holds at a time."""
    have = _cluster()
    return min(int(have.get(name, 0) // count) for name, count in _wanted(compute).items())


def _wanted(compute: Compute) -> dict[str, int]:
    wanted = {"CPU": compute.workers * compute.threads}
    return wanted | ({"GPU": compute.workers} if compute.device == "cuda" else {})


def _cause(error: BaseException) -> str:
    """The first line of the innermost reason that Ray gives."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return str(next(iter(failures.values()))).strip().splitlines()[-1]
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _worker(config: Mapping[str, Any]) -> None:
    """What each Ray Train worker runs. Every rank reports equally often: it is a barrier."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    group = ray.util.get_current_placement_group()
    mine = {} if group is None else {_GROUP: group.id.hex()}
    # A group that was told to stop ends well: Ray starts one anew that fails.
    with contextlib.suppress(InterruptedRunError):
        execute(
            Experiment.from_json(config["experiment"]),
            config["site"],
            folder=Path(config["folder"]),
            rank=rank,
            report=lambda metrics: ray.train.report({**metrics, **mine}),
        )


def release_group(report: Mapping[str, Any]) -> None:
    """Removes the placement group that a report of `_worker` came from, if it is still there."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if _GROUP in report:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(report[_GROUP])))
