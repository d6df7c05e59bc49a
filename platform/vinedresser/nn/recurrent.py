"""LSTM and GRU layers, whole or step by step on the same weights, and the encoders of them.

B sentences, S source positions, T target positions, I input features, D units of a layer,
G features of its gates: 4 D (LSTM) or 3 D (GRU).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vinedresser.batch import is_real
from vinedresser.config import ModelConfig
from vinedresser.nn.dropout import Dropout
from vinedresser.nn.steps import Product, step_dtype
from vinedresser.nn.subsampling import Subsample, SubsamplingConfig

CellKind = Literal["lstm", "gru"]
# (h, c) of an LSTM, (h,) of a GRU; each (B, D).
RecurrentState = tuple[Tensor, ...]


class _LstmGates(torch.autograd.Function):
    """The pointwise half of an LSTM step: 12 operations for the gradient instead of 30."""

    @staticmethod
    def forward(ctx: Any, gates_BG: Tensor, c_BD: Tensor) -> tuple[Tensor, Tensor]:
        D = c_BD.shape[1]
        ctx.dtype = gates_BG.dtype
        gates_BG = gates_BG.to(c_BD.dtype)
        open_BG, g = gates_BG.sigmoid(), gates_BG[:, 2 * D : 3 * D].tanh()
        i, f, _, o = open_BG.chunk(4, 1)
        new_c_BD = torch.addcmul(f * c_BD, i, g)
        squashed_BD = new_c_BD.tanh()
        ctx.save_for_backward(open_BG, g, c_BD, squashed_BD)
        return (o * squashed_BD).to(ctx.dtype), new_c_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h_grad: Tensor, c_grad: Tensor) -> tuple[Tensor, Tensor]:
        open_BG, g, c_BD, squashed_BD = ctx.saved_tensors
        h_grad, D = h_grad.to(c_BD.dtype), c_BD.shape[1]
        i, f, _, o = open_BG.chunk(4, 1)
        c_grad = c_grad + torch.ops.aten.tanh_backward(h_grad * o, squashed_BD)
        inner = torch.cat([c_grad * g, c_grad * c_BD, c_grad, h_grad * squashed_BD], 1)
        gates_grad = torch.ops.aten.sigmoid_backward(inner, open_BG)
        gates_grad[:, 2 * D : 3 * D] = torch.ops.aten.tanh_backward(c_grad * i, g)
        return gates_grad.to(ctx.dtype), c_grad * f


class LstmGates(nn.Module):
    """Gates of one LSTM step: a module, so that forward hooks can read its inputs."""

    def forward(self, gates_BG: Tensor, c_BD: Tensor) -> RecurrentState:
        """Return the new (h, c) from the inputs of the gates (B, 4 D) and the cell state (B, D)."""
        # torch gives `apply` no type.
        new: RecurrentState = _LstmGates.apply(gates_BG, c_BD)  # type: ignore[no-untyped-call]
        return new


class Cell:
    """A layer's weights arranged for steps; built after every update of the weights.

    Each input of the layer is [known; fed]: the part that is known before the first step (embedded
    tokens) and the part that a step passes to the next (a context). The known part of the gates is
    one product for all steps, the rest one or two per step.
    """

    def __init__(self, rnn: nn.RNNBase, fed: int) -> None:
        dtype = step_dtype(next(rnn.parameters()))
        # Once a batch; autocast would convert slices of weights at every step.
        inputs_GI, state_GD, self._bias_G, self._inner_bias_G = (
            weight.to(dtype) for weight in rnn.parameters()
        )
        num_known = rnn.input_size - fed
        self._known_GE, fed_GF = inputs_GI[:, :num_known], inputs_GI[:, num_known:]
        self._is_lstm, self._is_fed = isinstance(rnn, nn.LSTM), fed > 0
        if self._is_lstm:
            self._gates = LstmGates()
            self._bias_G = self._bias_G + self._inner_bias_G
            self._of_state = Product(torch.cat([fed_GF, state_GD], 1) if fed else state_GD)
        else:
            self._of_fed, self._of_state = Product(fed_GF), Product(state_GD)

    def known(self, x: Tensor) -> "Known":
        """Map (..., E) known inputs, E may be 0, -> their part of the gates (..., G)."""
        if x.shape[-1] == 0:
            outer = self._bias_G.expand(*x.shape[:-1], -1)
        else:
            outer = F.linear(x.to(self._known_GE.dtype), self._known_GE, self._bias_G)
        # A GRU's reset gate multiplies W h + b: that bias stays inside.
        inner = None if self._is_lstm else self._inner_bias_G.expand_as(outer)
        return outer, inner

    def begin(self, known: "Known") -> list["Known"]:
        """Split (T, B, G) of T steps into (B, G) of each; the steps must follow in order."""
        outer_TBG, inner_TBG = known
        if inner_TBG is None:
            return [(outer_BG, None) for outer_BG in self._of_state.begin(outer_TBG).unbind(0)]
        if self._is_fed:
            outer_TBG = self._of_fed.begin(outer_TBG)
        inner_TBG = self._of_state.begin(inner_TBG)
        return list(zip(outer_TBG.unbind(0), inner_TBG.unbind(0), strict=True))

    def step(self, known: "Known", fed_BF: Tensor | None, state: RecurrentState) -> RecurrentState:
        """Return the next state; its first tensor is the output."""
        outer_BG, inner_BG = known
        h_BD = state[0]
        if inner_BG is None:
            joined = h_BD if fed_BF is None else torch.cat([fed_BF.to(h_BD.dtype), h_BD], 1)
            gates_BG = self._of_state(outer_BG, joined)
            # The cell state adds up over steps: never in bf16.
            c_BD = state[1].to(torch.promote_types(state[1].dtype, torch.float32))
            new: RecurrentState = self._gates(gates_BG, c_BD)
            return new
        if fed_BF is not None:
            outer_BG = self._of_fed(outer_BG, fed_BF)
        return (_gru(outer_BG, self._of_state(inner_BG, h_BD), h_BD.to(outer_BG.dtype)),)


# The known part of a cell's gates; for a GRU, the part inside the reset gate too.
Known = tuple[Tensor, Tensor | None]


def _gru(outer_BG: Tensor, inner_BG: Tensor, h_BD: Tensor) -> Tensor:
    """Return (1 - z) n + z h with n = tanh(outer + r * inner) (Cho et al. 2014, as torch)."""
    D = h_BD.shape[1]
    r, z = (outer_BG[:, : 2 * D] + inner_BG[:, : 2 * D]).sigmoid().chunk(2, 1)
    n = torch.tanh(torch.addcmul(outer_BG[:, 2 * D :], r, inner_BG[:, 2 * D :]))
    return torch.lerp(n, h_BD, z)


class Recurrent(nn.Module):
    """One layer in one direction. An LSTM has 4 / 3 of the parameters of a GRU (methods.md 46)."""

    def __init__(self, cell: CellKind, inputs: int, units: int) -> None:
        super().__init__()
        self.is_lstm, self.units = cell == "lstm", units
        kind = nn.LSTM if self.is_lstm else nn.GRU
        self.rnn = kind(inputs, units, batch_first=True)
        # Forget gates start open, sigmoid(1) = .73 (Jozefowicz et al. 2015): one of the two biases
        # that add up is 1.
        _, _, bias, inner_bias = self.parameters()
        nn.init.zeros_(bias)
        nn.init.zeros_(inner_bias)
        if self.is_lstm:
            nn.init.ones_(bias[units : 2 * units])

    def forward(self, x_BTI: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Map (B, T, I) -> (B, T, D), the fused kernel over all steps, from zeros without a state.

        Output t depends on inputs 0..t only, so that padding at the end changes nothing before it.
        """
        first: Any = None
        if state is not None:
            parts = [part[None].to(x_BTI.dtype).contiguous() for part in state]
            first = tuple(parts) if self.is_lstm else parts[0]
        out_BTD: Tensor = self.rnn(x_BTI, first)[0]
        return out_BTD

    def last(self, x_BSI: Tensor, lengths_B: Tensor) -> tuple[Tensor, RecurrentState]:
        """Map (B, S, I) -> (B, S, D) and the state after each row's last real position.

        On a packed sequence: the fused kernel gives no cell state but the one after the padding.
        """
        packed = nn.utils.rnn.pack_padded_sequence(
            x_BSI, lengths_B.cpu(), batch_first=True, enforce_sorted=False
        )
        out, last = self.rnn(packed)
        out_BSD, _ = nn.utils.rnn.pad_packed_sequence(
            out, batch_first=True, total_length=x_BSI.shape[1]
        )
        return out_BSD, tuple(part[0] for part in (last if self.is_lstm else (last,)))

    def cell(self, fed: int = 0) -> Cell:
        """Return the weights for steps in the current precision; the last `fed` inputs are fed."""
        return Cell(self.rnn, fed)


