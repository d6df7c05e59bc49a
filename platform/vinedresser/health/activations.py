"""What a model's activation functions put out in one forward pass: dead units, saturated ones.

B sentences, T positions, F units.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from vinedresser.health.recurrence import SATURATED, SIGMOID_END, fused_at_ends, lstm_at_ends
from vinedresser.nn.gates import HeadGates
from vinedresser.nn.recurrent import lstm_gates

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_SATURATING: Mapping[Any, tuple[str, Callable[[Tensor], Tensor]]] = {
    **dict.fromkeys((torch.tanh, Tensor.tanh), ("tanh", lambda y: y.abs() > SATURATED)),
    **dict.fromkeys(
        (torch.sigmoid, Tensor.sigmoid),
        ("sigmoid", lambda y: (y - 0.5).abs() > SATURATED - 0.5),
    ),
}


class Activations:
    """Counts of a forward pass, on the device. Passes of one step (micro-batches) add up.

    Attributes:
        alive: place -> (F,) whether a ReLU unit was above 0 at any real position.
        saturated: place -> how many numbers are saturated, and of how many.
        extremes: layer -> smallest and largest number that it put out.
    """

    def __init__(self) -> None:
        self.alive: dict[str, Tensor] = {}
        self.saturated: dict[str, tuple[Tensor, Tensor]] = {}
        self.extremes: dict[str, Tensor] = {}

    def add_relu(self, place: str, y: Tensor, real_BT: Tensor | None) -> None:
        """Takes in (..., F) outputs; where `real_BT` is given, of its positions only."""
        # Nothing is below 0, so a sum is above 0 where something is; comparing took 12 times as
        # long, 5 ms a layer of 1,024 units at 2,048 tokens.
        y_NF = y.flatten(0, -2)
        sum_F = y_NF.sum(0) if real_BT is None else real_BT.to(y.dtype).flatten() @ y_NF
        alive_F = sum_F > 0
        before_F = self.alive.get(place)
        self.alive[place] = alive_F if before_F is None else before_F | alive_F

    def add_saturated(self, place: str, is_saturated: Tensor, real_BT: Tensor | None) -> None:
        """Takes in (..., F) booleans, in the same way."""
        count = torch.tensor(is_saturated.numel())
        if real_BT is not None:
            is_saturated = is_saturated & real_BT[..., None]
            count = real_BT.sum() * is_saturated.shape[-1]
        found = is_saturated.sum()
        if place in self.saturated:
            before, of = self.saturated[place]
            found, count = found + before, count + of.to(count.device)
        self.saturated[place] = found, count

    def add_extremes(self, layer: str, y: Tensor) -> None:
        """Takes in the outputs of a layer, padding included."""
        low, high = (end.float() for end in y.aminmax())
        if layer in self.extremes:
            before = self.extremes[layer]
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        self.extremes[layer] = torch.stack([low, high])


@contextmanager
def watching(model: nn.Module, layers: frozenset[str], found: Activations) -> Iterator[None]:
    """Fills `found` from what `model` computes while the block runs.

    Every call of relu, tanh, sigmoid and GLU is seen, as a module or as a function, whoever wrote
    the model; so are the gates of LSTMs and GRUs, those of the fused kernels in 8 sentences. Passes
    without gradients are not, nor other fused kernels. Head gates are left out: they are to be 0
    or 1. A position is real where the call, or a module around it, was given a mask (B, T) that
    says so; else all are taken as real.

    Args:
        model: its modules give the places their names.
        layers: names of modules whose outputs' extremes are wanted.
        found: added to.
    """
    watcher = _Watcher({id(m): name for name, m in model.named_modules()}, layers, found)
    hooks = (
        register_module_forward_pre_hook(watcher.enter),
        register_module_forward_hook(watcher.leave),
    )
    try:
        with watcher:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watcher(TorchFunctionMode):
    """Sees each torch function that is called, and knows in which module."""

    def __init__(
        self, names: Mapping[int, str], layers: frozenset[str], found: Activations
    ) -> None:
        super().__init__()
        self.names, self.layers, self.found = names, layers, found
        self.inside: list[tuple[nn.Module, Any]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self.inside.append((module, args))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.inside.pop()
        name = self.names.get(id(module))
        if not torch.is_grad_enabled():
            return
        if isinstance(module, nn.RNNBase):
            with torch.no_grad():
                found = fused_at_ends(module, args, out)
            if found is not None:
                self.found.add_saturated(f"{name or 'model'} gates", *found)
        if name not in self.layers:
            return
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
            self.found.add_extremes(name, y.detach())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_relu, saturating = func in _RELUS, _SATURATING.get(func)
        is_gate = func is F.glu or func is lstm_gates
        if not (is_relu or saturating or is_gate) or not torch.is_grad_enabled():
            return out
        with torch.no_grad():
            if is_relu:
                self._see("relu", out, None)
            elif saturating:
                self._see(saturating[0], out, saturating[1](out))
            elif func is lstm_gates:
                self._see("gates", args[0], lstm_at_ends(args[0]))
            else:
                dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else -1)
                gate = args[0].chunk(2, dim)[1]
                self._see("gate", gate, gate.abs() > SIGMOID_END)
        return out

    def _see(self, kind: str, y: Tensor, is_saturated: Tensor | None) -> None:
        module = self.inside[-1][0] if self.inside else None
        if y.dim() < 2 or not y.numel() or isinstance(module, HeadGates):
            return
        place = f"{self._place()} {kind}"
        if is_saturated is None:
            self.found.add_relu(place, y.detach(), self._mask(y))
        else:
            self.found.add_saturated(place, is_saturated, self._mask(y))

    def _place(self) -> str:
        """The innermost named module around the call."""
        names = (self.names.get(id(module)) for module, _ in reversed(self.inside))
        return next((name for name in names if name), "model")

    def _mask(self, y: Tensor) -> Tensor | None:
        """The nearest mask that fits among the arguments of the modules around the call."""
        for _, args in reversed(self.inside):
            for arg in args:
                if (
                    isinstance(arg, Tensor)
                    and arg.dtype == torch.bool
                    and arg.shape == y.shape[:-1]
                ):
                    return arg
        return None
