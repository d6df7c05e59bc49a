"""Position-wise feed-forward layers, plain and gated.

B sentences, T positions, D features, F inner features.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vinedresser.nn.attention import linear
from vinedresser.nn.dropout import Dropout, ReluDropout

Activation = Literal["relu", "gelu", "glu", "geglu", "swiglu"]

_PLAIN: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
_GATING: Mapping[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "geglu": F.gelu,
    "swiglu": F.silu,
}


class FeedForward(nn.Module):
    """Two linear layers with a non-linearity between, the same at every position.

    relu, gelu: act(x W1 + b1) W2 + b2 (Vaswani et al. 2017; methods.md 51), 2DF + F + D
    parameters: 2,099,712 at 512 and 2,048.
    glu, geglu, swiglu: (act(x W + b) * (x V + c)) W2 + b2 with the sigmoid, GELU or SiLU (Shazeer
    2020), 3DF + 2F + D parameters; two thirds of F give about as many as the plain forms have.
    """

    def __init__(
        self, features: int, inner_features: int, *, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        self.gating = _GATING.get(activation)
        self.activation: Activation = activation
        # W and V side by side: one matrix product.
        width = inner_features * (1 if self.gating is None else 2)
        self.inner = linear(features, width)
        self.outer = linear(inner_features, features)
        self.dropout = ReluDropout(dropout) if activation == "relu" else Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) -> (B, T, D)."""
        inner = self.inner(x_BTD)
        if self.activation == "relu":
            inner, scale = self.dropout(inner)
            # The scale goes into the smaller factor: D rows for the tokens of a batch.
            weight = self.outer.weight if scale == 1 else self.outer.weight * scale
            return F.linear(inner, weight, self.outer.bias)
        if self.gating is None:
            inner = _PLAIN[self.activation](inner)
        else:
            gate, value = inner.chunk(2, -1)
            inner = self.gating(gate) * value
        out_BTD: Tensor = self.outer(self.dropout(inner))
        return out_BTD

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        return self.activation
