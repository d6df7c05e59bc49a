"""Multi-head attention with head gates, whole or step by step, any number of heads per layer.

B sentences, T query positions, S key positions, D features, H heads, K features per head.
"""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vinedresser.nn.dropout import Dropout
from vinedresser.nn.gates import HeadGates
from vinedresser.nn.record import is_recording, record

# Up to 128 x 128 scores per head, plain matmul and softmax beat the CPU's fused kernel: its
# backward pass took 32% of a step at 15 tokens per sentence. Same numbers either way.
_PLAIN_SCORES = 128 * 128
# Numbers in fp32 that the widest vector instructions take at once.
_VECTOR = 16


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a Glorot-uniform linear layer with zero bias; either size may be 0 (no heads)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        # torch leaves skip_init untyped.
        layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, inputs, outputs, device=torch.get_default_device()
        )
    if inputs and outputs:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _later(T: int, S: int, device: torch.device) -> Tensor:
    """Return a mask (T, S), true on keys after the query."""
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(1)


@dataclass
class Cache:
    """Keys and values of the positions so far: (B, H, L, K) each, of which `length` are filled."""

    keys_BHLK: Tensor
    values_BHLK: Tensor
    length: int


class MultiHeadAttention(nn.Module):
    """Concat(g_i * head_i) W_O + b (Vaswani et al. 2017; gates of Voita et al. 2019).

    Queries come from x; keys and values from x too, or from a memory (`is_cross`). With no head
    left the sub-layer still adds its output bias, as a gated layer with all gates 0 does.

    Attributes:
        pads_keys: keys are padded to whole vectors, which is faster and takes more arithmetic;
            false to count the arithmetic of the method.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        dropout: float,
        is_cross: bool = False,
        has_gates: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.is_cross = num_heads, head_dim, is_cross
        self.pads_keys = True
        # Features of a head's values.
        self.value_dim = self._build_projections(d_model)
        self.output = linear(num_heads * self.value_dim, d_model)
        self.dropout = Dropout(dropout)
        self.gates = HeadGates(num_heads) if has_gates else None

    def _build_projections(self, d_model: int) -> int:
        """Build the layers of queries, keys and values; return `value_dim`."""
        width = self.num_heads * self.head_dim
        if self.is_cross:
            self.query = linear(d_model, width)
            self.key_value = linear(d_model, 2 * width)
        else:
            # One product instead of three.
            self.query_key_value = linear(d_model, 3 * width)
        return self.head_dim

    def _split(self, x_BTW: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Map (B, T, parts * H * K) -> parts times (B, H, T, K)."""
        B, T = x_BTW.shape[:2]
        split = x_BTW.view(B, T, parts, self.num_heads, self.head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, H, T, K) of self-attention."""
        queries, keys, values = self._split(self.query_key_value(x_BTD), 3)
        return queries, keys, values

    def remember(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, S, K) of a memory, once per source (methods.md 56)."""
        keys, values = self._split(self.key_value(memory_BSD), 2)
        return keys, values

    def forward(
        self,
        x_BTD: Tensor,
        *,
        memory: tuple[Tensor, Tensor] | None = None,
        hidden: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Map (B, T, D) -> (B, T, D) for whole sequences.

        `memory` is what `remember` returned; `hidden`, bool, broadcasts to (B, H, T, S), and true
        positions get weight 0; with `is_causal` position t sees 0..t only.
        """
        if memory is None:
            queries, keys, values = self._project(x_BTD)
        else:
            (queries,), (keys, values) = self._split(self.query(x_BTD), 1), memory
        return self._merge(self._attend(queries, keys, values, hidden, is_causal))

    def step(
        self,
        x_B1D: Tensor,
        *,
        cache: Cache | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Map one position (B, 1, D) -> (B, 1, D). A cache is extended in place."""
        if memory is not None:
            (queries,), (keys, values) = self._split(self.query(x_B1D), 1), memory
        elif cache is not None:
            queries, key, value = self._project(x_B1D)
            cache.keys_BHLK[:, :, cache.length] = key[:, :, 0]
            cache.values_BHLK[:, :, cache.length] = value[:, :, 0]
            cache.length += 1
            keys = cache.keys_BHLK[:, :, : cache.length]
            values = cache.values_BHLK[:, :, : cache.length]
        else:
            raise ValueError("a step needs a cache or a memory")
        return self._merge(self._attend(queries, keys, values, hidden, is_causal=False))

    def new_cache(self, batch_size: int, max_length: int, like: Tensor) -> Cache:
        """Return an empty cache for `max_length` positions."""
        shape = (batch_size, self.num_heads, max_length)
        keys, values = (like.new_zeros((*shape, k)) for k in (self.head_dim, self.value_dim))
        return Cache(keys, values, 0)

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        hidden: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        T, S = queries.shape[2], keys.shape[2]
        is_long = queries.device.type != "cpu" or T * S > _PLAIN_SCORES
        if is_long and not is_recording():
            if is_causal and hidden is not None:  # the fused kernel takes one of the two only
                hidden, is_causal = hidden | _later(T, S, queries.device), False
            return F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=None if hidden is None else ~hidden,
                dropout_p=self.dropout.p if self.training else 0.0,
                is_causal=is_causal,
            )
        if is_causal:
            later = _later(T, S, queries.device)
            hidden = later if hidden is None else hidden | later
        # Whole vectors of keys: a softmax over 15 took 4.4 ms where one over 16 takes 0.3 ms.
        num_more = -S % _VECTOR if T > 1 and self.pads_keys else 0
        if num_more:
            keys, values = (F.pad(x, (0, 0, 0, num_more)) for x in (keys, values))
        scores_BHTS, scale = queries @ keys.transpose(-1, -2), self.head_dim**-0.5
        if hidden is None:
            hidden = torch.zeros(S, dtype=torch.bool, device=queries.device)
        bias = scores_BHTS.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        scores_BHTS = torch.add(
            F.pad(bias, (0, num_more), value=-math.inf), scores_BHTS, alpha=scale
        )
        wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
        weights_BHTS = torch.softmax(scores_BHTS, -1, dtype=wide).to(scores_BHTS.dtype)
        record(self, weights_BHTS[..., :S])
        attended: Tensor = self.dropout(weights_BHTS) @ values
        return attended

    def _merge(self, heads_BHTK: Tensor) -> Tensor:
        B, _, T, _ = heads_BHTK.shape
        if self.gates is not None:
            heads_BHTK = heads_BHTK * self.gates(B)[:, :, None, None].to(heads_BHTK.dtype)
        width = self.num_heads * self.value_dim
        merged: Tensor = self.output(heads_BHTK.transpose(1, 2).reshape(B, T, width))
        return merged

    def _head_layers(self) -> list[tuple[str, int, int]]:
        """Return the projections with rows per head: name, parts, features of a head in a part."""
        if self.is_cross:
            return [("query", 1, self.head_dim), ("key_value", 2, self.head_dim)]
        return [("query_key_value", 3, self.head_dim)]

    def kept(self, heads: list[int], scales: Tensor) -> dict[str, Tensor]:
        """Return the weights of a smaller layer: only these heads, each output scaled.

        Rows of the query, key and value projections of other heads are cut, columns of the output
        projection are multiplied by the head's gate: (g h) W = h (g W). What heads share stays.
        `heads` are indices, ascending; `scales` (H,) is the gate of every head.
        """
        H, V = self.num_heads, self.value_dim
        result = {n: t.detach() for n, t in self.state_dict().items() if "gates" not in n}
        for name, parts, features in self._head_layers():
            layer: nn.Linear = getattr(self, name)
            weight = layer.weight.detach().view(parts, H, features, -1)[:, heads]
            bias = layer.bias.detach().view(parts, H, features)[:, heads]
            result[f"{name}.weight"] = weight.reshape(-1, layer.in_features)
            result[f"{name}.bias"] = bias.reshape(-1)
        out = self.output.weight.detach().view(-1, H, V) * scales.to(self.output.weight)[:, None]
        result["output.weight"] = out[:, heads].reshape(self.output.out_features, -1)
        return {name: tensor.clone() for name, tensor in result.items()}
