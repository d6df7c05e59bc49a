"""Positional encodings (methods.md 57).

B sentences, T positions, D features.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

PositionKind = Literal["sinusoidal", "learned", "one_hot", "none"]


def sinusoids(length: int, features: int) -> Tensor:
    """Return (length, features): PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(same).

    Vaswani et al. 2017, methods.md 57. |PE(p)|^2 = D/2; the distance of two rows depends on the
    difference of their positions only.

    Raises:
        ValueError: an odd number of features.
    """
    if features % 2:
        raise ValueError(f"{features} features; sinusoids need an even number")
    positions = torch.arange(length, dtype=torch.float64)[:, None]
    rates = torch.exp(
        torch.arange(0, features, 2, dtype=torch.float64) * -(math.log(1e4) / features)
    )
    angles = positions * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(length, features).float()


def _fixed(kind: PositionKind, features: int) -> Tensor | None:
    if kind == "sinusoidal":
        # Longer than most sentences; it grows where it has to.
        return sinusoids(256, features)
    return torch.eye(features) if kind == "one_hot" else None


class Positions(nn.Module):
    """Sum of embeddings and encodings of their positions.

    sinusoidal: `sinusoids`, for any length; learned: a trained row a position; one_hot: 1 at the
    feature of the position's number, so that any two differ by sqrt 2; none: nothing is added.

    A finite table is clamped: positions from its last row on share that row. That is
    `max_positions` rows for learned and `features` rows for one_hot.
    """

    def __init__(self, kind: PositionKind, features: int, *, max_positions: int = 512) -> None:
        super().__init__()
        self.kind: PositionKind = kind
        self.table: Tensor | None
        if kind == "learned":
            # As tokens' embeddings, which the model scales or does not.
            self.table = nn.Parameter(torch.randn(max_positions, features) * features**-0.5)
        else:
            self.register_buffer("table", _fixed(kind, features), persistent=False)

    def forward(self, x_BTD: Tensor, first: int = 0) -> Tensor:
        """Map (B, T, D) -> (B, T, D).

        `first` is the 0-based number of the first position.
        """
        if self.table is None:
            return x_BTD
        end, size = first + x_BTD.shape[1], len(self.table)
        if end <= size:
            return x_BTD + self.table[first:end]
        if self.kind == "sinusoidal":
            self.table = sinusoids(2 * end, self.table.shape[1]).to(self.table)
            return x_BTD + self.table[first:end]
        rows = torch.arange(first, end, device=self.table.device).clamp(max=size - 1)
        return x_BTD + self.table[rows]

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        return self.kind
