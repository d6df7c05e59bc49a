"""Where a run stands, as a value; who shows it, and how, is somebody else's."""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from vinedresser.config import Experiment
from vinedresser.training.fit import evaluation_steps


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by the inferred metric.

    Attributes:
        metric: its name.
        value: in the metric's unit.
        step: the update after which it was reached.
    """

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Progress:
    """Told before the first update, after each, and around evaluations; by rank 0 only.

    Attributes:
        step: updates done, those before a resumption included.
        steps: of the whole run.
        epoch: passes over the training data so far, as a fraction.
        evaluations_left: still to come.
        phase: what happens next.
        loss: nats a target token since the last log line; None where no log line was written, for
            reading it would wait for the device.
        tokens_per_second: real target tokens, since the last log line; None likewise.
        best: None before the first evaluation.
    """

    step: int
    steps: int
    epoch: float
    evaluations_left: int
    phase: Literal["training", "evaluating"] = "training"
    loss: float | None = None
    tokens_per_second: float | None = None
    best: Best | None = None


Tell = Callable[[Progress], None]


def untold(progress: Progress) -> None:
    """Tells nobody."""
    del progress


class Teller:
    """Makes Progress of what happens in a run.

    Attributes:
        best: the best evaluation so far; whoever evaluates sets it.
    """

    def __init__(self, tell: Tell, experiment: Experiment, *, batches_an_epoch: int) -> None:
        self.best: Best | None = None
        self._tell, self._steps = tell, experiment.steps
        self._epochs_a_step = experiment.batches_an_update / batches_an_epoch
        self._due = sorted(evaluation_steps(experiment))

    def __call__(self, step: int, logged: Mapping[str, float]) -> None:
        """After an update, with what was logged at it, or nothing."""
        self._tell(self._at(step, logged))

    def judging(self, step: int) -> None:
        """Before the evaluation of a step."""
        self._tell(self._at(step, {}, is_judged=True))

    def _at(self, step: int, logged: Mapping[str, float], *, is_judged: bool = False) -> Progress:
        return Progress(
            step,
            self._steps,
            step * self._epochs_a_step,
            len(self._due) - bisect.bisect_right(self._due, step) + is_judged,
            "evaluating" if is_judged else "training",
            logged.get("train/nats_per_token"),
            logged.get("train/tokens_per_second"),
            self.best,
        )