@dataclass(frozen=True)
class Stack:
    """Settings that all layers of an encoder or decoder share.

    `units` are those of each layer in each direction; `layer_norm` normalises each layer's outputs
    for the next layer, ln(f(x)), and not the states for its next step; dropout is between layers.
    """

    cell: CellKind
    units: int
    layers: int
    layer_norm: bool
    dropout: float

    def norm(self, width: int) -> nn.Module:
        """Return the norm after each layer."""
        return nn.LayerNorm(width) if self.layer_norm else nn.Identity()


class RecurrentConfig(ModelConfig):
    """Settings of the recurrent models."""

    cell: CellKind = "lstm"
    # Features of embeddings, and of the decoder's states.
    width: PositiveInt = 256
    # Of each encoder layer in each direction.
    encoder_units: PositiveInt = 256
    bidirectional: bool = True
    encoder_layers: PositiveInt = 1
    decoder_layers: PositiveInt = 1
    # LayerNorm on the outputs of every layer (methods.md 46).
    layer_norm: bool = False

    def stack(self, units: int, layers: int, dropout: float) -> Stack:
        """Return what the layers of the encoder, or of the decoder, share."""
        return Stack(self.cell, units, layers, self.layer_norm, dropout)


def turned(x_BSD: Tensor, lengths_B: Tensor) -> Tensor:
    """Reverse the real positions of each row of (B, S, D); padding stays in place."""
    at_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    from_BS = torch.where(at_S < lengths_B[:, None], lengths_B[:, None] - 1 - at_S, at_S)
    return x_BSD.gather(1, from_BS[:, :, None].expand_as(x_BSD))


