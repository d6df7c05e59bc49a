"""A run of a second, for the tests that hurt it: a tiny Transformer learns to reverse."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.memory_tracker import MemoryTracker
from vinedresser.config import Experiment
from vinedresser.data.shards import ShardSet
from vinedresser.health.monitor import RunMonitor
from vinedresser.health.series import RunFacts
from vinedresser.training.device import Device
from vinedresser.training.listener import Listener
from vinedresser.training.optimizer import OptimizerState
from vinedresser.training.outcome import Outcome, finished, run_folder
from vinedresser.training.run import Monitor, Run
from vinedresser.workspace.layout import RunFolder, Workspace

HERE = Device(torch.device("cpu"), None)
TRANSFORMER = {
    "kind": "transformer", "d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1,
}  # fmt: skip
# What draws at random, and what is trained beside weights.
GATED = {
    "objective.likelihood.sampling": {"probability": 0.5, "decay_steps": 10},
    "model.concrete_heads": ["enc_self", "dec_enc"],
    "objective.head_penalty.weight": 0.5,
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


class Reports(Listener):
    """Passes the reports of a run to a function; without one, forgets them."""

    def __init__(self, report: Callable[[Mapping[str, Any]], None] = lambda _: None) -> None:
        self.evaluated = self.finished = report  # type: ignore[method-assign]


class MonitoredRun(Run):
    """A run with the monitor that a command gives it.

    Attributes:
        health: the monitor.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        facts = RunFacts.of(self.experiment, vocabulary=self.tokenizers[1].size)
        self.tracker, every = named["tracker"], self.schedule.log_every
        self.health = RunMonitor(self.model, facts, self.tracker, every=every)

    def execute(self, monitor: Monitor | None = None) -> Outcome | None:
        return super().execute(monitor or self.health)


def folder_of(config: Experiment, shards: ShardSet, workspace: Path) -> RunFolder:
    return run_folder(config, shards, Workspace(workspace))


def a_run(
    config: Experiment,
    shards: ShardSet,
    workspace: Path,
    report: Callable[[Mapping[str, Any]], None] = lambda _: None,
    **more: Any,
) -> MonitoredRun:
    """The run that `vinedresser train` would make, in this process."""
    folder, given = folder_of(config, shards, workspace), {"tracker": MemoryTracker(), **more}
    listener = Reports(report)
    return MonitoredRun(config, shards, folder, device=HERE, listener=listener, **given)


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
    return run.folder.path


def ending(run: Run, outcome: Outcome | None) -> dict[str, Any]:
    """All that training changes, bit for bit, and all that it says."""
    assert outcome is not None
    tensors = {
        **{f"model.{name}": t for name, t in run.model.state_dict().items()},
        **{f"average.{name}": t for name, t in run.ema.tensors.items()},
        **{
            f"optimizer.{name}": t for name, t in OptimizerState(run.optimizer).state_dict().items()
        },
        **load_file(Path(outcome.bundle) / "weights.safetensors"),
    }
    said = (outcome.history, outcome.scores, outcome.best_step, outcome.last_report)
    return {"tensors": {name: t.numpy().tobytes() for name, t in tensors.items()}, "said": said}


def script(
    code: str, config: Experiment, shards: ShardSet, *words: object
) -> tuple[str, list[str]]:
    """Code for a process that trains, and its arguments.

    The code has `config`, `shards`, `a_run` and `sys.argv[3:]`.
    """
    begin = """
import json, os, signal, sys, time, torch
from pathlib import Path
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.lease import leased
from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.errors import VinedresserError
from vinedresser.training.listener import Listener
from vinedresser.training.run import Run
from vinedresser.training.outcome import run_folder
from vinedresser.workspace.layout import RunFolder, Workspace
from vinedresser.tracking import NullTracker
from vinedresser.training.device import Device
torch.set_num_threads(1)
config, shards = Experiment.from_json(json.loads(sys.argv[1])), open_shards(Path(sys.argv[2]))
def a_run(folder, device=Device(torch.device("cpu"), None), report=lambda _: None):
    listener = Listener()
    listener.evaluated = listener.finished = report
    tracker = NullTracker()
    return Run(config, shards, folder, device=device, tracker=tracker, listener=listener)
def folder_of(config, shards, workspace):
    return run_folder(config, shards, Workspace(Path(workspace)))
"""
    plain = json.dumps(config.to_json())
    return begin + code, [plain, str(shards.folder), *map(str, words)]
