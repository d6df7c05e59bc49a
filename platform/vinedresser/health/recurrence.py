"""Gates of fused recurrent layers: kernels do not show them, but what went in and came out tells.

B sentences, T positions, I input features, D units, G gate features: 4 D (LSTM) or 3 D (GRU).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from vinedresser.batch import is_real

# A tanh beyond this, or a sigmoid as near to its end (within 0.01 of 0 or 1), is saturated: the
# gradient that is left is 2% (4%) of the largest. And the inputs that lead there.
SATURATED = 0.99
SIGMOID_END, TANH_END = math.log(SATURATED / (1 - SATURATED)), math.atanh(SATURATED)  # 4.595, 2.647

# Sentences of a batch that are looked at: 8 of 128 are 6% of the layer's forward pass.
_ROWS = 8


def lstm_at_ends(gates: Tensor) -> Tensor:
    """(..., 4 D) what enters the functions of an LSTM's i, f, g, o -> which of them saturate."""
    i, f, g, o = gates.abs().chunk(4, -1)
    return torch.cat([i > SIGMOID_END, f > SIGMOID_END, g > TANH_END, o > SIGMOID_END], -1)


def fused_at_ends(rnn: nn.RNNBase, args: Any, out: Any) -> tuple[Tensor, Tensor | None] | None:
    """Which gates of a fused LSTM or GRU saturate, in the first sentences of a batch.

    All that enters the gates at t are x_t, h_{t-1} and weights, so that they are known for all
    positions at once from the layer's inputs and outputs (Hochreiter and Schmidhuber 1997; Cho et
    al. 2014, as torch orders them).

    Args:
        rnn: the layer.
        args: of its call.
        out: of its call.

    Returns:
        (b, T, G) booleans and which positions are real (None: not known); or None for a layer
        whose inner states do not come out: several layers, both directions, projections.
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
        return lstm_at_ends(of_input + of_state), real_BT
    D = rnn.hidden_size
    rz = of_input[..., : 2 * D] + of_state[..., : 2 * D]
    n = of_input[..., 2 * D :] + rz[..., :D].sigmoid() * of_state[..., 2 * D :]
    return torch.cat([rz.abs() > SIGMOID_END, n.abs() > TANH_END], -1), real_BT