class Layer(nn.Module):
    """One encoder layer: forward, or forward and backward side by side, then the norm.

    The backward direction runs forward over `turned` rows, so that both read each row's padding
    last. On one core that took 148 ms and 56 ms (bf16) where a packed sequence took 241 ms and 127
    ms: the fused kernel refuses packed ones (250 x 16 positions, 2 x 256 units, gradient included).
    `width` is the number of features of its outputs.
    """

    def __init__(self, stack: Stack, inputs: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.width = stack.units * (1 + bidirectional)
        self.ahead = Recurrent(stack.cell, inputs, stack.units)
        self.back = Recurrent(stack.cell, inputs, stack.units) if bidirectional else None
        self.norm = stack.norm(self.width)

    def forward(self, x_BSI: Tensor, lengths_B: Tensor) -> Tensor:
        """Map (B, S, I) -> (B, S, width); nothing depends on padding or batch mates."""
        out: Tensor = self.ahead(x_BSI)
        if self.back is not None:
            back = turned(self.back(turned(x_BSI, lengths_B)), lengths_B)
            out = torch.cat([out, back], -1)
        normed: Tensor = self.norm(out)
        return normed

    def last(self, x_BSI: Tensor, lengths_B: Tensor) -> tuple[Tensor, RecurrentState]:
        """Map (B, S, I) -> (B, S, width) and the state (B, width) after the last real position.

        The states of both directions are concatenated, as their outputs are.
        """
        out, state = self.ahead.last(x_BSI, lengths_B)
        if self.back is not None:
            back, back_state = self.back.last(turned(x_BSI, lengths_B), lengths_B)
            out = torch.cat([out, turned(back, lengths_B)], -1)
            state = tuple(torch.cat(parts, -1) for parts in zip(state, back_state, strict=True))
        return self.norm(out), state


class RecurrentEncoder(nn.Module):
    """Layers with reductions between them: the pyramid of Chan et al. 2016 (methods.md 26, 29).

    Reduction i precedes layer i + 1 (counted from 0), so that the first layer reads every position,
    and there are fewer reductions than layers. `width` is the number of features of its outputs.
    """

    def __init__(
        self, stack: Stack, inputs: int, *, bidirectional: bool, subsampling: SubsamplingConfig
    ) -> None:
        super().__init__()
        check_pyramid(stack.layers, subsampling)
        self.bidirectional = bidirectional
        self.dropout = Dropout(stack.dropout)
        self.layers, self.reductions = nn.ModuleList(), nn.ModuleList()
        for i in range(stack.layers):
            if 0 < i <= subsampling.reductions:
                reduction = Subsample(subsampling, inputs)
                self.reductions.append(reduction)
                inputs = reduction.width
            layer = Layer(stack, inputs, bidirectional=bidirectional)
            self.layers.append(layer)
            inputs = layer.width
        self.width = inputs

    def forward(self, x_BSI: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, S, I), (B,) -> states (B, U, width) and their mask (B, U), true on real ones."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                x_BSI = self.dropout(x_BSI)
            if 0 < i <= len(self.reductions):
                x_BSI, lengths_B = self.reductions[i - 1](x_BSI, lengths_B)
            x_BSI = layer(x_BSI, lengths_B)
        return x_BSI, is_real(lengths_B, x_BSI.shape[1])

    def last(self, states_BUM: Tensor, is_real_BU: Tensor) -> Tensor:
        """Return (B, M), the outputs of each direction at its last position, not its cells."""
        ends_B = is_real_BU.sum(1) - 1
        ahead_BM = states_BUM[torch.arange(len(ends_B), device=ends_B.device), ends_B]
        if not self.bidirectional:
            return ahead_BM
        half = states_BUM.shape[2] // 2
        return torch.cat([ahead_BM[:, :half], states_BUM[:, 0, half:]], 1)


def check_pyramid(layers: int, subsampling: SubsamplingConfig) -> None:
    """Refuse a pyramid whose reductions do not fit between its layers.

    Raises:
        ValueError: as many reductions as layers, or more.
    """
    if subsampling.reductions >= layers:
        raise ValueError(
            f"{subsampling.reductions} reductions need more than {layers} encoder layers, between "
            f"which they are. Fix: encoder_layers {subsampling.reductions + 1} or fewer "
            "subsampling.layers"
        )
