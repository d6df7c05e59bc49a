"""Score functions, and attention over an encoded source that uses them.

B sentences, S source positions, T target positions, D features of a query, M features of a
memory state, K features of a key.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vinedresser.nn.record import record
from vinedresser.nn.steps import Product, step_dtype

ScoreKind = Literal["cosine", "additive", "dot", "scaled_dot", "general"]
# exp(10) = 22,026: the best of 100 keys can get all but 1% of the weight. At a sharpness of 1 the
# largest ratio of two weights is e^2 = 7.4, and attention stays nearly flat.
_FIRST_SHARPNESS = 10.0


def check_widths(kind: ScoreKind, query_width: int, memory_width: int) -> None:
    """Refuse widths that a score function cannot compare.

    Raises:
        ValueError: cosine, dot or scaled_dot with unequal widths.
    """
    if kind in ("cosine", "dot", "scaled_dot") and query_width != memory_width:
        raise ValueError(
            f"score {kind} compares states of equal width; decoder states have {query_width}, "
            f"encoder states {memory_width} (both directions). Fix: equal widths, or score general"
        )


class Score(nn.Module):
    """Scores of queries against keys; the part that depends on the source is computed once.

    Attributes:
        is_product: true where scores are `query_factor` of the query times keys; else `forward`
            computes them.
    """

    is_product = True

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """Return the keys (B, S, K) of a memory."""
        return memory_BSM

    def query_factor(self, queries: Tensor) -> Tensor:
        """Return the factor of the keys (..., K) from queries (..., D)."""
        return queries

    def sharpened(self, keys_BSK: Tensor) -> Tensor:
        """Return keys times the sharpness of the softmax over the scores, 1 unless learned."""
        return keys_BSK

    def forward(self, queries_BTD: Tensor, keys_BSK: Tensor) -> Tensor:
        """Return scores (B, T, S)."""
        return self.query_factor(queries_BTD) @ keys_BSK.transpose(1, 2)


class Dot(Score):
    """s^T h (Luong et al. 2015; methods.md 44)."""


class ScaledDot(Score):
    """s^T h / sqrt(M): variance 1 for unit normals (Vaswani et al. 2017; methods.md 45)."""

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """See Score. The keys carry the scale: one product per source instead of one per step."""
        scale: float = memory_BSM.shape[-1] ** -0.5
        return memory_BSM * scale


class General(Score):
    """s^T W h (Luong et al. 2015), widths may differ; keys are W h."""

    def __init__(self, query_width: int, memory_width: int) -> None:
        super().__init__()
        self.key = nn.Linear(memory_width, query_width, bias=False)
        nn.init.xavier_uniform_(self.key.weight)

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """See Score."""
        keys_BSD: Tensor = self.key(memory_BSM)
        return keys_BSD


class Cosine(Score):
    """cos(s, h), in [-1, 1]: addressing by content (Graves et al. 2014; methods.md 42).

    Weights are softmax(beta * cos), their eq. 5. There the controller emits beta > 0 at each step;
    here it is one learned number, exp of a parameter. Without it the weights of two positions
    would differ by a factor of e^2 at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_sharpness = nn.Parameter(torch.tensor(_FIRST_SHARPNESS).log())

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """See Score. Keys of length 1; fp32 for the norms, whatever the precision."""
        wide = torch.promote_types(memory_BSM.dtype, torch.float32)
        return F.normalize(memory_BSM.to(wide), dim=-1).to(memory_BSM.dtype)

    def query_factor(self, queries: Tensor) -> Tensor:
        """See Score."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        return F.normalize(queries.to(wide), dim=-1).to(queries.dtype)

    def sharpened(self, keys_BSK: Tensor) -> Tensor:
        """See Score. Keys of length beta."""
        return (keys_BSK * self.log_sharpness.exp()).to(keys_BSK.dtype)

    def forward(self, queries_BTD: Tensor, keys_BSK: Tensor) -> Tensor:
        """See Score. Rounding does not leave [-1, 1]."""
        return super().forward(queries_BTD, keys_BSK).clamp(-1, 1)


class Additive(Score):
    """v^T tanh(W s + U h + b) (Bahdanau et al. 2015; methods.md 43); keys are U h + b.

    Takes O(B T S K) memory where the others take O(B T S).
    """

    is_product = False

    def __init__(self, query_width: int, memory_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_width, query_width, bias=False)
        self.key = nn.Linear(memory_width, query_width)
        # A row of a (1, K) Glorot layer.
        bound = (6 / (query_width + 1)) ** 0.5
        self.energy = nn.Parameter(torch.empty(query_width).uniform_(-bound, bound))
        nn.init.xavier_uniform_(self.query.weight)
        nn.init.xavier_uniform_(self.key.weight)
        nn.init.zeros_(self.key.bias)

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """See Score."""
        keys_BSK: Tensor = self.key(memory_BSM)
        return keys_BSK

    def forward(self, queries_BTD: Tensor, keys_BSK: Tensor) -> Tensor:
        """See Score."""
        summed_BTSK = self.query(queries_BTD)[:, :, None] + keys_BSK[:, None]
        return torch.tanh(summed_BTSK) @ self.energy.to(summed_BTSK.dtype)


def score(kind: ScoreKind, query_width: int, memory_width: int) -> Score:
    """Return a score function with fresh weights.

    Raises:
        ValueError: cosine, dot or scaled_dot with unequal widths.
    """
    check_widths(kind, query_width, memory_width)
    if kind == "general":
        return General(query_width, memory_width)
    if kind == "additive":
        return Additive(query_width, memory_width)
    return {"dot": Dot, "scaled_dot": ScaledDot, "cosine": Cosine}[kind]()


class EncodedSource:
    """Keys, values and mask of an encoded source, computed once.

    Keys are compared with the queries, values are averaged; `bias_BS` is -inf where a position gets
    weight 0, else 0.
    """

    def __init__(self, keys_BSK: Tensor, values_BSM: Tensor, bias_BS: Tensor) -> None:
        self.keys_BSK, self.values_BSM, self.bias_BS = keys_BSK, values_BSM, bias_BS
        self.by_keys = Product(keys_BSK)
        self.by_values = Product(values_BSM.transpose(1, 2))

    def select(self, rows: Tensor) -> "EncodedSource":
        """Return the source of the given rows, in their order."""
        parts = (self.keys_BSK, self.values_BSM, self.bias_BS)
        return EncodedSource(*(part.index_select(0, rows) for part in parts))


class Attention(nn.Module):
    """c_t = sum_i alpha_ti h_i with alpha_t = softmax of the scores (methods.md 40)."""

    def __init__(self, kind: ScoreKind, query_width: int, memory_width: int) -> None:
        super().__init__()
        self.score = score(kind, query_width, memory_width)

    def remember(self, memory_BSM: Tensor, values_BSM: Tensor, is_real_BS: Tensor) -> EncodedSource:
        """Return the keys and values of a source; once per source.

        Args:
            memory_BSM: input of the keys.
            values_BSM: averaged: the memory, or a linear map of it, since
                W sum_i alpha_i h_i = sum_i alpha_i W h_i.
            is_real_BS: true where a position counts; at least one in every row.
        """
        dtype = step_dtype(memory_BSM)
        bias_BS = memory_BSM.new_zeros(is_real_BS.shape, dtype=dtype)
        bias_BS = bias_BS.masked_fill(~is_real_BS, -torch.inf)
        keys_BSK = self.score.sharpened(self.score.remember(memory_BSM))
        return EncodedSource(keys_BSK.to(dtype), values_BSM.to(dtype), bias_BS)

    def forward(self, queries_BTD: Tensor, source: EncodedSource) -> Tensor:
        """Return contexts (B, T, M) of queries (B, T, D)."""
        queries_BTD = queries_BTD.to(source.keys_BSK.dtype)
        if self.score.is_product:
            scores_BTS = self.score.query_factor(queries_BTD) @ source.keys_BSK.transpose(1, 2)
        else:
            scores_BTS = self.score(queries_BTD, source.keys_BSK)
        return self._weights(scores_BTS + source.bias_BS[:, None]) @ source.values_BSM

    def begin(self, source: EncodedSource, steps: int) -> Tensor:
        """Return the `bias_BS` of each of `steps` steps in order, (T, B, S)."""
        bias_TBS = source.bias_BS.expand(steps, -1, -1)
        return source.by_keys.begin(bias_TBS) if self.score.is_product else bias_TBS

    def step(
        self, query_BD: Tensor, source: EncodedSource, bias_BS: Tensor, known_BM: Tensor
    ) -> Tensor:
        """Return known + context (B, M) of a query (B, D), with a step's bias from `begin`."""
        if self.score.is_product:
            scores_BS = source.by_keys(bias_BS, self.score.query_factor(query_BD))
        else:
            query_B1D = query_BD[:, None].to(source.keys_BSK.dtype)
            scores_BS = self.score(query_B1D, source.keys_BSK)[:, 0] + bias_BS
        return source.by_values(known_BM, self._weights(scores_BS[:, None])[:, 0])

    def _weights(self, scores_BTS: Tensor) -> Tensor:
        # Computed in fp32, also with bf16 inputs and outputs.
        weights_BTS = torch.softmax(scores_BTS, -1, dtype=scores_BTS.dtype)
        record(self, weights_BTS[:, None])
        return weights_BTS
