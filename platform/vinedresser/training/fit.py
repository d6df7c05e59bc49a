"""fit() consumes the steps: averages weights; logs, evaluates and checkpoints on the way."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vinedresser.config import Experiment
from vinedresser.errors import DivergedError, InterruptedRunError
from vinedresser.training.step import Step


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


# A loss over twice the lowest of the run and over twice that of uniform guessing is no
# fluctuation: with warm-up too short, losses of 20 to 10,000 nats were seen, healthy runs start
# at 1.0 to 1.2 times ln |V| and fall.
_DIVERGED = 2.0


class Window:
    """The steps between two log lines. Tensors are read only when a line is written.

    Attributes:
        skipped: updates of the whole run that were left out because they were not finite.
        lowest: the lowest loss of a window of the run, nats a token.
    """

    def __init__(
        self,
        clip_norm: float,
        *,
        max_skipped: int = 0,
        uniform: float = math.inf,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        """Args: clipping norm, updates that may be left out, ln |V| in nats, sum over ranks."""
        self._clip_norm, self._max_skipped, self._uniform = clip_norm, max_skipped, uniform
        self._total = total
        self.skipped, self.lowest = 0, math.inf
        self.bad: list[Step] = []
        self._steps: list[Step] = []
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Step) -> None:
        """Takes a step in without waiting for the device."""
        self._steps.append(step)

    def close(self) -> dict[str, float]:
        """What is logged, under the house's metric keys; the window is empty afterwards.

        The steps that were left out stand in `bad` until the next call, and in no mean.

        Raises:
            DivergedError: more steps than allowed are not finite, or the loss has exploded.
        """
        norms = torch.stack([step.gradient_norm for step in self._steps])
        nats = torch.stack([step.nats for step in self._steps])
        is_sound = torch.isfinite(norms) & torch.isfinite(nats)
        self.bad = [s for s, sound in zip(self._steps, is_sound.tolist(), strict=True) if not sound]
        self.skipped += len(self.bad)
        last = self._steps[-1]
        if self.skipped > self._max_skipped:
            worst = self.bad[0] if self.bad else last
            raise DivergedError(
                f"step {worst.index}: loss {float(worst.nats / worst.tokens):.3g} nats a token, "
                f"gradient norm {float(worst.gradient_norm):.3g}; lower optim.lr or "
                "optim.clip_norm, lengthen optim.warmup_steps, or allow optim.max_skipped"
            )
        counts = torch.stack([step.tokens for step in self._steps]).to(nats.device)
        # float64: exact for tokens, and 1e-16 of nats whatever the number of ranks.
        sums = torch.stack([nats[is_sound].double().sum(), counts[is_sound].double().sum()])
        all_nats, tokens = self._total(sums).tolist()
        loss = all_nats / tokens if tokens else math.nan
        if loss > _DIVERGED * max(self.lowest, self._uniform):
            raise DivergedError(
                f"step {last.index}: loss {loss:.3g} nats a token, it was {self.lowest:.3g}, and "
                f"{self._uniform:.3g} is what guessing gives; lower optim.lr or optim.clip_norm, "
                "or lengthen optim.warmup_steps"
            )
        self.lowest = min(self.lowest, loss)
        sound = norms[is_sound]
        seconds, steps = time.perf_counter() - self._since, len(self._steps)
        self.restart()
        return {
            "train/nats_per_token": loss,
            "train/learning_rate": last.learning_rate,
            "train/gradient_norm_max": float(sound.max()) if len(sound) else math.nan,
            "train/gradient_norm_mean": float(sound.mean()) if len(sound) else math.nan,
            "train/clipped_share": float((norms > self._clip_norm).float().mean()),
            "train/skipped_updates": float(self.skipped),
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
        tell_bad: takes a step that was left out because it was not finite.
        log_every: updates between log lines.
        evaluate_at: 1-based steps.
        checkpoint_every: updates between checkpoints.
        tell: takes each step as it was made, and what was logged with it: mostly nothing.
    """

    log: Callable[[Mapping[str, float], int], None]
    evaluate: Callable[[int], None]
    checkpoint: Callable[[int], None]
    tell_bad: Callable[[Step], None]
    log_every: int
    evaluate_at: frozenset[int]
    checkpoint_every: int
    tell: Callable[[int, Mapping[str, float]], None] = lambda _step, _logged: None


def evaluation_steps(experiment: Experiment) -> frozenset[int]:
    """The steps after which a run is evaluated, evenly spread, the last one included."""
    times, steps = experiment.evaluation.num_evaluations, experiment.steps
    return frozenset(round(steps * (i + 1) / times) for i in range(times))


def fit(steps: Iterator[Step], averaged: AveragedWeights, window: Window, effects: Effects) -> None:
    """Runs the steps; logs, evaluates and checkpoints on the way. Sums, not means, are kept.

    Windows close at checkpoints, so that a resumed run logs what the uninterrupted one does, and
    nothing is stored that was not looked at.

    Raises:
        DivergedError: the run is lost; nothing of it is stored.
        InterruptedRunError: told to stop, after a checkpoint.
    """
    for step in steps:
        averaged.update(step.index)
        window.add(step)
        is_judged = step.index in effects.evaluate_at
        is_stored = step.index % effects.checkpoint_every == 0
        logged: Mapping[str, float] = {}
        if step.index % effects.log_every == 0 or is_judged or is_stored or step.is_last:
            logged = _log_window(window, effects, step.index)
        effects.tell(step.index, logged)
        if step.is_last:
            # The evaluation that is due here is made up for when the run goes on.
            effects.checkpoint(step.index)
            raise InterruptedRunError(
                f"told to stop; checkpoint at step {step.index}, the same command goes on there"
            )
        if is_judged:
            effects.evaluate(step.index)
            window.restart()
        if is_stored:
            effects.checkpoint(step.index)


def _log_window(window: Window, effects: Effects, step: int) -> Mapping[str, float]:
    try:
        metrics = window.close()
    finally:
        for bad in window.bad:
            effects.tell_bad(bad)
    effects.log(metrics, step)
    return metrics
