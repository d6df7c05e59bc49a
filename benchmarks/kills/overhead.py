"""What a checkpoint at the default interval costs, as a share of the time of the steps between."""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.corpora.multi30k import multi30k
from search_spaces.demo import EXPERIMENT as DEMO
from vinedresser.config import Experiment
from vinedresser.data.batching.reader import stream
from vinedresser.data.shards import prepare
from vinedresser.tracking import NullTracker
from vinedresser.training.device import resolve_device
from vinedresser.training.outcome import run_folder
from vinedresser.training.run import Run
from vinedresser.training.step import training_steps
from vinedresser.workspace.layout import Workspace

_ROOT = Path(__file__).parents[2]
_SAVES = 5
_WARM_UP = 5


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Times steps and saves of the demo's model and of transformer-small; prints a table."""
    found = {}
    for name, config, steps in _experiments():
        found[name] = _one(config, folder / name, steps)
    titles = ("parameters", "MB", "ms a step", "ms a save", "of it fsync", "every", "share")
    print(f"{'':26}" + "".join(f"{title:>13}" for title in titles))
    for name, row in found.items():
        print(f"{name:26}" + "".join(f"{row[title]:13.5g}" for title in titles))
    return found


def _experiments() -> Iterator[tuple[str, Experiment, int]]:
    """Name, experiment, steps that are timed."""
    yield "the demo's model", DEMO, DEMO.checkpoint_every
    plain: dict[str, Any] = {"task": multi30k().to_json(), "model": {"kind": "transformer-small"}}
    # 500 steps would take minutes: steps between two checkpoints are alike.
    yield "transformer-small", Experiment.from_json(plain), 40


def _one(config: Experiment, folder: Path, count: int) -> dict[str, float]:
    config = config.override({"compute.threads": 1, "compute.device": "cpu"})
    shards = prepare(config.task, folder / "shards", executor="in_process")
    where = run_folder(config, shards, Workspace(folder))
    run = Run(
        config,
        shards,
        where,
        device=resolve_device(config.compute),
        tracker=NullTracker(),
    )
    batches = stream(shards, config.batch, seed=config.seed)
    steps = training_steps(run.objective, batches, run.optimizer, config, device=run.device)
    for _ in range(_WARM_UP):
        run.ema.update(next(steps).index)
    began = time.perf_counter()
    for _ in range(count):
        run.ema.update(next(steps).index)
    step_seconds = (time.perf_counter() - began) / count
    batches.close()
    run.lease.take(force=True)
    # As after an evaluation: the best weights so far are stored, too.
    run.evaluator.best = {name: tensor.clone() for name, tensor in run.ema.tensors.items()}
    saves, syncs = [], []
    for number in range(1, _SAVES + 1):
        with _timed_fsync() as spent:
            began = time.perf_counter()
            run._checkpoint(number)
            saves.append(time.perf_counter() - began)
        syncs.append(sum(spent))
    newest = sorted(where.checkpoints.glob("step-*"))[-1]
    save, every = statistics.median(saves), config.checkpoint_every
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "MB": sum(p.stat().st_size for p in newest.iterdir()) / 1e6,
        "ms a step": 1e3 * step_seconds,
        "ms a save": 1e3 * save,
        "of it fsync": 1e3 * statistics.median(syncs),
        "every": every,
        "share": round(save / (every * step_seconds), 5),
    }


@contextmanager
def _timed_fsync() -> Iterator[list[float]]:
    """The seconds of each fsync in the block."""
    real, spent = os.fsync, list[float]()

    def timed(descriptor: int) -> None:
        began = time.perf_counter()
        real(descriptor)
        spent.append(time.perf_counter() - began)

    os.fsync = timed  # type: ignore[assignment]
    try:
        yield spent
    finally:
        os.fsync = real
