"""fit() consumes the steps: averages weights; logs, evaluates and checkpoints on the way."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vinedresser.config import Experiment
from vinedresser.errors import TrainingError
from vinedresser.train.steps import Step


class AveragedWeights:
    """Exponential moving average of the weights (Polyak and Juditsky 1992), bias-free early on.

    With `decay` 0 it is the model's own weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self._own = dict(model.state_dict())
        self._names = [n for n, t in self._own.items() if t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves towards the model after a 1-based step; early steps average over fewer."""
        decay = min(self.decay, step / (step + 10))
        torch._foreach_lerp_(
            [self.tensors[name] for name in self._names],
            [self._own[name] for name in self._names],
            1 - decay,
        )


class Window:
    """The steps between two log lines. Tensors are read only when a line is written."""

    def __init__(self, clip_norm: float) -> None:
        self._clip_norm = clip_norm
        self._steps: list[Step] = []
        self._since = time.perf_counter()

    def add(self, step: Step) -> None:
        """Takes a step in without waiting for the device."""
        self._steps.append(step)

    def close(self) -> dict[str, float]:
        """What is logged, under the house's metric keys; the window is empty afterwards.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        nats = float(torch.stack([step.nats for step in self._steps]).sum())
        tokens = int(torch.stack([step.tokens for step in self._steps]).sum())
        norms = torch.stack([step.gradient_norm for step in self._steps])
        last, loss, largest = self._steps[-1], nats / tokens, float(norms.max())
        if not (math.isfinite(loss) and math.isfinite(largest)):
            raise TrainingError(
                f"step {last.index}: loss {loss:.3g}, gradient norm {largest:.3g}; "
                "lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps"
            )
        seconds, steps = time.perf_counter() - self._since, len(self._steps)
        self.restart()
        return {
            "train/nats_per_token": loss,
            "train/learning_rate": last.learning_rate,
            "train/gradient_norm_max": largest,
            "train/clipped_share": float((norms > self._clip_norm).float().mean()),
            "train/gold_share": last.epsilon,
            "train/tokens_per_second": tokens / seconds,
            "train/seconds_per_step": seconds / steps,
        }

    def restart(self) -> None:
        """Empties the window and starts its clock."""
        self._steps, self._since = [], time.perf_counter()


@dataclass(frozen=True)
class Effects:
    """What fit() does to the outside, and when.

    Attributes:
        log: takes metrics and the step.
        evaluate: judges the averaged weights at a step; called at each of `evaluate_at`.
        checkpoint: stores everything at a step.
        log_every: updates between log lines.
        evaluate_at: 1-based steps.
        checkpoint_every: updates between checkpoints.
    """

    log: Callable[[Mapping[str, float], int], None]
    evaluate: Callable[[int], None]
    checkpoint: Callable[[int], None]
    log_every: int
    evaluate_at: frozenset[int]
    checkpoint_every: int


def evaluation_steps(experiment: Experiment) -> frozenset[int]:
    """The steps after which a run is evaluated, evenly spread, the last one included."""
    times, steps = experiment.evaluation.times, experiment.steps
    return frozenset(round(steps * (i + 1) / times) for i in range(times))


def fit(
    steps: Iterator[Step], averaged: AveragedWeights, effects: Effects, *, clip_norm: float
) -> None:
    """Runs the steps; logs, evaluates and checkpoints on the way. Sums, not means, are kept.

    Raises:
        TrainingError: loss or gradient is not finite.
    """
    window = Window(clip_norm)
    for step in steps:
        averaged.update(step.index)
        window.add(step)
        if step.index % effects.log_every == 0 or step.index in effects.evaluate_at:
            effects.log(window.close(), step.index)
        if step.index in effects.evaluate_at:
            effects.evaluate(step.index)
            window.restart()
        if step.index % effects.checkpoint_every == 0:
            effects.checkpoint(step.index)
