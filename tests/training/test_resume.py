"""Killed runs: wherever the kill strikes, losses and final weights are those of a whole run.

The processes that train and die are those of `make bench NAME=resume`, which draws its kills at
random; here each strikes at a named device.
"""

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.short_run import GATED, a_run, ending, experiment, killed_run
from vinedresser.config import Experiment
from vinedresser.data.batching.reader import Batches
from vinedresser.data.shards import ShardSet
from vinedresser.errors import DamagedError
from vinedresser.evaluate import Evaluated
from vinedresser.training import evaluator
from vinedresser.training.outcome import clear

TERM = int(signal.SIGTERM)
# Dev takes several batches, so that a kill can come in between.
TRANSFORMER = {**GATED, "decoding.max_padded_tokens": 24}
RECURRENT = {
    "model": {"kind": "attention_rnn", "width": 16, "encoder_units": 16, "input_feeding": True},
    "compute.precision": "bf16",
    "decoding.max_padded_tokens": 24,
}


@dataclass(frozen=True)
class Case:
    """A run that gets signals at points that it passes.

    Attributes:
        moments: (point, how-manieth pass) of each attempt but the last, SIGKILL; or with a signal.
        reached: the last update that each of these finished.
        again: updates that are taken more than once.
    """

    moments: list[tuple[Any, ...]]
    reached: list[int]
    again: list[int]
    model: str = "transformer"


def steps(first: int, last: int) -> list[int]:
    return [*range(first, last + 1)]


# The boundaries of fault T17, and those of a polite stop (T09). Nothing that was committed is lost:
# after a kill at step 12 the updates 11 and 12 are taken again, after 10 was committed.
CASES = {
    "before the first step": Case([("start", 1)], [0], []),
    "in the middle of a step": Case([("gradient@12", 1)], [11], [11]),
    "after the optimizer, before the checkpoint": Case([("updated@10", 1)], [9], steps(6, 9)),
    "after the step, before the checkpoint": Case([("yielded@10", 1)], [10], steps(6, 10)),
    "first checkpoint, nothing written": Case([("writing@5", 1)], [5], steps(1, 5)),
    "checkpoint, nothing written": Case([("writing@10", 1)], [10], steps(6, 10)),
    "checkpoint, tensors written": Case([("writing@10", 5)], [10], steps(6, 10)),
    "checkpoint, before its manifest": Case([("writing@10", 10)], [10], steps(6, 10)),
    "checkpoint, before the rename": Case([("rename@10", 1)], [10], steps(6, 10)),
    "checkpoint, after the rename": Case([("renamed@10", 1)], [10], []),
    "while an old checkpoint is removed": Case([("removing", 3)], [15], []),
    "before evaluation": Case([("evaluate", 2)], [16], [16]),
    "during evaluation": Case([("decode@2", 2)], [16], [16]),
    "after evaluation": Case([("evaluated", 2)], [16], [16]),
    "end of an epoch": Case([("yielded@EPOCH", 1)], [0], []),
    "last partial batch": Case([("gradient@PARTIAL", 1)], [0], []),
    "at the end, before the outcome": Case([("evaluated", 3)], [24], steps(21, 24)),
    "during bundle writing": Case([("bundle", 4)], [24], steps(21, 24)),
    "before the outcome's rename": Case([("outcome", 2)], [24], steps(21, 24)),
    "after the outcome": Case([("removing", 14)], [24], []),
    "three times": Case(
        [("writing@10", 5), ("decode@2", 1), ("gradient@19", 1)],
        [10, 16, 18],
        [6, 7, 8, 9, 10, 16, 17, 18],
    ),
    "recurrent, in the middle of a step": Case([("gradient@18", 1)], [17], [16, 17], "recurrent"),
    "recurrent, during evaluation": Case([("decode@1", 1)], [8], steps(6, 8), "recurrent"),
    "told to stop": Case([("yielded@12", 1, TERM)], [13], []),
    "told to stop at a checkpoint": Case([("writing@10", 5, TERM)], [11], []),
    "told to stop during evaluation": Case([("decode@2", 1, TERM)], [16], []),
    "told to stop in the last evaluation": Case([("decode@3", 1, TERM)], [24], []),
    "told to stop, killed while storing": Case(
        [("yielded@12", 1, TERM), ("yielded@14", 1)], [13, 14], [14]
    ),
}  # fmt: skip


