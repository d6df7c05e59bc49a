"""A run that was killed and started again is the run that was not."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vinedresser.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from vinedresser.config import Experiment
from vinedresser.data.shards.shard_set import ShardSet, open_shards
from vinedresser.errors import DamagedError
from vinedresser.evaluate import Evaluated
from vinedresser.run import Outcome, Run, finished, judge, run_folder, run_key
from vinedresser.tracking import MemoryTracker
from vinedresser.train import Place

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}

FORMS = {
    "plain": {},
    "sampled_and_gated": {
        "objective.sampling": {"probability": 0.5, "decay_steps": 10},
        "model.concrete_heads": ["enc_self", "dec_enc"],
        "objective.l0": 0.5,
        "optim.decay": "inverse_sqrt",
    },
}


def experiment(shards: ShardSet, **changes: Any) -> Experiment:
    """24 updates, judged after 8, 16 and 24, stored every 5."""
    base = Experiment.from_json(
        {"task": shards.task.to_json(), "model": {"kind": "transformer", **TINY}}
    )
    settled = {
        "steps": 24,
        "checkpoint_every": 5,
        "batch.tokens": 64,
        "optim.warmup_steps": 4,
        "evaluation.times": 3,
        "evaluation.sentences": 10,
        "evaluation.tokens": 256,
    }
    return base.override({**settled, **changes})


class KilledError(Exception):
    """Stands for whatever may end a process."""


def a_run(
    config: Experiment,
    shards: ShardSet,
    workspace: Path,
    report: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Run:
    folder = run_folder(config, shards, workspace)
    place = Place(torch.device("cpu"), None)
    return Run(config, shards, folder, place=place, tracker=MemoryTracker(), report=report)


def killed_run(config: Experiment, shards: ShardSet, workspace: Path, at: float) -> Path:
    def report(values: Mapping[str, Any]) -> None:
        if values["step"] == at:
            raise KilledError

    run = a_run(config, shards, workspace, report)
    with pytest.raises(KilledError):
        run.execute()
    assert finished(run.folder) is None
    return run.folder


def everything(run: Run, outcome: Outcome) -> dict[str, torch.Tensor]:
    return {
        **{f"model.{name}": t for name, t in run.model.state_dict().items()},
        **{f"average.{name}": t for name, t in run.averaged.tensors.items()},
        **{f"optimizer.{name}": t for name, t in optimizer_tensors(run.optimizer).items()},
        **load_file(Path(outcome.bundle) / "weights.safetensors"),
    }


@pytest.fixture(scope="module", params=FORMS)
def whole(
    request, reversal, tmp_path_factory
) -> tuple[Experiment, dict[str, torch.Tensor], Outcome]:
    """A configuration and what its uninterrupted run ends in."""
    torch.set_num_threads(1)
    config = experiment(reversal, **FORMS[request.param])
    run = a_run(config, reversal, tmp_path_factory.mktemp("whole"))
    outcome = run.execute()
    assert outcome is not None
    return config, everything(run, outcome), outcome


def assert_same(run: Run, outcome: Outcome | None, whole: tuple[Any, Any, Outcome]) -> None:
    assert outcome is not None
    _, wanted, wanted_outcome = whole
    found = everything(run, outcome)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert outcome.history == wanted_outcome.history
    assert outcome.scores == wanted_outcome.scores
    assert outcome.best_step == wanted_outcome.best_step
    assert outcome.last_report == wanted_outcome.last_report


@pytest.mark.parametrize("at", [8, 16])
def test_a_resumed_run_is_bit_identical(whole, reversal, tmp_path, at):
    folder = killed_run(whole[0], reversal, tmp_path, at)
    assert len(list((folder / "checkpoints").iterdir())) == (1 if at == 8 else 2)
    run = a_run(whole[0], reversal, tmp_path)
    assert_same(run, run.execute(), whole)
    assert not (folder / "checkpoints").exists()


def test_a_run_killed_twice(whole, reversal, tmp_path):
    killed_run(whole[0], reversal, tmp_path, 8)
    killed_run(whole[0], reversal, tmp_path, 16)
    run = a_run(whole[0], reversal, tmp_path)
    assert_same(run, run.execute(), whole)


def test_a_run_killed_before_its_first_checkpoint_starts_over(whole, reversal, tmp_path):
    config = whole[0].override({"checkpoint_every": 20})
    folder = killed_run(config, reversal, tmp_path, 8)
    assert not (folder / "checkpoints").exists()
    run = a_run(config, reversal, tmp_path)
    assert_same(run, run.execute(), whole)  # storing less often changes nothing


def test_a_damaged_checkpoint_is_passed_over(whole, reversal, tmp_path, caplog):
    folder = killed_run(whole[0], reversal, tmp_path, 16)
    newest = folder / "checkpoints" / "step-00000015" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    run = a_run(whole[0], reversal, tmp_path)
    outcome = run.execute()
    assert "using step 10, 5 updates earlier" in caplog.text
    assert_same(run, outcome, whole)


KILL = """
import os, signal, sys, torch
from pathlib import Path
from vinedresser.config import Experiment
from vinedresser.data.shards.shard_set import open_shards
from vinedresser.run import Run, run_folder
from vinedresser.tracking import NullTracker
from vinedresser.train import Place
import json
torch.set_num_threads(1)
config, shards = Experiment.from_json(json.loads(sys.argv[1])), open_shards(Path(sys.argv[2]))
def report(values):
    if values["step"] == 16:
        os.kill(os.getpid(), signal.SIGKILL)
