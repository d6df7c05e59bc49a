"""Positional encodings."""

import math

import torch
from torch import Tensor


def sinusoids(length: int, features: int) -> Tensor:
    """(length, features) float32: PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(same).

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