def placed(case: Case, shards: ShardSet) -> Case:
    """With the steps that only the data know in the place of their names."""
    config = experiment(shards)
    batches = Batches(shards, config.batch, seed=config.seed)
    sizes = [len(batches.rows(i)) for i in range(batches.per_epoch)]
    assert 5 < batches.per_epoch < 20
    found = {"EPOCH": batches.per_epoch, "PARTIAL": 1 + sizes.index(min(sizes))}
    ((point, count),) = case.moments
    name, at = point.split("@")
    step = found[at]
    reached = step if name == "yielded" else step - 1
    stored = reached // 5 * 5 if name == "gradient" else (step - 1) // 5 * 5
    return Case([(f"{name}@{step}", count)], [reached], steps(stored + 1, reached))


@pytest.fixture(scope="module")
def answers(
    root: Path, reversal: ShardSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Mapping[str, Case], Mapping[str, Mapping[str, Any]]]:
    """All cases, one after the other in one child process, with a child of its own each."""
    folder = tmp_path_factory.mktemp("kills")
    cases = {
        name: placed(case, reversal) if not any(case.reached + case.again) and "@" in
        case.moments[0][0] else case for name, case in CASES.items()
    }  # fmt: skip
    configs = {
        "transformer": experiment(reversal, **TRANSFORMER),
        "recurrent": experiment(reversal, **RECURRENT),
    }
    plan = folder / "plan.json"
    listed = [
        {"name": name, "experiment": configs[case.model].to_json(), "moments": case.moments}
        for name, case in cases.items()
    ]
    content = {"folder": str(folder), "shards": str(reversal.folder), "cases": listed}
    plan.write_text(json.dumps(content))
    command = [sys.executable, "benchmarks/resume.py", "--boundaries", str(plan)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=root, timeout=280
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return cases, {line["name"]: line for line in lines}


@pytest.mark.fault("T05", "T17")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_here_ends_in_the_same_bits(answers, name):
    case, found = answers[0][name], answers[1][name]
    assert found["differences"] == []
    codes = [75 if TERM in moment else -9 for moment in case.moments]
    assert found["codes"] == [*codes, 0]
    assert found["reached"] == case.reached
    assert found["again"] == case.again
    assert found["steps"] == 24
    assert not [left for left in found["left"] if ".tmp-" in left]


@pytest.fixture(scope="module")
def config(reversal: ShardSet) -> Experiment:
    return experiment(reversal, **TRANSFORMER)


@pytest.fixture(scope="module")
def killed(
    config: Experiment, reversal: ShardSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The workspace of a run that died at step 16, with checkpoints of steps 10 and 15."""
    torch.set_num_threads(1)
    workspace = tmp_path_factory.mktemp("killed")
    folder = killed_run(config, reversal, workspace, 16)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000015"]
    return workspace


@pytest.fixture(scope="module")
def whole(
    config: Experiment, reversal: ShardSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the run that nobody killed ends in."""
    torch.set_num_threads(1)
    run = a_run(config, reversal, tmp_path_factory.mktemp("whole"))
    return ending(run, run.execute())


GROUPS = ("model", "optimizer", "ema", "evaluator")
FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json", "manifest.json")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = random.Random(path.name).randrange(len(content))
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other")
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    (folder / "other").rename(folder / "ema.safetensors")


def older(folder: Path, name: str) -> None:
    """A file of the checkpoint before: whole in itself, of another step."""
    shutil.copy(folder.with_name("step-00000010") / name, folder / name)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replaced(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    **{f"a bit of {name}": lambda f, name=name: flip(f / name) for name in FILES},
    **{f"half of {name}": lambda f, name=name: cut(f / name) for name in FILES},
    **{f"no {name}": lambda f, name=name: (f / name).unlink() for name in FILES},
    "zeros in model.safetensors": lambda f: zeros(f / "model.safetensors"),
    "empty state.json": lambda f: (f / "state.json").write_bytes(b""),
    "two files swapped": swap,
    "the optimizer of another step": lambda f: older(f, "optimizer.safetensors"),
    "the state of another step": lambda f: older(f, "state.json"),
    "the manifest of another step": lambda f: older(f, "manifest.json"),
    "a file too many": lambda f: (f / "more.safetensors").write_bytes(b"x"),
    "an empty folder": lambda f: [path.unlink() for path in f.iterdir()],
    "a file in its place": replaced,
}


@pytest.mark.fault("T12")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    config, reversal, killed, whole, tmp_path, caplog, damage
):
    """Fault T12: the one before is taken, it is said so, and the bits are those of a whole run."""
    shutil.copytree(killed, tmp_path / "workspace")
    run = a_run(config, reversal, tmp_path / "workspace")
    newest = run.folder.path / "checkpoints" / "step-00000015"
    DAMAGES[damage](newest)
    with caplog.at_level(logging.INFO, "vinedresser"):
        outcome = run.execute()
    assert f"{newest}" in caplog.text
    assert "using step 10, 5 updates earlier" in caplog.text
    assert "at step 10" in caplog.text
    assert ending(run, outcome) == whole


def test_an_undamaged_checkpoint_is_taken(config, reversal, killed, whole, tmp_path, caplog):
    shutil.copytree(killed, tmp_path / "workspace")
    run = a_run(config, reversal, tmp_path / "workspace")
    with caplog.at_level(logging.INFO, "vinedresser"):
        outcome = run.execute()
    assert "at step 15" in caplog.text
    assert "earlier" not in caplog.text
    assert ending(run, outcome) == whole


def test_the_best_so_far_is_among_what_is_stored(config, reversal, tmp_path, monkeypatch):
    """It was best at step 8, the kill comes at 16, and nothing after it is better."""
    whole, until_killed = (20.0, 50.0, 60.0), (20.0, 50.0)
    # The last is of the weights that ship: their tables are made by the process that resumed.
    resumed = (50.0, 60.0, 20.0)
    values, evaluate = iter([*whole, *until_killed, *resumed]), evaluator.evaluate

    def evaluated_so(*arguments: Any, **settings: Any) -> Evaluated:
        found = evaluate(*arguments, **settings)
        return replace(found, scores=replace(found.scores, value=next(values)))

    monkeypatch.setattr(evaluator, "evaluate", evaluated_so)
    config = config.override({"objective.head_penalty.weight": 0.0, "model.concrete_heads": []})
    run = a_run(config, reversal, tmp_path / "whole")
    expected = ending(run, run.execute())
    killed_run(config, reversal, tmp_path / "killed", 16)
    run = a_run(config, reversal, tmp_path / "killed")
    outcome = run.execute()
    assert outcome is not None
    assert (outcome.best_step, outcome.value) == (8, 20.0)
    assert ending(run, outcome) == expected
    assert not list(values)


@pytest.mark.fault("T13")
def test_all_damaged_is_refused_with_the_reasons(config, reversal, killed, whole, tmp_path):
    """Fault T13: starting over is for the user to say."""
    shutil.copytree(killed, tmp_path / "workspace")
    run = a_run(config, reversal, tmp_path / "workspace")
    folders = [run.folder.path / "checkpoints" / f"step-{step:08d}" for step in (10, 15)]
    flip(folders[0] / "model.safetensors")
    (folders[1] / "state.json").unlink()
    for _ in range(2):  # nothing is moved aside: a second look finds the same
        with pytest.raises(DamagedError) as caught:
            a_run(config, reversal, tmp_path / "workspace").execute()
        assert f"{folders[0] / 'model.safetensors'}: content differs" in str(caught.value)
        assert f"{folders[1]}: missing state.json" in str(caught.value)
        assert "--from-scratch" in str(caught.value)
        assert caught.value.exit_code == 2
    clear(run.folder)
    run = a_run(config, reversal, tmp_path / "workspace")
    assert ending(run, run.execute()) == whole
