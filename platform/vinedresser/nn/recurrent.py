"""LSTM and GRU layers, whole or step by step on the same weights, and the encoders of them.

B sentences, S source positions, T target positions, I input features, D units of a layer,
G features of its gates: 4 D (LSTM) or 3 D (GRU).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vinedresser.batch import is_real
from vinedresser.nn.dropout import Dropout
from vinedresser.nn.subsampling import Subsample, SubsamplingConfig

CellKind = Literal["lstm", "gru"]
# (h, c) of an LSTM, (h,) of a GRU; each (B, D).
State = tuple[Tensor, ...]


class _LstmGates(torch.autograd.Function):
    """The pointwise half of an LSTM step: 12 operations for the gradient, autograd takes 30."""

    @staticmethod
    def forward(ctx: Any, gates_BG: Tensor, c_BD: Tensor) -> tuple[Tensor, Tensor]:
        D = c_BD.shape[1]
        open_BG = gates_BG.float().sigmoid()
        i, f, _, o = open_BG.chunk(4, 1)
        g = gates_BG[:, 2 * D : 3 * D].float().tanh()
        new_c_BD = torch.addcmul(f * c_BD, i, g)
        squashed_BD = new_c_BD.tanh()
        ctx.save_for_backward(open_BG, g, c_BD, squashed_BD)
        ctx.dtype = gates_BG.dtype
        return (o * squashed_BD).to(gates_BG.dtype), new_c_BD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        open_BG, g, c_BD, squashed_BD = ctx.saved_tensors
        h_grad, c_grad = grads[0].float(), grads[1]
        i, f, _, o = open_BG.chunk(4, 1)
        c_grad = c_grad + torch.ops.aten.tanh_backward(h_grad * o, squashed_BD)
        inner = torch.cat([c_grad * g, c_grad * c_BD, c_grad, h_grad * squashed_BD], 1)
        D = c_BD.shape[1]
        cell_grad = torch.ops.aten.tanh_backward(c_grad * i, g)
        gates_grad = torch.ops.aten.sigmoid_backward(inner, open_BG)
        gates_grad[:, 2 * D : 3 * D] = cell_grad
        return gates_grad.to(ctx.dtype), c_grad * f


@dataclass(frozen=True)
class Cell:
    """A layer's weights laid out for steps. Made anew after every update of the weights.

    Each input of the layer is [known; fed]: what is known of all steps before the first (embedded
    tokens) and what a step gives to the next (a context). `known` is multiplied for all steps at
    once, the rest takes one product a step: half the time of a step by `nn.LSTMCell`.

    Attributes:
        known_GE: weights of the known inputs.
        known_bias_G: all biases, but for the GRU's inside its reset gate.
        step_GF: weights of [fed; h] (LSTM), or of fed alone (GRU).
        state_GD: GRU only: weights of h.
        state_bias_G: GRU only: bias of its candidate, inside the reset gate.
    """

    known_GE: Tensor
    known_bias_G: Tensor
    step_GF: Tensor
    state_GD: Tensor | None = None
    state_bias_G: Tensor | None = None

    def known(self, x: Tensor) -> Tensor:
        """(..., E) known inputs -> (..., G), their part of the gates."""
        return F.linear(x.to(self.known_GE.dtype), self.known_GE, self.known_bias_G)

    def step(self, known_BG: Tensor, fed_BF: Tensor | None, state: State) -> State:
        """One step. The first of the returned tensors is the output, in the weights' precision."""
        dtype = self.step_GF.dtype
        h_BD = state[0].to(dtype)
        fed = [] if fed_BF is None else [fed_BF.to(dtype)]
        if self.state_GD is None:
            joined = torch.cat([*fed, h_BD], 1)
            gates_BG = torch.addmm(known_BG, joined, self.step_GF.t())
            # torch gives `apply` no type.
            new: State = _LstmGates.apply(gates_BG, state[1].float())  # type: ignore[no-untyped-call]
            return new
        if fed:
            known_BG = torch.addmm(known_BG, fed[0], self.step_GF.t())
        assert self.state_bias_G is not None
        inner_BG = torch.addmm(self.state_bias_G, h_BD, self.state_GD.t())
        return (_gru(known_BG, inner_BG, h_BD),)


