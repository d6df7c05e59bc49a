"""Step schedule: what is due after each update of a run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vinedresser.config import Experiment

if TYPE_CHECKING:
    from vinedresser.training.step import Step

# Log lines per run: enough for a smooth curve, few enough for one batch of a tracking server.
_LOG_LINES = 50


@dataclass(frozen=True)
class Due:
    """Actions due after one update."""

    log: bool
    evaluate: bool
    checkpoint: bool


class StepSchedule:
    """Log lines, evaluations and checkpoints of one run.

    Attributes:
        evaluations: 1-based steps after which the run is evaluated: evenly spread, the last step
            included.
        log_every: updates between log lines.
    """

    def __init__(self, experiment: Experiment) -> None:
        count, steps = experiment.evaluation.num_evaluations, experiment.steps
        self.evaluations = frozenset(round(steps * (i + 1) / count) for i in range(count))
        self.log_every = max(1, steps // _LOG_LINES)
        self._checkpoint_every = experiment.checkpoint_every

    def due(self, step: "Step") -> Due:
        """Return what is due after an update.

        The metrics window closes at checkpoints too, so that a resumed run logs what the
        uninterrupted one does. A run that stops writes a checkpoint only; its evaluation, if one
        is due, is made up for when it resumes.
        """
        evaluate = step.index in self.evaluations and not step.stop
        checkpoint = step.index % self._checkpoint_every == 0 or step.stop
        log = step.index % self.log_every == 0 or evaluate or checkpoint
        return Due(log, evaluate, checkpoint)

    def evaluations_left(self, step: int) -> int:
        """Return how many evaluations come after a step."""
        return sum(at > step for at in self.evaluations)
