"""Exponential moving average of the weights, which is evaluated and shipped."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Exponential moving average of the weights (Polyak and Juditsky 1992), bias-free early on.

    With `decay` 0 it equals the model's own weights.

    Attributes:
        tensors: name -> averaged tensor, on the weight's device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Args: the model, whose weights are followed; `optim.ema_decay` in [0, 1)."""
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self._own = dict(model.state_dict())
        self._names = [n for n, t in self._own.items() if t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after a 1-based step; early steps average over fewer."""
        decay = min(self.decay, step / (step + 10))
        torch._foreach_lerp_(
            [self.tensors[name] for name in self._names],
            [self._own[name] for name in self._names],
            1 - decay,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged tensors by name."""
        return self.tensors

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy averaged tensors in."""
        for name, tensor in state.items():
            self.tensors[name].copy_(tensor)
