"""Matrix products that a loop computes step by step, with one gradient for all steps.

B sentences, T steps, F features in, G features out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AllSteps(torch.autograd.Function):
    """Identity on `known` whose gradient includes that of every step's result."""

    @staticmethod
    def forward(ctx: Any, known_TBG: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.is_batched = inputs, weight.dim() == 3
        return known_TBG.view_as(known_TBG)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TBG: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TBF = torch.stack(ctx.inputs)
        if ctx.is_batched:
            return grad_TBG, grad_TBG.permute(1, 2, 0) @ x_TBF.transpose(0, 1), None
        return grad_TBG, grad_TBG.flatten(0, 1).t() @ x_TBF.flatten(0, 1), None


class Product:
    """known_t + x_t W^T, step after step, with W (G, F), or (B, G, F) a matrix per sentence.

    Autograd would take a product for W's gradient at every step and add them up. But the gradient
    of a step's result is that of `known_t`; so W's is one product over all steps, once theirs are
    there. Several products may be begun on the same `known`, one after another, and be summed.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._inputs: list[Tensor] | None = None

    def begin(self, known_TBG: Tensor) -> Tensor:
        """Return `known`, of which each step takes its (B, G), in order, none left out."""
        if not torch.is_grad_enabled():
            self._inputs = None
            return known_TBG
        self._inputs = []
        # torch gives `apply` no type.
        known: Tensor = _AllSteps.apply(known_TBG, self._weight, self._inputs)  # type: ignore[no-untyped-call]
        return known

    def __call__(self, known_BG: Tensor, x_BF: Tensor) -> Tensor:
        """Map (B, G), (B, F) -> (B, G)."""
        weight, x_BF = self._weight, x_BF.to(self._weight.dtype)
        if self._inputs is not None:
            self._inputs.append(x_BF.detach())
            weight = weight.detach()
        if weight.dim() == 2:
            return torch.addmm(known_BG, x_BF, weight.t())
        return torch.baddbmm(known_BG[:, None], x_BF[:, None], weight.transpose(1, 2))[:, 0]

    def select(self, rows: Tensor) -> "Product":
        """Return the product of the given rows, in their order."""
        is_matrix = self._weight.dim() == 2
        return Product(self._weight if is_matrix else self._weight.index_select(0, rows))


def step_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type of products: autocast's, or the tensor's own."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype
