"""Normalisation over features, or over the positions of a batch (methods.md 47, 48).

B sentences, T positions, D features.

Only `layer` normalises each position alone. Limits of the other two:

batch: in training the statistics are those of the batch, so states depend on batch mates and on
    later target positions; stepwise equality, causality and independence of batch mates hold in
    evaluation only, where running statistics are used. One sentence is refused: with one position
    the mean is the position itself and the deviation 0.
power: the forward pass uses statistics of earlier updates only, so all of that holds in training
    too, and one sentence is fine. Its backward pass is an approximation, not the gradient.

Both count real positions only. Scheduled sampling's first pass updates the running statistics as
well; workers of a group keep those of the first one. Values that are not finite do not
change them, because their update is skipped too (methods.md 101).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vinedresser.errors import TrainingError

NormKind = Literal["layer", "batch", "power"]


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sd over the features of each position (Ba et al. 2016)."""

    def forward(self, x_BTD: Tensor, _real_BT: Tensor | None = None) -> Tensor:
        """Map (B, T, D) -> (B, T, D)."""
        normed: Tensor = super().forward(x_BTD)
        return normed


class _Running(nn.Module):
    """Scale, shift and running mean square of each feature.

    Attributes:
        mean_square: (D,), moves by `rate` an update, or by 1 / updates early on, so that it is
            the plain average until that reaches `rate`.
    """

    def __init__(self, features: int, rate: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.rate, self.eps = rate, 1e-5
        self.mean_square: Tensor
        self.updates: Tensor
        self.register_buffer("mean_square", torch.ones(features))
        # A float, so that averaged weights average it too.
        self.register_buffer("updates", torch.zeros(()))

    @property
    def _learns(self) -> bool:
        """Return true in training unless frozen; running values freeze too (methods.md 77)."""
        return self.training and self.weight.requires_grad

    @torch.no_grad()
    def _follow(self, running: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Move running values, (D,) each, towards those of a batch: all of them, or none."""
        # A lerp by rate 0 would not do, for 0 times NaN is NaN; and the device is not waited for.
        is_finite = torch.stack([*found]).isfinite().all()
        self.updates += is_finite
        rate = (1 / self.updates).clamp(min=self.rate)
        for running_D, found_D in zip(running, found, strict=True):
            running_D.copy_(torch.where(is_finite, running_D.lerp(found_D, rate), running_D))


class BatchNorm(_Running):
    """(x - mean) / sd of each feature over all real positions of a batch (Ioffe, Szegedy 2015).

    `mean` (D,) is the running mean, `mean_square` the running variance, unbiased.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features, rate=0.1)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Map (B, T, D) -> (B, T, D) float32; without `real_BT` all positions count.

        Raises:
            TrainingError: one sentence, in training.
        """
        x_BTD = x_BTD.float()
        mean_D, variance_D = self.mean, self.mean_square
        if self._learns:
            if len(x_BTD) < 2:
                raise TrainingError(
                    "batch normalisation got a batch of one sentence, expected at least 2; "
                    "Fix: raise batch.max_padded_tokens, or set model.norm_kind=layer (or power)"
                )
            real_BT1 = _weights(x_BTD, real_BT)
            count = real_BT1.sum()
            mean_D = (x_BTD * real_BT1).sum((0, 1)) / count
            variance_D = ((x_BTD - mean_D).square() * real_BT1).sum((0, 1)) / count
            unbiased_D = variance_D * (count / (count - 1))
            self._follow([self.mean, self.mean_square], [mean_D, unbiased_D])
        normed = (x_BTD - mean_D) * (variance_D + self.eps).rsqrt()
        return normed * self.weight + self.bias


class PowerNorm(_Running):
    """x / psi of each feature, psi^2 the running mean square (Shen et al. 2020, algorithm 1)."""

    def __init__(self, features: int) -> None:
        super().__init__(features, rate=0.1)
        # The running mean of gradient times output, nu in the paper.
        self.nu: Tensor
        self.register_buffer("nu", torch.zeros(features))

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Map (B, T, D) -> (B, T, D) float32; without `real_BT` all positions count."""
        x_BTD, scale_D = x_BTD.float(), (self.mean_square + self.eps).rsqrt()
        if not self._learns:
            return x_BTD * scale_D * self.weight + self.bias
        real_BT1 = _weights(x_BTD, real_BT)
        with torch.no_grad():
            mean_square_D = (x_BTD.square() * real_BT1).sum((0, 1)) / real_BT1.sum()
        self._follow([self.mean_square], [mean_square_D])
        # torch gives `apply` no type.
        scaled: Tensor = _PowerScale.apply(x_BTD, scale_D, real_BT1, self.nu, self.rate)  # type: ignore[no-untyped-call]
        return scaled * self.weight + self.bias


class _PowerScale(torch.autograd.Function):
    """y = x s; backwards (g - nu y) s, then nu = nu (1 - r mean(y^2)) + r mean(g y)."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_BTD: Tensor, scale_D: Tensor, real_BT1: Tensor, nu_D: Tensor, rate: float
    ) -> Tensor:
        y_BTD = x_BTD * scale_D
        ctx.save_for_backward(y_BTD, scale_D, real_BT1)
        ctx.nu_D, ctx.rate = nu_D, rate
        return y_BTD

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None, None, None]:
        y_BTD, scale_D, real_BT1 = ctx.saved_tensors
        # Padding has no gradient and must get none from nu.
        out_BTD = (grad_BTD - ctx.nu_D * y_BTD) * scale_D * real_BT1
        count, real_y_BTD = real_BT1.sum(), y_BTD * real_BT1
        square_D = real_y_BTD.square().sum((0, 1)) / count
        product_D = (grad_BTD * real_y_BTD).sum((0, 1)) / count
        next_D = (ctx.nu_D * (1 - ctx.rate * square_D)).add(product_D, alpha=ctx.rate)
        ctx.nu_D.copy_(torch.where(next_D.isfinite().all(), next_D, ctx.nu_D))
        return out_BTD, None, None, None, None


def _weights(x_BTD: Tensor, real_BT: Tensor | None) -> Tensor:
    """Return (B, T, 1): 1 on real positions, 0 on padding."""
    if real_BT is None:
        return x_BTD.new_ones((*x_BTD.shape[:2], 1))
    return real_BT[:, :, None].to(x_BTD.dtype)


def build_norm(kind: NormKind, features: int) -> LayerNorm | BatchNorm | PowerNorm:
    """Return a fresh normalisation, called with (B, T, D) and, in training, the real positions."""
    if kind == "layer":
        return LayerNorm(features)
    return BatchNorm(features) if kind == "batch" else PowerNorm(features)
