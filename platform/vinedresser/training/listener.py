"""Progress of a run as a value, and the listener that receives progress and reports of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


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
    """Progress of a run: before the first update, after each, and around evaluations.

    Attributes:
        step: updates done, those before a resumption included.
        steps: of the whole run.
        epoch: passes over the training data so far, as a fraction.
        evaluations_left: still to come.
        phase: next activity.
        loss: nats per target token since the last log line; None where no log line was written,
            because reading it would wait for the device.
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


class Listener:
    """Receiver of the output of a run. Every method does nothing; subclasses override some.

    Rank 0 calls all of them. Other ranks call `evaluated` and `finished` with an empty mapping,
    equally often, because a scheduler may use them as a barrier.
    """

    def progress(self, progress: Progress) -> None:
        """Receive the progress after an update and around evaluations."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Receive the metrics of a closed window or of an evaluation."""

    def evaluated(self, report: Mapping[str, Any]) -> None:
        """Receive the report of an evaluation that is not the last one."""

    def finished(self, report: Mapping[str, Any]) -> None:
        """Receive the last report, after the run's outcome is on disk."""
