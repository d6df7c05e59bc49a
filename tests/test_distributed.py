"""Two gloo workers of Ray Train against one process that sees what both of them see."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from vinedresser import tracking
from vinedresser.bundle import load_bundle, vocabulary_of
from vinedresser.config import Compute, Experiment
from vinedresser.data.batches.stream import stream
from vinedresser.data.shards.shard_set import ShardSet, tokenizers
from vinedresser.distributed import Site, num_groups, require, train
from vinedresser.errors import MachineError
from vinedresser.objectives import likelihood
from vinedresser.optim import build_optimizer, learning_rate, set_learning_rate
from vinedresser.run import Outcome, run_folder
from vinedresser.study import Study
from vinedresser.sweep import sweep
from vinedresser.train import Progress, seed_step

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _no_user_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def experiment(tiny_study: dict[str, Any]) -> Experiment:
    """Two workers, no dropout, fp32; the last weights ship, unaveraged."""
    changes = {"compute.workers": 2, "optim.average": 0, "steps": 6, "evaluation.times": 1}
    return Experiment.from_json(tiny_study["base"]).override({**changes, "optim.warmup_steps": 2})


def site_of(workspace: Path, shards: ShardSet) -> Site:
    store = tracking.store_for(workspace, "reversal")
    return Site(str(shards.folder), str(workspace), store)


def weights(outcome: Outcome) -> Mapping[str, torch.Tensor]:
    return load_bundle(Path(outcome.bundle)).model.state_dict()


def reference(experiment: Experiment, shards: ShardSet) -> Mapping[str, torch.Tensor]:
    """What one process reaches that weighs every token of both ranks' batches alike."""
    seed_step(experiment.seed, 0, 0)
    model = experiment.model.build(
        vocabulary_of(*tokenizers(shards), joint=shards.task.has_joint_vocabulary)
    )
    optimizer = build_optimizer(model, experiment.optim, gate_lr_factor=1.0)
    ranks = [
        stream(shards, tokens=experiment.batch.tokens, seed=experiment.seed, rank=rank, of=2)
        for rank in (0, 1)
    ]
    for step in range(1, experiment.steps + 1):
        batches = [next(rank) for rank in ranks]
        tokens = sum(int(batch.tokens) for batch in batches)
        optimizer.zero_grad()
        for batch in batches:
            memory = model.encode(batch.source_BS, batch.source_lengths_B)
            states_BTD = model.decode(memory, batch.inputs_BT)
            (likelihood(model, states_BTD, batch, label_smoothing=0.0).total / tokens).backward()
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
    stood: list[Progress] = []
    outcome = train(experiment, site, report=lambda _: None, tell=stood.append)
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
    assert train(experiment, site, report=told.append) == outcome
    assert [(one["is_last"], one["run/bundle"]) for one in told] == [(1.0, outcome.bundle)]


def worker_pids() -> list[int]:
    """Training workers of this process's Ray."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "one_thread")
def test_a_killed_worker_costs_time_and_nothing_else(
    experiment: Experiment, reversal: ShardSet, tmp_path: Path
) -> None:
    # Steps slow enough for the kill to come between the first checkpoint and the last.
    bigger = {"model.d_model": 64, "model.d_ff": 256, "batch.tokens": 512, "optim.lr": 1e-3}
    long = experiment.override({**bigger, "steps": 80, "checkpoint_every": 4})
    workspace = tmp_path / "killed"
    checkpoints = run_folder(long, reversal, workspace) / "checkpoints"
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not killed:
            if list(checkpoints.glob("step-*")) and (pids := worker_pids()):
                os.kill(pids[-1], signal.SIGKILL)
                killed.append(pids[-1])
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    outcome = train(long, site_of(workspace, reversal), report=lambda _: None)
    thread.join()
    assert killed
    assert outcome.best_step == 80
    expected = reference(long, reversal)
    for name, found in weights(outcome).items():
        # Softmax does not see the keys' bias: its gradient is rounding, which Adam makes steps of.
        if not name.endswith("key_value.bias"):
            torch.testing.assert_close(found, expected[name], atol=1e-3, rtol=0, msg=name)
    (run,) = tracking.leaderboard(site_of(workspace, reversal).store)
    assert run.state == "FINISHED"


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
         "base.compute.workers": 2, "base.steps": 1000, "base.evaluation.times": 4}
    )  # fmt: skip
    site = site_of(tmp_path, reversal)
    outcome = sweep(study, site, shards_digest=reversal.digest, say=lambda _: None)
    assert [(t.number, t.state) for t in outcome.trials] == [(0, "complete"), (1, "pruned")]
    end = time.monotonic() + 5
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2
    assert len(list(tmp_path.glob("runs/*/outcome.json"))) == 1
    assert {run.state for run in tracking.leaderboard(site.store)} == {"FINISHED", "KILLED"}


@pytest.mark.usefixtures("local_ray")
def test_what_the_cluster_can_never_give_is_refused_at_once() -> None:
    with pytest.raises(MachineError, match=r"a trial wants 64 CPU, the cluster has 2"):
        require(Compute(workers=8, threads=8), "a trial")
    with pytest.raises(MachineError, match="2 GPU"):
        require(Compute(workers=2, device="cuda"), "a trial")
    require(Compute(workers=2), "a trial")
    assert num_groups(Compute(workers=2)) == 1
    assert num_groups(Compute()) == 2
