"""Two gloo workers of Ray Train against one process that sees what both of them see."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.short_run import Reports, folder_of
from vinedresser import tracking
from vinedresser.bundle import load_bundle, vocabulary_of
from vinedresser.config import Compute, Experiment
from vinedresser.config.study import Study
from vinedresser.data.batching.reader import stream
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.distributed import resources
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.notices import RayStop, receiving_notices
from vinedresser.distributed.resources import (
    num_groups,
    num_groups_to_come,
    require,
    worker_resources,
)
from vinedresser.distributed.train import train
from vinedresser.errors import InterruptedRunError, MachineError, TrainingError
from vinedresser.objective import Objective, target_nll
from vinedresser.sweep import sweep
from vinedresser.training.device import seed_step
from vinedresser.training.listener import Listener, Progress
from vinedresser.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from vinedresser.training.outcome import Outcome, finished
from vinedresser.workspace.layout import RunFolder, Workspace
from vinedresser.workspace.stopping import StopRequest

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _no_user_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def experiment(tiny_study: dict[str, Any]) -> Experiment:
    """Two workers, no dropout, fp32; the last weights ship, unaveraged."""
    changes = {
        "compute.workers": 2,
        "optim.ema_decay": 0,
        "steps": 6,
        "evaluation.num_evaluations": 1,
    }
    return Experiment.from_json(tiny_study["base"]).override({**changes, "optim.warmup_steps": 2})


class Seen(Listener):
    """Keeps the progress of a run."""

    def __init__(self) -> None:
        self.all: list[Progress] = []

    def progress(self, progress: Progress) -> None:
        self.all.append(progress)


def site_of(workspace: Path, shards: ShardSet) -> RunContext:
    store = tracking.store_for(workspace, "reversal")
    return RunContext(shards, Workspace(workspace), store)


def weights(outcome: Outcome) -> Mapping[str, torch.Tensor]:
    return load_bundle(Path(outcome.bundle)).model.state_dict()


def reference(experiment: Experiment, shards: ShardSet) -> Mapping[str, torch.Tensor]:
    """What one process reaches that weighs every token of both ranks' batches alike."""
    seed_step(experiment.seed, 0, 0)
    model = experiment.model.build(
        vocabulary_of(*tokenizers(shards), joint=shards.task.has_joint_vocabulary)
    )
    objective = Objective(experiment.objective, model)
    optimizer = build_optimizer(objective, experiment.optim)
    ranks = [
        stream(shards, experiment.batch, seed=experiment.seed, rank=rank, of=2) for rank in (0, 1)
    ]
    for step in range(1, experiment.steps + 1):
        batches = [next(rank) for rank in ranks]
        tokens = sum(int(batch.tokens) for batch in batches)
        optimizer.zero_grad()
        for batch in batches:
            memory = model.encode(batch.source_BS, batch.source_lengths_B)
            states_BTD = model.decode(memory, batch.inputs_BT)
            (target_nll(model, states_BTD, batch, label_smoothing=0.0).total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), experiment.optim.clip_norm)
        rate = learning_rate(experiment.optim, step=step, steps=experiment.steps)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_two_workers_take_the_steps_of_one_that_sees_both_batches(
    experiment: Experiment, reversal: ShardSet, tmp_path: Path
) -> None:
    site = site_of(tmp_path, reversal)
    seen = Seen()
    outcome = train(experiment, site, listener=seen)
    stood = seen.all
    assert outcome.best_step == 6
    assert stood
    assert [one.step for one in stood] == sorted(one.step for one in stood)
    assert all(one.steps == 6 and one.epoch > 0 for one in stood if one.step)
    expected = reference(experiment, reversal)
    for name, found in weights(outcome).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=0, msg=name)
    assert not (Path(outcome.folder) / "group").exists()
    (run,) = tracking.leaderboard(site.store)
    assert (run.state, run.kind) == ("FINISHED", "train")
    # The same again is recognised, without workers, and reported as a whole.
    told: list[Mapping[str, Any]] = []
    assert train(experiment, site, listener=Reports(told.append)) == outcome
    assert [(one["is_last"], one["run/bundle"]) for one in told] == [(1.0, outcome.bundle)]


