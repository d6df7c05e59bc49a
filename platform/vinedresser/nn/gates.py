"""Hard concrete gates: one number in [0, 1] per head, exactly 0 and 1 with positive probability.

Louizos et al. 2018; for attention heads Voita et al. 2019; methods.md 80-82.
"""

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 0.33
LOW, HIGH = -0.1, 1.1  # the stretch (gamma, zeta)
# Keeps the uniform draw off 0 and 1, where its logit is infinite.
_EPS = 1e-6
# P(open) = sigmoid(log_alpha - TEMPERATURE * ln(-LOW / HIGH)); this shift is +0.791.
_OPEN_SHIFT = -TEMPERATURE * math.log(-LOW / HIGH)
# P(open) = .97 and a deterministic gate of exactly 1: adding gates changes no output.
OPEN_LOG_ALPHA = math.log(0.97 / 0.03) - _OPEN_SHIFT


class HeadGates(nn.Module):
    """Gates of the H heads of one attention layer, independent of the input.

    Attributes:
        log_alpha: (H,) location; above 2.398 the deterministic gate is 1, below -2.398 it is 0.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((num_heads,), OPEN_LOG_ALPHA))

    def forward(self, batch_size: int) -> Tensor:
        """(B, H) gates: a sample per sentence in training, the deterministic ones else.

        A draw a sentence instead of one a batch divides the variance of the gradient by B.
        """
        if not self.training:
            return self.deterministic().expand(batch_size, -1)
        log_alpha = self.log_alpha.float()
        u = torch.rand(batch_size, len(log_alpha), device=log_alpha.device)
        u = u * (1 - 2 * _EPS) + _EPS
        s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / TEMPERATURE)
        return (s * (HIGH - LOW) + LOW).clamp(0, 1)

    def deterministic(self) -> Tensor:
        """Return gates (H,) of evaluation: clamp(sigmoid(log_alpha) * (zeta - gamma) + gamma)."""
        return (torch.sigmoid(self.log_alpha.float()) * (HIGH - LOW) + LOW).clamp(0, 1)

    def open_probability(self) -> Tensor:
        """Return P(gate != 0), (H,) = sigmoid(log_alpha - beta * ln(-gamma / zeta))."""
        return torch.sigmoid(self.log_alpha + _OPEN_SHIFT)


def head_gates(model: nn.Module) -> list[HeadGates]:
    """Return all gates of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, HeadGates)]


def expected_open_share(model: nn.Module) -> Tensor:
    """Return the mean of P(gate != 0) over all gates of a model, a scalar in (0, 1).

    The L0 penalty is lambda times this, in nats per token, so that lambda means the same for
    any number of layers and heads (methods.md 82; Voita et al. write a sum over all heads, and
    their code takes the mean over layers of the sums).

    Raises:
        ValueError: the model has no gates.
    """
    gates = head_gates(model)
    if not gates:
        raise ValueError("the model has no head gates; set model.concrete_heads")
    # Encoder and decoder may be on two devices.
    device = gates[-1].log_alpha.device
    return torch.cat([gate.open_probability().to(device) for gate in gates]).mean()
