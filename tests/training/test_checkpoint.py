"""A run that was killed and started again is the run that was not."""

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.short_run import GATED, a_run, ending, experiment, folder_of, killed_run, script
from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.errors import DamagedError, MachineError
from vinedresser.evaluate import Evaluated
from vinedresser.training import evaluator
from vinedresser.training.checkpoint import (
    load_parts,
    newest_checkpoint,
    save_checkpoint,
)
from vinedresser.training.optimizer import OptimizerState
from vinedresser.training.outcome import finished, run_key
from vinedresser.workspace.commit import commit, file_digest
from vinedresser.workspace.layout import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {
    "plain, pictured": {"evaluation.attention_every": 2},
    "sampled and gated": {**GATED, "optim.decay": "inverse_sqrt"},
}


@pytest.fixture(scope="module", params=FORMS)
def whole(request, reversal, tmp_path_factory) -> tuple[Experiment, dict[str, Any]]:
    """A configuration and what its uninterrupted run ends in."""
    torch.set_num_threads(1)
    config = experiment(reversal, **FORMS[request.param])
    run = a_run(config, reversal, tmp_path_factory.mktemp("whole"))
    return config, ending(run, run.execute())


@pytest.mark.parametrize("at", [8, 16])
def test_a_resumed_run_is_bit_identical(whole, reversal, tmp_path, at):
    folder = killed_run(whole[0], reversal, tmp_path, at)
    assert len(list((folder / "checkpoints").iterdir())) == (1 if at == 8 else 2)
    run = a_run(whole[0], reversal, tmp_path)
    assert ending(run, run.execute()) == whole[1]
    assert not (folder / "checkpoints").exists()


def test_a_run_killed_twice(whole, reversal, tmp_path):
    killed_run(whole[0], reversal, tmp_path, 8)
    killed_run(whole[0], reversal, tmp_path, 16)
    run = a_run(whole[0], reversal, tmp_path)
    assert ending(run, run.execute()) == whole[1]


def test_a_run_killed_before_its_first_checkpoint_starts_over(whole, reversal, tmp_path):
    config = whole[0].override({"checkpoint_every": 20})
    folder = killed_run(config, reversal, tmp_path, 8)
    assert not (folder / "checkpoints").exists()
    run = a_run(config, reversal, tmp_path)
    assert ending(run, run.execute()) == whole[1]  # storing less often changes nothing


KILL = """
def report(values):
    if values["step"] == 16:
        os.kill(os.getpid(), signal.SIGKILL)
a_run(folder_of(config, shards, Path(sys.argv[3])), report=report).execute()
"""


def test_a_killed_process_is_resumed_by_another(whole, reversal, tmp_path, forked):
    code, words = script(KILL, whole[0], reversal, tmp_path)
    assert forked(*words, code=code).wait(timeout=200) == -signal.SIGKILL
    run = a_run(whole[0], reversal, tmp_path)
    assert (run.folder.path / "checkpoints" / "step-00000015").is_dir()
    assert ending(run, run.execute()) == whole[1]


