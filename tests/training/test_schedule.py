"""Step schedule: log lines, evaluations and checkpoints of a run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vinedresser.config import Experiment
from vinedresser.training.schedule import Due, StepSchedule
from vinedresser.training.step import Step


def schedule(**changes: object) -> StepSchedule:
    corpus = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
    task = {"name": "t", "corpus": corpus, "tokenizer": {"kind": "symbols"}, "metric": "per"}
    base = Experiment.from_json({"task": task, "model": {"kind": "transformer"}})
    return StepSchedule(base.override({"optim.warmup_steps": 0, **changes}))


def due(of: StepSchedule, index: int, *, stop: bool = False) -> Due:
    return of.due(Step(index, *[torch.tensor(1.0)] * 3, 0.1, stop=stop))


@given(steps=st.integers(8, 5000), data=st.data())
def test_evaluations_are_spread_and_the_last_is_at_the_end(steps, data):
    times = data.draw(st.integers(1, min(steps, 200)))
    found = schedule(steps=steps, **{"evaluation.num_evaluations": times})
    at = sorted(found.evaluations)
    assert len(at) == times
    assert at[0] >= 1
    assert at[-1] == steps
    gaps = [b - a for a, b in zip([0, *at], at, strict=False)]
    assert max(gaps) - min(gaps) <= 2
    assert [found.evaluations_left(step) for step in (0, at[0], steps)] == [times, times - 1, 0]


def test_windows_close_at_evaluations_checkpoints_and_stops():
    found = schedule(
        steps=150, checkpoint_every=40, **{"evaluation.num_evaluations": 2}
    )  # logs every 3
    assert due(found, 1) == Due(log=False, evaluate=False, checkpoint=False)
    assert due(found, 3) == Due(log=True, evaluate=False, checkpoint=False)
    assert due(found, 40) == Due(log=True, evaluate=False, checkpoint=True)
    assert due(found, 75) == Due(log=True, evaluate=True, checkpoint=False)
    assert due(found, 4, stop=True) == Due(log=True, evaluate=False, checkpoint=True)


@pytest.mark.parametrize("index", [75, 150])
def test_a_run_that_stops_at_an_evaluation_stores_and_makes_up_for_it_later(index):
    found = schedule(steps=150, **{"evaluation.num_evaluations": 2})
    assert due(found, index, stop=True) == Due(log=True, evaluate=False, checkpoint=True)
