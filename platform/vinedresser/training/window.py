"""Metrics window: the training metrics between two log lines."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vinedresser.errors import DivergedError
from vinedresser.training.step import Step

# A loss over twice the lowest of the run and over twice that of uniform guessing is no
# fluctuation: with warm-up too short, losses of 20 to 10,000 nats were seen, healthy runs start
# at 1.0 to 1.2 times ln |V| and fall.
_DIVERGED = 2.0


class MetricsWindow:
    """The updates between two log lines. Tensors are read only when the window closes.

    Attributes:
        skipped: updates of the whole run that were left out because they were not finite.
        lowest: the lowest loss of a window of the run, nats per token.
        not_finite: updates of the last closed window that were left out; they enter no mean.
    """

    def __init__(
        self,
        clip_norm: float,
        *,
        max_skipped: int = 0,
        uniform_loss: float = math.inf,
        all_sum: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        """Args: clipping norm, updates that may be left out, ln |V| in nats, sum over ranks."""
        self._clip_norm, self._max_skipped = clip_norm, max_skipped
        self._uniform_loss, self._all_sum = uniform_loss, all_sum
        self.skipped, self.lowest = 0, math.inf
        self.not_finite: list[Step] = []
        self._steps: list[Step] = []
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Step) -> None:
        """Add an update without waiting for the device."""
        self._steps.append(step)

    def close(self) -> dict[str, float]:
        """Return the window's metrics and empty it.

        Raises:
            DivergedError: more updates than allowed are not finite, or the loss has exploded.
        """
        norms = torch.stack([step.gradient_norm for step in self._steps])
        nll = torch.stack([step.nll for step in self._steps])
        is_finite = torch.isfinite(norms) & torch.isfinite(nll)
        self.not_finite = [
            s for s, finite in zip(self._steps, is_finite.tolist(), strict=True) if not finite
        ]
        self.skipped += len(self.not_finite)
        last = self._steps[-1]
        if self.skipped > self._max_skipped:
            bad = self.not_finite[0] if self.not_finite else last
            raise DivergedError(
                f"step {bad.index}: loss {float(bad.nll / bad.tokens):.3g} nats per token, "
                f"gradient norm {float(bad.gradient_norm):.3g}; lower optim.lr or "
                "optim.clip_norm, lengthen optim.warmup_steps, or allow optim.max_skipped"
            )
        counts = torch.stack([step.tokens for step in self._steps]).to(nll.device)
        # float64: exact for tokens, and 1e-16 of the loss whatever the number of ranks.
        sums = torch.stack([nll[is_finite].double().sum(), counts[is_finite].double().sum()])
        all_nll, tokens = self._all_sum(sums).tolist()
        loss = all_nll / tokens if tokens else math.nan
        if loss > _DIVERGED * max(self.lowest, self._uniform_loss):
            raise DivergedError(
                f"step {last.index}: loss {loss:.3g} nats per token, the lowest so far was "
                f"{self.lowest:.3g}, uniform guessing gives {self._uniform_loss:.3g}; lower "
                "optim.lr or optim.clip_norm, or lengthen optim.warmup_steps"
            )
        self.lowest = min(self.lowest, loss)
        finite = norms[is_finite]
        seconds, steps = time.perf_counter() - self._since, len(self._steps)
        self.restart()
        return {
            "train/loss": loss,
            "train/learning_rate": last.learning_rate,
            "train/gradient_norm_max": float(finite.max()) if len(finite) else math.nan,
            "train/gradient_norm_mean": float(finite.mean()) if len(finite) else math.nan,
            "train/clipped_share": float((norms > self._clip_norm).float().mean()),
            "train/skipped_updates": float(self.skipped),
            **{f"train/{name}": value for name, value in last.metrics.items()},
            "train/tokens_per_second": tokens / seconds,
            "train/seconds_per_step": seconds / steps,
        }

    def restart(self) -> None:
        """Empty the window and restart its timer."""
        self._steps, self._since = [], time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return what outlives a window."""
        return {"skipped": self.skipped, "lowest": self.lowest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what outlives a window."""
        self.skipped, self.lowest = state["skipped"], state["lowest"]