def _gru(known_BG: Tensor, inner_BG: Tensor, h_BD: Tensor) -> Tensor:
    """New h = (1 - z) n + z h with n = tanh(x + r * inner) (Cho et al. 2014, as torch)."""
    D = h_BD.shape[1]
    r, z = (known_BG[:, : 2 * D] + inner_BG[:, : 2 * D]).sigmoid().chunk(2, 1)
    n = torch.tanh(torch.addcmul(known_BG[:, 2 * D :], r, inner_BG[:, 2 * D :]))
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

    def forward(self, x_BTI: Tensor, state: State | None = None) -> Tensor:
        """(B, T, I) -> (B, T, D), the fused kernel over all steps; zeros where no state is given.

        Output t depends on inputs 0..t only, so that padding at the end changes nothing before it.
        """
        first: Any = None
        if state is not None:
            parts = [part[None].to(x_BTI.dtype).contiguous() for part in state]
            first = tuple(parts) if self.is_lstm else parts[0]
        out_BTD: Tensor = self.rnn(x_BTI, first)[0]
        return out_BTD

    def last(self, x_BSI: Tensor, lengths_B: Tensor) -> tuple[Tensor, State]:
        """(B, S, I) -> (B, S, D) and the state after each row's last real position.

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
        """The weights for steps in the precision of now; the last `fed` inputs are fed."""
        known = self.rnn.input_size - fed
        weights: list[Tensor] = list(self.parameters())
        device = weights[0].device.type
        if torch.is_autocast_enabled(device):
            # Once a batch; autocast would do it at every step.
            weights = [weight.to(torch.get_autocast_dtype(device)) for weight in weights]
        inputs_GI, state_GD, bias_G, inner_bias_G = weights
        known_GE, fed_GF = inputs_GI[:, :known], inputs_GI[:, known:]
        if self.is_lstm:
            step_GF = torch.cat([fed_GF, state_GD], 1) if fed else state_GD
            return Cell(known_GE, bias_G + inner_bias_G, step_GF)
        return Cell(known_GE, bias_G, fed_GF, state_GD, inner_bias_G)


@dataclass(frozen=True)
class Stack:
    """What all layers of an encoder or decoder share.

    Attributes:
        cell: lstm or gru.
        units: of each layer in each direction.
        layers: how many.
        layer_norm: whether each layer's outputs are normalised on their way up, ln(f(x)); the
            states that the layer passes on to its next step are not.
        dropout: between layers.
    """

    cell: CellKind
    units: int
    layers: int
    layer_norm: bool
    dropout: float

    def norm(self, width: int) -> nn.Module:
        """What stands after each layer."""
        return nn.LayerNorm(width) if self.layer_norm else nn.Identity()


def turned(x_BSD: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, S, D) with the real positions of each row in reverse order; padding stays in place."""
    at_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    from_BS = torch.where(at_S < lengths_B[:, None], lengths_B[:, None] - 1 - at_S, at_S)
    return x_BSD.gather(1, from_BS[:, :, None].expand_as(x_BSD))


class Layer(nn.Module):
    """One encoder layer: forward, or forward and backward side by side, then the norm.

    The backward direction runs forward over `turned` rows, so that both read each row's padding
    last. On one core that took 148 ms and 56 ms (bf16) where a packed sequence took 241 ms and
    127 ms: the fused kernel refuses packed ones (250 x 16 positions, 2 x 256 units, gradient
    included).

    Attributes:
        width: features of the outputs.
    """

    def __init__(self, stack: Stack, inputs: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.width = stack.units * (1 + bidirectional)
        self.ahead = Recurrent(stack.cell, inputs, stack.units)
        self.back = Recurrent(stack.cell, inputs, stack.units) if bidirectional else None
        self.norm = stack.norm(self.width)

    def forward(self, x_BSI: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, S, I) -> (B, S, width); nothing depends on padding or batch mates."""
        out: Tensor = self.ahead(x_BSI)
        if self.back is not None:
            back = turned(self.back(turned(x_BSI, lengths_B)), lengths_B)
            out = torch.cat([out, back], -1)
        normed: Tensor = self.norm(out)
        return normed


class RecurrentEncoder(nn.Module):
    """Layers with reductions between them: the pyramid of Chan et al. 2016 (methods.md 26, 29).

    Reduction i stands before layer i + 1 (counted from 0), so that the first layer reads every
    position, and there are fewer reductions than layers.

    Attributes:
        width: features of the outputs.
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
        """(B, S, I), (B,) -> states (B, U, width) and which of them are real (B, U)."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                x_BSI = self.dropout(x_BSI)
            if 0 < i <= len(self.reductions):
                x_BSI, lengths_B = self.reductions[i - 1](x_BSI, lengths_B)
            x_BSI = layer(x_BSI, lengths_B)
        return x_BSI, is_real(lengths_B, x_BSI.shape[1])

    def last(self, states_BUM: Tensor, is_real_BU: Tensor) -> Tensor:
        """(B, M): where each direction has read everything; its outputs, not its cell states."""
        ends_B = is_real_BU.sum(1) - 1
        ahead_BM = states_BUM[torch.arange(len(ends_B), device=ends_B.device), ends_B]
        if not self.bidirectional:
            return ahead_BM
        half = states_BUM.shape[2] // 2
        return torch.cat([ahead_BM[:, :half], states_BUM[:, 0, half:]], 1)


def check_pyramid(layers: int, subsampling: SubsamplingConfig) -> None:
    """Refuses a pyramid whose reductions do not fit between its layers.

    Raises:
        ValueError: as many reductions as layers, or more.
    """
    if subsampling.reductions >= layers:
        raise ValueError(
            f"{subsampling.reductions} reductions need more than {layers} encoder layers, for they "
            f"stand between them. Fix: encoder_layers {subsampling.reductions + 1} or fewer "
            "subsampling.layers"
        )