place = Place(torch.device("cpu"), None)
folder = run_folder(config, shards, Path(sys.argv[3]))
Run(config, shards, folder, place=place, tracker=NullTracker(), report=report).execute()
"""


def test_a_killed_process_is_resumed_by_another(whole, reversal, tmp_path):
    words = [json.dumps(whole[0].to_json()), str(reversal.folder), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", KILL, *words], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    run = a_run(whole[0], reversal, tmp_path)
    assert (run.folder / "checkpoints" / "step-00000015").is_dir()
    assert_same(run, run.execute(), whole)


def test_a_finished_run_is_recognised(whole, reversal, tmp_path):
    run = a_run(whole[0], reversal, tmp_path)
    assert finished(run.folder) is None
    outcome = run.execute()
    assert finished(run.folder) == outcome
    text = (run.folder / "outcome.json").read_text()
    for damaged in (text[:-20], "{}", "[1]", ""):
        (run.folder / "outcome.json").write_text(damaged)
        assert finished(run.folder) is None
    (run.folder / "outcome.json").write_text(text)
    (run.folder / "bundle" / "manifest.json").unlink()
    assert finished(run.folder) is None


def test_the_best_by_the_inferred_metric_ships(reversal, tmp_path, monkeypatch):
    """methods.md 13: a later, worse evaluation changes nothing."""
    values = iter([50.0, 20.0, 30.0])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    run = a_run(experiment(reversal), reversal, tmp_path)
    evaluate = judge.evaluate

    def evaluated_so(*arguments: Any, **settings: Any) -> Evaluated:
        evaluated = evaluate(*arguments, **settings)
        kept[len(kept)] = {name: t.clone() for name, t in run.averaged.tensors.items()}
        return replace(evaluated, scores=replace(evaluated.scores, value=next(values)))

    monkeypatch.setattr(judge, "evaluate", evaluated_so)
    outcome = run.execute()
    assert (outcome.best_step, outcome.value) == (16, 20.0)
    shipped = load_file(Path(outcome.bundle) / "weights.safetensors")
    assert all(torch.equal(shipped[name], tensor) for name, tensor in kept[1].items())
    assert [entry["value"] for entry in outcome.history] == [50.0, 20.0, 30.0]
    best = [value for key, value, _ in run.tracker.metrics if key == "best/per"]
    assert best == [50.0, 20.0, 20.0]
    assert outcome.selection_regret >= 0


class TestKey:
    def test_the_name_is_not_part_of_it_and_the_rest_is(self, reversal):
        config = experiment(reversal)
        key = run_key(config, reversal)
        assert run_key(config.override({"name": "other"}), reversal) == key
        for change in ({"seed": 2}, {"optim.lr": 0.1}, {"model.dropout": 0.2}):
            assert run_key(config.override(change), reversal) != key

    def test_shards_count_by_content(self, reversal):
        again = open_shards(reversal.folder)
        assert run_key(experiment(reversal), again) == run_key(experiment(reversal), reversal)


class TestCheckpoint:
    def checkpoint(self, step: int) -> Checkpoint:
        tensors = {"model": {"w": torch.full((2,), float(step))}, "best": {}}
        return Checkpoint(step, tensors, {"best_step": step})

    def test_round_trip(self, tmp_path):
        save_checkpoint(tmp_path, self.checkpoint(7))
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert (found.step, found.scalars) == (7, {"best_step": 7})
        assert found.tensors["model"]["w"].tolist() == [7, 7]
        assert found.tensors["best"] == {}

    def test_exactly_so_many_are_kept(self, tmp_path):
        for step in (5, 10, 15, 100_000):
            save_checkpoint(tmp_path, self.checkpoint(step))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00100000"]
        save_checkpoint(tmp_path, self.checkpoint(200_000), keep=1)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00200000"]

    def test_the_same_step_again_is_left_as_it_is(self, tmp_path):
        folder = save_checkpoint(tmp_path, self.checkpoint(5))
        before = (folder / "manifest.json").stat().st_mtime_ns
        assert save_checkpoint(tmp_path, self.checkpoint(5)) == folder
        assert (folder / "manifest.json").stat().st_mtime_ns == before

    def test_none_where_there_is_none(self, tmp_path):
        assert newest_checkpoint(tmp_path / "nowhere") is None

    @pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no_manifest"])
    def test_a_damaged_one_is_moved_aside_for_the_one_before(self, tmp_path, damage):
        save_checkpoint(tmp_path, self.checkpoint(5))
        newest = save_checkpoint(tmp_path, self.checkpoint(10))
        weights = newest / "model.safetensors"
        content = weights.read_bytes()
        if damage == "flip":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "truncate":
            weights.write_bytes(content[:-1])
        elif damage == "remove":
            weights.unlink()
        else:
            (newest / "manifest.json").unlink()
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 5
        assert not newest.exists()

    def test_all_damaged_is_refused_again_and_again(self, tmp_path):
        for step in (5, 10):
            (save_checkpoint(tmp_path, self.checkpoint(step)) / "state.json").write_text("{}")
        for _ in range(2):
            with pytest.raises(DamagedError, match=r"step-00000010/state.*step-00000005/state"):
                newest_checkpoint(tmp_path)

    def test_tied_weights_are_stored(self, tmp_path):
        weight = torch.ones(2)
        save_checkpoint(tmp_path, Checkpoint(1, {"model": {"a": weight, "b": weight}}, {}))
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found.tensors["model"].keys() == {"a", "b"}

    def test_an_optimizer_goes_on_as_if_nothing_had_been(self, tmp_path):
        def fresh() -> tuple[nn.Parameter, torch.optim.Optimizer]:
            weight = nn.Parameter(torch.zeros(3))
            return weight, torch.optim.AdamW([weight], lr=0.1, fused=True)

        def advance(weight: nn.Parameter, optimizer: torch.optim.Optimizer, step: int) -> None:
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * step
            optimizer.step()

        weight, optimizer = fresh()
        for step in (1, 2, 3):
            advance(weight, optimizer, step)
        other, restored = fresh()
        other.data.copy_(weight.data)
        save_checkpoint(tmp_path, Checkpoint(3, {"optimizer": optimizer_tensors(optimizer)}, {}))
        found = newest_checkpoint(tmp_path)
        assert found is not None
        restore_optimizer(restored, found.tensors["optimizer"])
        advance(weight, optimizer, 4)
        advance(other, restored, 4)
        assert torch.equal(weight, other)


def test_a_run_learns_to_reverse(reversal, tmp_path):
    config = experiment(
        reversal,
        steps=500,
        checkpoint_every=1000,
        **{
            "model.d_model": 48,
            "model.d_ff": 96,
            "model.dropout": 0,
            "model.attention_dropout": 0,
            "batch.tokens": 512,
            "optim.lr": 5e-3,
            "optim.warmup_steps": 50,
            "evaluation.sentences": 0,
            "evaluation.times": 2,
        },
    )
    outcome = a_run(config, reversal, tmp_path).execute()
    assert outcome is not None
    assert outcome.value < 5
    assert outcome.seconds < 60
    assert outcome.scores["teacher_forced_error"] < 5