RANK = """
import torch.distributed as dist
rank, folder = int(sys.argv[4]), RunFolder(Path(sys.argv[5]))
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
try:
    a_run(folder, Device(torch.device("cpu"), None, rank, 2)).execute()
except VinedresserError as error:
    print(error.exit_code, error.args[0], flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_ranks_that_read_different_checkpoints_do_not_train(reversal, tmp_path, forked):
    """As where a machine cannot read the newest one, and passes it over."""
    config = experiment(reversal, **{"compute.workers": 2})
    one = experiment(reversal, **{"batch.per_update": 2})
    first = killed_run(one, reversal, tmp_path, 16)
    second = shutil.copytree(first, tmp_path / "second")
    shutil.rmtree(second / "checkpoints" / "step-00000015")
    ranks = []
    for rank, folder in enumerate((first, second)):
        code, words = script(RANK, config, reversal, tmp_path / "meeting", rank, folder)
        ranks.append(forked(*words, code=code))
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    for rank, step in ((0, 15), (1, 10)):
        assert f"ranks read different checkpoints, rank {rank} that of step {step}. " in said[rank]
        assert said[rank].startswith(f"3 {(first, second)[rank]}: ")


def test_a_finished_run_is_recognised(whole, reversal, tmp_path):
    run = a_run(whole[0], reversal, tmp_path)
    assert finished(run.folder) is None
    outcome = run.execute()
    assert finished(run.folder) == outcome
    text = (run.folder.path / "outcome.json").read_text()
    for damaged in (text[:-20], "{}", "[1]", ""):
        (run.folder.path / "outcome.json").write_text(damaged)
        assert finished(run.folder) is None
    (run.folder.path / "outcome.json").write_text(text)
    (run.folder.path / "bundle" / "manifest.json").unlink()
    assert finished(run.folder) is None


def test_a_finished_run_is_recognised_where_it_was_moved_or_copied_to(whole, reversal, tmp_path):
    outcome = a_run(whole[0], reversal, tmp_path / "old").execute()
    for renamed, name in ((shutil.copytree, "copied"), (shutil.move, "moved")):
        renamed(tmp_path / "old", tmp_path / name)
        folder = folder_of(whole[0], reversal, tmp_path / name)
        bundle = folder.bundle
        found = finished(folder)
        assert found == replace(outcome, folder=str(folder.path), bundle=str(bundle))
        assert found.final_report["run/bundle"] == str(bundle)
    assert finished(RunFolder(Path(outcome.folder))) is None


def test_the_best_by_the_inferred_metric_ships(reversal, tmp_path, monkeypatch):
    """methods.md 13: a later, worse evaluation changes nothing."""
    values = iter([50.0, 20.0, 30.0])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    run = a_run(experiment(reversal), reversal, tmp_path)
    evaluate = evaluator.evaluate

    def evaluated_so(*arguments: Any, **settings: Any) -> Evaluated:
        evaluated = evaluate(*arguments, **settings)
        kept[len(kept)] = {name: t.clone() for name, t in run.ema.tensors.items()}
        return replace(evaluated, scores=replace(evaluated.scores, value=next(values)))

    monkeypatch.setattr(evaluator, "evaluate", evaluated_so)
    outcome = run.execute()
    assert (outcome.best_step, outcome.value) == (16, 20.0)
    shipped = load_file(Path(outcome.bundle) / "weights.safetensors")
    assert all(torch.equal(shipped[name], tensor) for name, tensor in kept[1].items())
    assert [entry["value"] for entry in outcome.history] == [50.0, 20.0, 30.0]
    best = [value for key, value, _ in run.tracker.metrics if key == "best/per"]
    assert best == [50.0, 20.0, 20.0]
    # The loss is best at the last step, where the metric is 30.
    nats = [entry["teacher_forced_loss"] for entry in outcome.history]
    assert nats.index(min(nats)) == 2
    assert outcome.selection_regret == 10
    better = replace(outcome, scores={**outcome.scores, "per": 35.0})
    assert better.selection_regret == -5
    points = replace(outcome, scores={"metric": "bleu", "bleu": 35.0})
    assert points.selection_regret == 5


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


def fail_to_read(checkpoint: Path) -> None:
    """From now on its manifest is an input/output error, as of a bad sector."""
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").symlink_to("/proc/self/mem")  # nothing is mapped at 0


class Fixed:
    """A part with a state that is handed in."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class TestCheckpoint:
    def save(self, folder: Path, step: int, **settings: Any) -> Path:
        model = Fixed({"w": torch.full((2,), float(step))})
        parts = {"model": model, "best": Fixed({"step": step, "loss": math.inf, "path": [1, "a"]})}
        return save_checkpoint(RunFolder(folder), step, parts, **settings)

    def test_round_trip(self, tmp_path):
        self.save(tmp_path, 7)
        found = newest_checkpoint(RunFolder(tmp_path))
        assert found is not None
        assert (found.step, found.states.keys()) == (7, {"model", "best"})
        assert found.states["best"] == {"step": 7, "loss": math.inf, "path": [1, "a"]}
        assert found.states["model"]["w"].tolist() == [7, 7]

    def test_states_nest_and_keys_need_not_be_strings(self, tmp_path):
        state = {
            "moments": {0: {"step": torch.tensor(2)}, 1: {"step": torch.tensor(3)}},
            "at": None,
        }
        save_checkpoint(RunFolder(tmp_path), 1, {"part": Fixed(state)})
        found = newest_checkpoint(RunFolder(tmp_path))
        assert found is not None
        assert found.states["part"] == state

    def test_every_part_gets_its_own_state_back(self, tmp_path):
        self.save(tmp_path, 7)
        parts = {"model": Fixed({}), "best": Fixed({}), "new": Fixed({"kept": 1})}
        found = newest_checkpoint(RunFolder(tmp_path))
        assert found is not None
        load_parts(parts, found)
        assert parts["model"].state["w"].tolist() == [7, 7]
        assert (parts["best"].state["step"], parts["new"].state) == (7, {"kept": 1})

    def test_another_versions_checkpoint_is_refused(self, tmp_path):
        with commit(RunFolder(tmp_path).checkpoint(3)) as staging:
            (staging.path / "state.json").write_text('{"step": 3, "scalars": {}}')
        with pytest.raises(DamagedError, match="written by another version of vinedresser"):
            newest_checkpoint(RunFolder(tmp_path))

    def test_exactly_so_many_are_kept(self, tmp_path):
        for step in (5, 10, 15, 100_000):
            self.save(tmp_path, step)
        kept = RunFolder(tmp_path).checkpoints
        assert sorted(p.name for p in kept.iterdir()) == ["step-00000015", "step-00100000"]
        self.save(tmp_path, 200_000, keep=1)
        assert [p.name for p in kept.iterdir()] == ["step-00200000"]

    def test_the_same_step_again_is_left_as_it_is(self, tmp_path):
        folder = self.save(tmp_path, 5)
        before = (folder / "manifest.json").stat().st_mtime_ns
        assert self.save(tmp_path, 5) == folder
        assert (folder / "manifest.json").stat().st_mtime_ns == before

    def test_none_where_there_is_none(self, tmp_path):
        assert newest_checkpoint(RunFolder(tmp_path / "nowhere")) is None

    @pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no_manifest"])
    def test_a_damaged_one_is_moved_aside_for_the_one_before(self, tmp_path, damage):
        self.save(tmp_path, 5)
        newest = self.save(tmp_path, 10)
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
        found = newest_checkpoint(RunFolder(tmp_path))
        assert found is not None
        assert found.step == 5
        assert not newest.exists()

    def test_all_damaged_is_refused_again_and_again(self, tmp_path):
        for step in (5, 10):
            (self.save(tmp_path, step) / "state.json").write_text("{}")
        for _ in range(2):
            with pytest.raises(DamagedError, match=r"step-00000010/state.*step-00000005/state"):
                newest_checkpoint(RunFolder(tmp_path))

    def test_one_that_the_disk_does_not_give_is_passed_over_and_stays(self, tmp_path, caplog):
        self.save(tmp_path, 5)
        newest = self.save(tmp_path, 10)
        fail_to_read(newest)
        for _ in range(2):
            found = newest_checkpoint(RunFolder(tmp_path))
            assert found is not None
            assert found.step == 5
        assert "input/output error" in caplog.text
        assert "using step 5, 5 updates earlier" in caplog.text
        # Its place is taken by the one that is written at its step.
        assert self.save(tmp_path, 10) == newest
        found = newest_checkpoint(RunFolder(tmp_path))
        assert found is not None
        assert found.step == 10

    def test_where_the_disk_gives_none_it_is_told_of_each(self, tmp_path):
        damaged = self.save(tmp_path, 5)
        (damaged / "state.json").write_text("{}")
        fail_to_read(self.save(tmp_path, 10))
        for _ in range(2):
            with pytest.raises(MachineError, match=r"step-00000010.*input/output.*step-00000005"):
                newest_checkpoint(RunFolder(tmp_path))
        assert damaged.is_dir()

    @pytest.mark.parametrize("is_first", [True, False])
    def test_one_that_goes_while_it_is_read_is_passed_over(self, tmp_path, monkeypatch, is_first):
        """Another rank moves it aside; or the handle is stale, which raises an OSError as well."""
        self.save(tmp_path, 5)
        newest = self.save(tmp_path, 10)

        def digest(path: Path) -> str:
            if path.parent == newest:
                newest.rename(tmp_path / "aside")
            return file_digest(path)

        monkeypatch.setattr("vinedresser.workspace.commit.file_digest", digest)
        found = newest_checkpoint(RunFolder(tmp_path), is_first=is_first)
        assert found is not None
        assert found.step == 5

    def test_tied_weights_are_stored(self, tmp_path):
        weight = torch.ones(2)
        save_checkpoint(RunFolder(tmp_path), 1, {"model": Fixed({"a": weight, "b": weight})})
        found = newest_checkpoint(RunFolder(tmp_path))
        assert found is not None
        assert found.states["model"].keys() == {"a", "b"}

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
        save_checkpoint(RunFolder(tmp_path), 3, {"optimizer": OptimizerState(optimizer)})
        found = newest_checkpoint(RunFolder(tmp_path))
        assert found is not None
        load_parts({"optimizer": OptimizerState(restored)}, found)
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
            "batch.max_padded_tokens": 512,
            "optim.lr": 5e-3,
            "optim.warmup_steps": 50,
            "evaluation.sentences": 0,
            "evaluation.num_evaluations": 2,
        },
    )
    outcome = a_run(config, reversal, tmp_path).execute()
    assert outcome is not None
    assert outcome.value < 5
    assert outcome.seconds < 60
    assert outcome.scores["teacher_forced_error"] < 5
