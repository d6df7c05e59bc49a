"""A run of a second, for the tests that hurt it: a tiny Transformer learns to reverse."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vinedresser.config import Experiment
from vinedresser.data.shards import ShardSet
from vinedresser.tracking import MemoryTracker
from vinedresser.training.checkpoint import optimizer_tensors
from vinedresser.training.device import Device
from vinedresser.training.outcome import Outcome, finished, run_folder
from vinedresser.training.run import Run

HERE = Device(torch.device("cpu"), None)
TRANSFORMER = {
    "kind": "transformer", "d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1,
}  # fmt: skip
# What draws at random, and what is trained beside weights.
GATED = {
    "objective.sampling": {"probability": 0.5, "decay_steps": 10},
    "model.concrete_heads": ["enc_self", "dec_enc"],
    "objective.l0": 0.5,
}


def experiment(shards: ShardSet, **changes: Any) -> Experiment:
    """24 updates, judged after 8, 16 and 24, stored after 5, 10, 15 and 20."""
    base = Experiment.from_json({"task": shards.task.to_json(), "model": TRANSFORMER})
    settled = {
        "steps": 24,
        "checkpoint_every": 5,
        "batch.max_padded_tokens": 160,
        "optim.warmup_steps": 4,
        "evaluation.num_evaluations": 3,
        "evaluation.sentences": 10,
        "evaluation.attention_every": 0,
        "compute.device": "cpu",
        "compute.precision": "fp32",
    }
    return base.override({**settled, **changes})


def a_run(
    config: Experiment,
    shards: ShardSet,
    workspace: Path,
    report: Callable[[Mapping[str, Any]], None] = lambda _: None,
    **more: Any,
) -> Run:
    """The run that `vinedresser train` would make, in this process."""
    folder, given = run_folder(config, shards, workspace), {"tracker": MemoryTracker(), **more}
    return Run(config, shards, folder, device=HERE, report=report, **given)


class KilledError(Exception):
    """Stands for whatever may end a process."""


def killed_run(config: Experiment, shards: ShardSet, workspace: Path, at: float) -> Path:
    """The folder of a run that died after it had judged this update."""

    def report(values: Mapping[str, Any]) -> None:
        if values["step"] == at:
            raise KilledError

    run = a_run(config, shards, workspace, report)
    with pytest.raises(KilledError):
        run.execute()
    assert finished(run.folder) is None
    return run.folder


def ending(run: Run, outcome: Outcome | None) -> dict[str, Any]:
    """All that training changes, bit for bit, and all that it says."""
    assert outcome is not None
    tensors = {
        **{f"model.{name}": t for name, t in run.model.state_dict().items()},
        **{f"average.{name}": t for name, t in run.averaged.tensors.items()},
        **{f"optimizer.{name}": t for name, t in optimizer_tensors(run.optimizer).items()},
        **load_file(Path(outcome.bundle) / "weights.safetensors"),
    }
    said = (outcome.history, outcome.scores, outcome.best_step, outcome.last_report)
    return {"tensors": {name: t.numpy().tobytes() for name, t in tensors.items()}, "said": said}


def script(code: str, config: Experiment, shards: ShardSet, *words: object) -> list[str]:
    """A process of its own that trains; `config`, `shards`, `a_run` and `sys.argv[3:]` are set."""
    begin = """
import json, os, signal, sys, time, torch
from pathlib import Path
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.lease import leased
from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.errors import VinedresserError
from vinedresser.training.run import Run
from vinedresser.training.outcome import run_folder
from vinedresser.tracking import NullTracker
from vinedresser.training.device import Device
torch.set_num_threads(1)
config, shards = Experiment.from_json(json.loads(sys.argv[1])), open_shards(Path(sys.argv[2]))
def a_run(folder, device=Device(torch.device("cpu"), None), report=lambda _: None):
    return Run(config, shards, folder, device=device, tracker=NullTracker(), report=report)
"""
    plain = json.dumps(config.to_json())
    return [sys.executable, "-c", begin + code, plain, str(shards.folder), *map(str, words)]
