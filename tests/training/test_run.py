"""The loop: progress, order of effects, and attention pictures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.memory_tracker import MemoryTracker
from tests.short_run import MonitoredRun, a_run, experiment, killed_run
from vinedresser.data.batching.reader import Batches
from vinedresser.data.shards import ShardSet
from vinedresser.errors import DivergedError, InterruptedRunError
from vinedresser.tracking import NullTracker
from vinedresser.training.listener import Best, Progress
from vinedresser.workspace.stopping import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_progress_from_the_first_update_to_the_last(reversal: ShardSet, tmp_path: Path):
    config = experiment(reversal, **{"batch.per_update": 2})
    tracker, told = MemoryTracker(), list[Progress]()
    run = a_run(config, reversal, tmp_path, tracker=tracker)
    run.listener.progress = told.append
    outcome = run.execute()
    assert outcome is not None
    per_epoch = Batches(reversal, config.batch, seed=1).per_epoch
    assert [p.step for p in told if p.phase == "training" and p.step % 8] == [
        step for step in range(25) if step % 8
    ]
    assert all(p.steps == 24 and p.epoch == pytest.approx(2 * p.step / per_epoch) for p in told)
    assert [(p.step, p.evaluations_left) for p in told if p.phase == "evaluating"] == [
        (8, 3), (16, 2), (24, 1)
    ]  # fmt: skip
    assert (told[0].step, told[0].evaluations_left, told[0].best) == (0, 3, None)
    assert (told[-1].step, told[-1].evaluations_left) == (24, 0)
    # Every log line's loss is the one that was logged, and no other step waits for its own.
    logged = [(step, value) for key, value, step in tracker.metrics if key == "train/loss"]
    assert [(p.step, p.loss) for p in told if p.loss is not None] == logged
    improved, lowest = [], math.inf
    for entry in outcome.history:
        if entry["value"] < lowest:
            lowest = entry["value"]
            improved.append(Best("per", lowest, int(entry["step"])))
    assert list(dict.fromkeys(p.best for p in told if p.best)) == improved
    assert told[-1].best == Best("per", outcome.value, outcome.best_step)


def test_a_resumed_run_stands_where_it_was(reversal: ShardSet, tmp_path: Path):
    config = experiment(reversal)
    killed_run(config, reversal, tmp_path, 16)
    told = list[Progress]()
    run = a_run(config, reversal, tmp_path)
    run.listener.progress = told.append
    assert run.execute() is not None
    first = told[0]
    assert (first.step, first.evaluations_left) == (15, 2)
    assert first.epoch == pytest.approx(15 / run.batches.per_epoch)
    assert first.best is not None
    assert first.best.step == 8


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [8, 16, 24]), (2, [16]), (3, [24])])
def test_attention_is_pictured_at_every_so_many_evaluations(
    reversal: ShardSet, tmp_path: Path, every: int, steps: list[int]
):
    config = experiment(reversal, **{"evaluation.attention_every": every})
    tracker = MemoryTracker()
    assert a_run(config, reversal, tmp_path, tracker=tracker).execute() is not None
    found = [(value, step) for key, value, step in tracker.metrics if key == "dev/diagonality"]
    assert [step for _, step in found] == steps
    assert all(-1 <= value <= 1 for value, _ in found)
    pictures = {name for name in tracker.artifacts if name.startswith("attention/")}
    assert pictures == {f"attention/decoder.0.dec_enc/step-{step:08d}.png" for step in steps}


def test_nothing_is_drawn_for_nobody(
    reversal: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("vinedresser.figures.attention_maps.attention_figure", refuse)
    config = experiment(reversal, **{"evaluation.attention_every": 1})
    assert a_run(config, reversal, tmp_path, tracker=NullTracker()).execute() is not None


def test_an_update_is_logged_then_evaluated_then_stored(reversal: ShardSet, tmp_path: Path):
    config = experiment(
        reversal, steps=8, **{"evaluation.num_evaluations": 2, "checkpoint_every": 4}
    )
    run, events = a_run(config, reversal, tmp_path), list[tuple[str, float]]()

    def log(metrics: Mapping[str, float], step: int) -> None:
        events.append(("log" if "train/learning_rate" in metrics else "evaluate", step))

    store = run._checkpoint
    run.listener.log = log
    run._checkpoint = lambda step: (events.append(("checkpoint", step)), store(step))
    run.execute()
    at_four = [("log", 4), ("evaluate", 4), ("checkpoint", 4)]
    logs = [("log", 1), ("log", 2), ("log", 3)]
    assert events[:6] == [*logs, *at_four]
    assert events[-3:] == [("log", 8), ("evaluate", 8), ("checkpoint", 8)]


class StopAt(StopRequest):
    """Request of a stop at a step."""

    is_requested = True

    def __init__(self, run: MonitoredRun, step: int) -> None:
        self.run, self.at = run, step

    def __call__(self) -> bool:
        return self.run.step >= self.at


def test_a_stop_request_stores_and_ends(reversal: ShardSet, tmp_path: Path):
    run = a_run(experiment(reversal), reversal, tmp_path)
    run.should_stop = StopAt(run, 6)
    with pytest.raises(InterruptedRunError, match="stopped on request at step 7; run the same"):
        run.execute()
    assert [path.name for path in run.folder.checkpoints.iterdir()][-1:] == ["step-00000007"]


def test_a_run_that_diverges_is_neither_evaluated_nor_stored(reversal: ShardSet, tmp_path: Path):
    config = experiment(reversal, **{"optim.lr": 1e30, "optim.clip_norm": 1e30})
    run = a_run(config, reversal, tmp_path)
    with pytest.raises(DivergedError, match=r"step \d: loss (nan|inf)"):
        run.execute()
    assert run.evaluator.history == []
    assert not run.folder.checkpoints.exists()
    assert all(p.isfinite().all() for p in run.model.parameters())
