"""Outputs of a model's activation functions in a forward pass: dead and saturated units.

The observer works through global module hooks and a function mode, independent of the
layers' code. B sentences, T positions, F units, I input features, D units of a recurrent layer, G
features of its gates: 4 D (LSTM) or 3 D (GRU).
"""

import math
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
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from vinedresser.batch import is_real
from vinedresser.nn.dropout import ReluDropout
from vinedresser.nn.gates import HeadGates
from vinedresser.nn.recurrent import LstmGates

# A tanh beyond this, or a sigmoid as near to its end (within 0.01 of 0 or 1), is saturated: its
# gradient is 2% (4%) of the largest. Below, the inputs that lead there.
SATURATED = 0.99
SIGMOID_END, TANH_END = math.log(SATURATED / (1 - SATURATED)), math.atanh(SATURATED)  # 4.595, 2.647

# Sentences of a batch that are examined: 8 of 128 are 6% of the layer's forward pass.
_ROWS = 8

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

    `alive`: function -> (F,), true for ReLU units above 0 at any real position; `saturated`:
    function -> number of saturated outputs, and of all outputs; `extremes`: layer -> smallest and
    largest output.
    """

    def __init__(self) -> None:
        self.alive: dict[str, Tensor] = {}
        self.saturated: dict[str, tuple[Tensor, Tensor]] = {}
        self.extremes: dict[str, Tensor] = {}

    def add_relu(self, function: str, y: Tensor, real_BT: Tensor | None) -> None:
        """Add (..., F) outputs; where `real_BT` is given, those of its positions only."""
        # No output is below 0, so a sum above 0 means that some output is; comparing took 12 times
        # as long, 5 ms per layer of 1,024 units at 2,048 tokens.
        y_NF = y.flatten(0, -2)
        sum_F = y_NF.sum(0) if real_BT is None else real_BT.to(y.dtype).flatten() @ y_NF
        alive_F = sum_F > 0
        before_F = self.alive.get(function)
        self.alive[function] = alive_F if before_F is None else before_F | alive_F

    def add_saturated(self, function: str, is_saturated: Tensor, real_BT: Tensor | None) -> None:
        """Add (..., F) booleans, in the same way."""
        count = torch.tensor(is_saturated.numel())
        if real_BT is not None:
            is_saturated = is_saturated & real_BT[..., None]
            count = real_BT.sum() * is_saturated.shape[-1]
        found = is_saturated.sum()
        if function in self.saturated:
            before, of = self.saturated[function]
            found, count = found + before, count + of.to(count.device)
        self.saturated[function] = found, count

    def add_extremes(self, layer: str, y: Tensor) -> None:
        """Add the outputs of a layer, padding included."""
        low, high = (end.float() for end in y.aminmax())
        if layer in self.extremes:
            before = self.extremes[layer]
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        self.extremes[layer] = torch.stack([low, high])


@contextmanager
def observed(model: nn.Module, layers: frozenset[str], found: Activations) -> Iterator[None]:
    """Count the activations of `model` into `found` while the block runs.

    Every call of relu, tanh, sigmoid and GLU counts, as a module or as a function, in any model; so
    do the gates of LSTMs and GRUs, those of the fused kernels in 8 sentences. Passes without
    gradients do not count, nor other fused kernels. Head gates are left out: 0 and 1 are their
    purpose. A position is real where the call, or a module around it, got a mask (B, T) that is
    true there; without a mask all are.
    """
    observer = _Observer({id(m): name for name, m in model.named_modules()}, layers, found)
    hooks = (
        register_module_forward_pre_hook(observer.enter),
        register_module_forward_hook(observer.leave),
    )
    try:
        with observer:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Observer(TorchFunctionMode):
    """Intercepts calls of torch functions and keeps the stack of modules around them."""

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
                found = fused_saturated(module, args, out)
            if found is not None:
                self.found.add_saturated(f"{name or 'model'} gates", *found)
        elif isinstance(module, ReluDropout):
            self._count("relu", args[0].detach().relu(), None)
        elif isinstance(module, LstmGates):
            gates = args[0].detach()
            self._count("gates", gates, lstm_saturated(gates))
        if name not in self.layers:
            return
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
            self.found.add_extremes(name, y.detach())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_relu, saturating = func in _RELUS, _SATURATING.get(func)
        if not (is_relu or saturating or func is F.glu) or not torch.is_grad_enabled():
            return out
        # Counted from their inputs when they return, or not at all.
        if self.inside and isinstance(self.inside[-1][0], HeadGates | ReluDropout):
            return out
        with torch.no_grad():
            if is_relu:
                self._count("relu", out.detach(), None)
            elif saturating:
                self._count(saturating[0], out, saturating[1](out))
            else:
                dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else -1)
                gate = args[0].chunk(2, dim)[1]
                self._count("gate", gate, gate.abs() > SIGMOID_END)
        return out

    def _count(self, kind: str, y: Tensor, is_saturated: Tensor | None) -> None:
        """Add outputs under the name of the innermost named module around the call."""
        if y.dim() < 2 or not y.numel():
            return
        names = (self.names.get(id(module)) for module, _ in reversed(self.inside))
        function = f"{next((name for name in names if name), 'model')} {kind}"
        if is_saturated is None:
            self.found.add_relu(function, y, self._mask(y))
        else:
            self.found.add_saturated(function, is_saturated, self._mask(y))

    def _mask(self, y: Tensor) -> Tensor | None:
        """Return the nearest mask that fits among the arguments of the modules around the call."""
        for _, args in reversed(self.inside):
            for arg in args:
                if (
                    isinstance(arg, Tensor)
                    and arg.dtype == torch.bool
                    and arg.shape == y.shape[:-1]
                ):
                    return arg
        return None


def lstm_saturated(gates: Tensor) -> Tensor:
    """Return which of an LSTM's i, f, g, o saturate, from their inputs (..., 4 D)."""
    i, f, g, o = gates.abs().chunk(4, -1)
    return torch.cat([i > SIGMOID_END, f > SIGMOID_END, g > TANH_END, o > SIGMOID_END], -1)


