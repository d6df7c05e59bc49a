"""Convolutions over positions with features last, as one matrix product over windows.

B sentences, T positions, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def windows(x_BTD: Tensor, kernel: int, *, left: int, right: int, stride: int = 1) -> Tensor:
    """(B, T, D) -> (B, (T + left + right - kernel) // stride + 1, kernel * D).

    Position u holds x[u * stride - left + i] for i = 0..kernel - 1 side by side, 0 outside of x.
    """
    x_BTD = F.pad(x_BTD, (0, 0, left, right))
    last = x_BTD.shape[1] - kernel
    return torch.cat([x_BTD[:, i : last + i + 1 : stride] for i in range(kernel)], -1)
