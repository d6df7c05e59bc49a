"""Attention whose values are projected at low rank, or not at all (methods.md 62, 63).

B sentences, T query positions, S key positions, D features, H heads, K features per head, R rank.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vinedresser.nn.attention import MultiHeadAttention, linear


@dataclass(frozen=True)
class ReducedValues:
    """Projection of values, and the attention types that use it.

    Attributes:
        heads: which heads are built, ascending; head h has the h-th slice of D / `of` features.
        of: how many heads there were before any was removed; divides D.
        rank: R of W_v = U V with U (D, R) shared by all heads and V (R, D); 0: values are the
            inputs themselves, W_v is the identity.
    """

    heads: tuple[int, ...]
    of: int
    rank: int = 0


class ReducedValueAttention(MultiHeadAttention):
    """Multi-head attention with W_v = U V of rank R, or with W_v = 1.

    Values are D / `of` wide whatever the queries' K. With one head, no bias and K = R = d, queries,
    keys and values have 4 D d weights at low rank and 2 D d without a value projection, where full
    attention has 3 D^2: 2,000, 1,000 and 7,500 at D = 50, d = 10.
    """

    def __init__(
        self,
        d_model: int,
        values: ReducedValues,
        head_dim: int,
        *,
        dropout: float,
        is_cross: bool = False,
        has_gates: bool = False,
    ) -> None:
        # Read while the base class builds; a plain value, so it may come before its __init__.
        self.values = values
        super().__init__(
            d_model,
            len(values.heads),
            head_dim,
            dropout=dropout,
            is_cross=is_cross,
            has_gates=has_gates,
        )

    def _build_projections(self, d_model: int) -> int:
        heads, of, rank = self.values.heads, self.values.of, self.values.rank
        if d_model % of:
            raise ValueError(f"d_model {d_model} is no multiple of {of} heads")
        width, value_dim = self.num_heads * self.head_dim, d_model // of
        if self.is_cross:
            self.query = linear(d_model, width)
            self.key = linear(d_model, width)
        else:
            self.query_key = linear(d_model, 2 * width)
        if rank:
            self.value_in = nn.Linear(d_model, rank, bias=False)
            nn.init.xavier_uniform_(self.value_in.weight)
            self.value_out = linear(rank, len(heads) * value_dim)
        return value_dim

    def _values(self, x_BSD: Tensor) -> Tensor:
        """Map (B, S, D) -> (B, H, S, D / of)."""
        B, S = x_BSD.shape[:2]
        heads, of = self.values.heads, self.values.of
        if self.values.rank:
            x_BSD = self.value_out(self.value_in(x_BSD))
            return x_BSD.view(B, S, len(heads), self.value_dim).transpose(1, 2)
        slices = x_BSD.view(B, S, of, self.value_dim).transpose(1, 2)
        return slices if len(heads) == of else slices[:, list(heads)]

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = self._split(self.query_key(x_BTD), 2)
        # The residual stream is wider than autocast's products; scores and values share a type.
        return queries, keys, self._values(x_BTD).to(keys.dtype)

    def remember(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """See MultiHeadAttention."""
        (keys,) = self._split(self.key(memory_BSD), 1)
        return keys, self._values(memory_BSD).to(keys.dtype)

    def _head_layers(self) -> list[tuple[str, int, int]]:
        layers = [("query_key", 2, self.head_dim)]
        if self.is_cross:
            layers = [("query", 1, self.head_dim), ("key", 1, self.head_dim)]
        return layers + ([("value_out", 1, self.value_dim)] if self.values.rank else [])