def fused_saturated(rnn: nn.RNNBase, args: Any, out: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return which gates of a fused LSTM or GRU saturate, in the first sentences of a batch.

    The inputs of the gates at t are x_t, h_{t-1} and weights, so all positions are computed at once
    from the layer's inputs and outputs (Hochreiter and Schmidhuber 1997; Cho et al. 2014, in the
    order of torch). `args` and `out` are arguments and result of the layer's call.

    Returns:
        (b, T, G) booleans and the mask of real positions (None: unknown); or None for a layer
        that does not return its inner states: several layers, both directions, projections.
    """
    if rnn.num_layers > 1 or rnn.bidirectional or rnn.proj_size or rnn.mode not in ("LSTM", "GRU"):
        return None
    x, h, real_BT = args[0], out[0], None
    first = args[1] if len(args) > 1 else None
    if isinstance(x, PackedSequence):
        x, lengths_B = pad_packed_sequence(x, batch_first=True)
        h, _ = pad_packed_sequence(h, batch_first=True)
        real_BT = is_real(lengths_B, x.shape[1])[:_ROWS].to(x.device)
    elif x.dim() < 3:
        return None
    elif not rnn.batch_first:
        x, h = x.transpose(0, 1), h.transpose(0, 1)
    x_BTI, h_BTD = x[:_ROWS], h[:_ROWS]
    first_BD = torch.zeros_like(h_BTD[:, 0])
    if first is not None:
        first_BD = (first if isinstance(first, Tensor) else first[0])[0, :_ROWS].to(h_BTD.dtype)
    before_BTD = torch.cat([first_BD[:, None], h_BTD[:, :-1]], 1)
    own = dict(rnn.named_parameters())
    of_input = F.linear(x_BTI, own["weight_ih_l0"], own.get("bias_ih_l0"))
    of_state = F.linear(before_BTD, own["weight_hh_l0"], own.get("bias_hh_l0"))
    if rnn.mode == "LSTM":
        return lstm_saturated(of_input + of_state), real_BT
    D = rnn.hidden_size
    rz = of_input[..., : 2 * D] + of_state[..., : 2 * D]
    n = of_input[..., 2 * D :] + rz[..., :D].sigmoid() * of_state[..., 2 * D :]
    return torch.cat([rz.abs() > SIGMOID_END, n.abs() > TANH_END], -1), real_BT
