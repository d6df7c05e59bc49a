"""Where a run stands, as a value; who shows it, and how, is somebody else's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


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