# Faults (T05 ... of the table in tests/test_faults.py). Each run that was hurt ends in the very
# bits of the one that was not.


@pytest.fixture
def long(experiment: Experiment) -> Experiment:
    """Steps slow enough for a fault to come between the first checkpoint and the last."""
    bigger = {
        "model.d_model": 64,
        "model.d_ff": 256,
        "batch.max_padded_tokens": 512,
        "optim.lr": 1e-3,
    }
    dropout = {"model.dropout": 0.1, "batch.per_update": 2, "evaluation.num_evaluations": 2}
    return experiment.override({**bigger, **dropout, "steps": 60, "checkpoint_every": 4})


_WHOLE: dict[str, Outcome] = {}


@pytest.fixture
def whole(
    long: Experiment, reversal: ShardSet, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """The run that nothing happened to, trained once."""
    if "whole" not in _WHOLE:
        site = site_of(tmp_path_factory.mktemp("whole"), reversal)
        _WHOLE["whole"] = train(long, site)
    return _WHOLE["whole"]


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.history == expected.history
    other = weights(expected)
    for name, tensor in weights(found).items():
        assert torch.equal(tensor, other[name]), name


def assert_close(found: Outcome, expected: Outcome) -> None:
    """Equal within the rounding of another order of sums."""
    for one, other in zip(found.history, expected.history, strict=True):
        assert one["teacher_forced_loss"] == pytest.approx(other["teacher_forced_loss"], abs=1e-5)


def worker_pids() -> list[int]:
    """Training workers of this process's Ray."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def newest_step(folder: Path) -> int:
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-????????"))
    return int(names[-1].removeprefix("step-")) if names else 0


@contextlib.contextmanager
def meanwhile(folder: Path, act: Callable[[], None], *, after: int = 1) -> Iterator[list[int]]:
    """Acts once a checkpoint of at least that step is there; holds the step when it did."""
    acted: list[int] = []
    ended = threading.Event()

    def wait() -> None:
        while not ended.wait(0.01):
            if (step := newest_step(folder)) >= after:
                acted.append(step)
                act()
                ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield acted
    finally:
        ended.set()
        thread.join()


@pytest.mark.fault("T05")
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_t05_a_killed_worker_costs_time_and_nothing_else(
    long: Experiment, whole: Outcome, reversal: ShardSet, tmp_path: Path
) -> None:
    site = site_of(tmp_path, reversal)
    folder = folder_of(long, reversal, tmp_path).path
    with meanwhile(folder, lambda: os.kill(worker_pids()[-1], signal.SIGKILL)) as killed:
        outcome = train(long, site)
    assert killed
    assert killed[0] < 60
    assert_same(outcome, whole)
    (run,) = tracking.leaderboard(site.store)
    assert run.state == "FINISHED"
    said = [json.loads(line) for line in (folder / "workers.log").read_text().splitlines()]
    assert any(line.get("text", "").startswith(f"resumed {folder.name}") for line in said)


DRIVER = """
import sys
from pathlib import Path
from vinedresser import tracking
from vinedresser.cluster.connect import connect
from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train
from vinedresser.workspace.layout import Workspace
import json

plain, shards, workspace = sys.argv[1:]
store = tracking.store_for(Path(workspace), "reversal")
context = RunContext(open_shards(Path(shards)), Workspace(Path(workspace)), store)
with connect(cpus=2):
    train(Experiment.from_json(json.loads(plain)), context)
"""


@pytest.mark.fault("T06")
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_t06_a_killed_driver_takes_its_children_along_and_the_same_command_goes_on(
    long: Experiment, whole: Outcome, reversal: ShardSet, tmp_path: Path
) -> None:
    words = [json.dumps(long.to_json()), str(reversal.folder), str(tmp_path)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *words])
    folder, end = folder_of(long, reversal, tmp_path).path, time.monotonic() + 200
    while not newest_step(folder) and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    names = {child: _name(child) for child in psutil.Process(driver.pid).children(recursive=True)}
    driver.kill()
    driver.wait()
    assert sum("RayTrainWorker" in name for name in names.values()) == 2
    # Ray's own two agents try for a minute to report the loss to a service that is gone too.
    ours = [child for child, name in names.items() if "Agent" not in name]
    psutil.wait_procs([child for child in ours if not _is_over(child)], timeout=60)
    assert not [names[child] for child in ours if not _is_over(child)]
    reached = newest_step(folder)
    assert 0 < reached < 60
    assert_same(train(long, site_of(tmp_path, reversal)), whole)
    assert f"at step {reached}" in (folder / "workers.log").read_text()


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _is_over(process: psutil.Process) -> bool:
    """Gone, or a zombie where nobody reaps."""
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


# Two nodes on this host, one of which is killed after the first checkpoint; or three, and one that
# has a worker is announced as lost.
NODES = """
import json, logging, sys, threading, time
from pathlib import Path
import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from vinedresser import tracking
from vinedresser.config import Experiment
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train
from vinedresser.training.outcome import run_folder
from vinedresser.data.shards import open_shards
from vinedresser.workspace.layout import Workspace

plain, shards, workspace, *drain = sys.argv[1:]
node = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
added = [cluster.add_node(**node) for _ in (["lost", "spare"] if drain else ["lost"])]
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
cluster.wait_for_nodes()
experiment = Experiment.from_json(json.loads(plain))
folder = run_folder(experiment, open_shards(Path(shards)), Workspace(Path(workspace))).path

def lose():
    while not list((folder / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    if not drain:
        return cluster.remove_node(added[0], allow_graceful=False)
    free = available_resources_per_node()
    lost = next(one.node_id for one in added if not free[one.node_id].get("CPU"))
    in_two_minutes = (int(time.time()) + 120) * 1000
    GcsClient(cluster.address).drain_node(lost, 2, "spot", in_two_minutes)  # 2: preemption

threading.Thread(target=lose).start()
store = tracking.store_for(Path(workspace), "reversal")
context = RunContext(open_shards(Path(shards)), Workspace(Path(workspace)), store)
train(experiment, context)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.fault("T07")
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_t07_a_lost_node_leaves_the_run_to_the_workers_that_there_is_room_for(
    long: Experiment, whole: Outcome, reversal: ShardSet, tmp_path: Path
) -> None:
    fewer = long.override({"compute.min_workers": 1})
    words = [json.dumps(fewer.to_json()), str(reversal.folder), str(tmp_path)]
    environment = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    command = [sys.executable, "-c", NODES, *words]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=280)
    outcome = finished(folder_of(long, reversal, tmp_path))
    assert outcome is not None
    assert_close(outcome, whole)
    said = (Path(outcome.folder) / "workers.log").read_text()
    assert "not bit-exact from here on: workers 2 -> 1" in said


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_an_announced_loss_moves_the_workers_after_a_checkpoint(
    long: Experiment, whole: Outcome, reversal: ShardSet, tmp_path: Path
) -> None:
    words = [json.dumps(long.to_json()), str(reversal.folder), str(tmp_path)]
    command = [sys.executable, "-c", NODES, *words, "drain"]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    outcome = finished(folder_of(long, reversal, tmp_path))
    assert outcome is not None
    assert_same(outcome, whole)
    lines = (Path(outcome.folder) / "workers.log").read_text()
    (resumed,) = re.findall(r"resumed \S+ at step (\d+)", lines)
    assert int(resumed) >= 4
    assert not (Path(outcome.folder) / "history.json").exists()


def writer_pid(folder: Path) -> int:
    """The process that may write to the run's folder."""
    lease = json.loads(RunFolder(folder).writer_lease.read_text())
    return int(lease["process"].split("~")[1])


@pytest.mark.fault("T08")
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_t08_a_frozen_worker_is_replaced_and_writes_no_more(
    long: Experiment, whole: Outcome, reversal: ShardSet, tmp_path: Path
) -> None:
    folder, frozen = folder_of(long, reversal, tmp_path).path, []

    def freeze() -> None:
        time.sleep(0.1)  # right after a checkpoint patience is ten times as long
        frozen.append(writer_pid(folder))
        os.kill(frozen[0], signal.SIGSTOP)

    impatient = long.override({"compute.hang_seconds": 1.0})
    try:
        with meanwhile(folder, freeze):
            outcome = train(impatient, site_of(tmp_path, reversal))
        ended = (folder / "outcome.json").read_bytes(), sorted(folder.rglob("*"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen[0], signal.SIGCONT)
    assert_same(outcome, whole)
    assert writer_pid(folder) != frozen[0]
    time.sleep(1)  # for the frozen one to write what it must not
    assert ((folder / "outcome.json").read_bytes(), sorted(folder.rglob("*"))) == ended


@pytest.mark.fault("T09")
@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "driver"])
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_t09_sigterm_stops_all_ranks_after_one_step_with_a_checkpoint(
    long: Experiment, whole: Outcome, reversal: ShardSet, tmp_path: Path, who: str
) -> None:
    site, folder = site_of(tmp_path, reversal), folder_of(long, reversal, tmp_path).path

    def stop() -> None:
        os.kill(worker_pids()[-1] if who == "worker" else os.getpid(), signal.SIGTERM)

    with meanwhile(folder, stop) as stopped, pytest.raises(InterruptedRunError) as told:
        train(long, site)
    assert told.value.exit_code == 75
    assert stopped[0] <= newest_step(folder) < 60
    if who == "worker":  # resuming is the same after both
        assert_same(train(long, site), whole)


def hanging(marker: Path, times: int) -> Callable[[Mapping[str, Any]], None]:
    """A worker's work where rank 1 sleeps when it reads the batch of step 3, so many times."""
    from vinedresser.distributed import group

    work = group.work

    def hangs(config: Mapping[str, Any]) -> None:
        import time

        import ray.train

        from vinedresser.training import run

        rank, read = ray.train.get_context().get_world_rank(), run.prefetched

        def prefetched(steps: Any) -> Any:
            for number, batch in enumerate(read(steps), 1):
                hung = len(marker.read_text()) if marker.exists() else 0
                if rank == 1 and number == 3 and hung < times:
                    marker.write_text("x" * (hung + 1))
                    time.sleep(3600)
                yield batch

        run.prefetched = prefetched
        work(config)

    return hangs


@pytest.mark.fault("T10")
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_t10_a_rank_that_hangs_twice_at_a_step_is_named_and_a_third_command_may_try(
    long: Experiment,
    whole: Outcome,
    reversal: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impatient = long.override({"compute.hang_seconds": 1.0})
    site, folder = site_of(tmp_path, reversal), folder_of(long, reversal, tmp_path).path
    work = hanging(tmp_path / "slept", 2)
    with monkeypatch.context() as patch:
        patch.setattr("vinedresser.distributed.group.work", work)
        with pytest.raises(TrainingError, match="rank 1 hung at step 3, 2 times; the stacks of"):
            train(impatient, site)
    (kept,) = folder.glob("hangs-*")
    assert sorted(path.name for path in kept.iterdir()) == [
        "step-00000003-rank-0.txt",
        "step-00000003-rank-1.txt",
    ]
    guilty = (kept / "step-00000003-rank-1.txt").read_text()
    assert guilty.count("== {") == 2
    assert "in prefetched" in guilty
    assert "in all_reduce" in (kept / "step-00000003-rank-0.txt").read_text()
    assert_same(train(impatient, site), whole)


@pytest.mark.fault("T14")
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_t14_a_run_goes_on_with_another_number_of_workers(
    long: Experiment, whole: Outcome, reversal: ShardSet, tmp_path: Path
) -> None:
    site, folder = site_of(tmp_path, reversal), folder_of(long, reversal, tmp_path).path
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with meanwhile(folder, stop), pytest.raises(InterruptedRunError):
        train(long, site)
    first = newest_step(folder)
    alone = long.override({"compute.workers": 1})
    assert folder_of(alone, reversal, tmp_path).path == folder
    with meanwhile(folder, stop, after=first + 4), pytest.raises(InterruptedRunError):
        train(alone, site)
    assert first < newest_step(folder) < 60
    assert_close(train(long, site), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_stopped_trial_gives_its_workers_back(
    reversal: ShardSet, tiny_study: dict[str, Any], tmp_path: Path
) -> None:
    import ray

    # The order is the seed's: 8e-3, then 1e-9, which is stopped at a quarter of its way. Without
    # its release a third trial's worker group would wait for ever.
    rates = {"type": "categorical", "choices": [1e-9, 8e-3, 1e-8]}
    study = Study.from_json(tiny_study).override(
        {"space": {"optim.lr": rates}, "num_trials": 2, "stopping": {"factor": 2},
         "base.compute.workers": 2, "base.steps": 1000, "base.evaluation.num_evaluations": 4}
    )  # fmt: skip
    site = site_of(tmp_path, reversal)
    outcome = sweep(study, site)
    assert [(t.number, t.state) for t in outcome.trials] == [(0, "complete"), (1, "pruned")]
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2
    assert len(list(tmp_path.glob("runs/*/outcome.json"))) == 1
    assert {run.state for run in tracking.leaderboard(site.store)} == {"FINISHED", "KILLED"}


@pytest.mark.usefixtures("local_ray")
def test_what_the_cluster_can_never_give_is_refused_at_once() -> None:
    with pytest.raises(MachineError, match=r"a trial needs 64 CPU, the cluster has 2"):
        require(Compute(workers=8, threads=8), "a trial")
    with pytest.raises(MachineError, match="2 GPU"):
        require(Compute(workers=2, device="cuda"), "a trial")
    begun = time.monotonic()
    with pytest.raises(MachineError, match="1 GPU, the cluster has 0"):
        require(Compute(gpus=1, start_seconds=1.5), "a trial")
    assert 1.5 <= time.monotonic() - begun < 30
    require(Compute(workers=2), "a trial")
    assert num_groups(Compute(workers=2)) == 1
    assert num_groups(Compute()) == 2


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        # A worker takes a GPU where there is any; Ray would wait for more.
        ({}, 4),
        ({"gpus": 0.5}, 8),
        ({"gpus": 0}, 16),
        ({"device": "cpu"}, 16),
        ({"devices": {"encoder": "cuda:0", "decoder": "cuda:1"}}, 1),
        ({"accelerator": "T4"}, 3),
        ({"threads": 4}, 3),
        # Three GPUs beside one: groups of two, on any nodes, on one node, on two nodes.
        ({"workers": 2}, 2),
        ({"workers": 2, "placement": "strict_pack"}, 1),
        ({"workers": 2, "placement": "strict_spread"}, 1),
        ({"workers": 3, "placement": "strict_spread"}, 0),
        ({"workers": 5}, 0),
    ],
    ids=str,
)
def test_trials_and_groups_are_counted_by_what_fits_on_nodes(
    monkeypatch: pytest.MonkeyPatch, compute: dict[str, Any], expected: int
) -> None:
    have = [
        {"CPU": 12.0, "GPU": 3.0, "accelerator_type:T4": 1.0},
        {"CPU": 3.0, "GPU": 1.0},
        {"CPU": 1.0},
    ]
    monkeypatch.setattr(resources, "nodes", lambda: have)
    monkeypatch.setattr(resources, "autoscaler_limits", dict)
    assert num_groups(Compute.from_json(compute)) == expected


def test_what_an_autoscaler_may_add_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr(resources, "autoscaler_limits", lambda: {"CPU": 100.0, "GPU": 8.0})
    assert worker_resources(Compute()) == {"CPU": 1.0, "GPU": 1.0}
    assert (num_groups(Compute()), num_groups_to_come(Compute())) == (0, 8)
    assert num_groups_to_come(Compute(workers=3)) == 2


@pytest.mark.usefixtures("local_ray")
def test_a_stop_and_an_announced_loss_reach_the_process_of_a_run(tmp_path: Path) -> None:
    """Without files: on NFS another host sees a new file after up to 30 s."""
    import ray

    should_stop, stop = StopRequest(RunFolder(tmp_path)), RayStop()
    with receiving_notices([ray.get_runtime_context().get_node_id()]):
        assert not should_stop()
        stop.request()
        end = time.monotonic() + 20
        while not should_stop() and time.monotonic() < end:
            time.sleep(0.01)
        assert should_stop()
        assert should_stop.is_requested
    assert stop.confirmed() == set()
    stop.confirm("one")
    assert stop.confirmed() == {"one"}
    stop.clear()
    assert not stop.is_requested()
    assert not stop.confirmed()
    assert not StopRequest(RunFolder(tmp_path))()
