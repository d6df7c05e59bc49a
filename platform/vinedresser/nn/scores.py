"""Score functions of attention over an encoded source, and the attention that they make.

B sentences, S source positions, T target positions, D features of a query, M features of a
memory state, K features of a key.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vinedresser.nn.record import record

ScoreKind = Literal["cosine", "additive", "dot", "scaled_dot", "general"]
# exp(10) = 22,026: the best of 100 keys can get all but 1% of the weight. At a sharpness of 1 the
# largest ratio of two weights is e^2 = 7.4, and attention stays nearly flat.
_FIRST_SHARPNESS = 10.0


def check_widths(kind: ScoreKind, query_width: int, memory_width: int) -> None:
    """Refuses widths that a score function cannot compare.

    Raises:
        ValueError: cosine, dot or scaled_dot with unequal widths.
    """
    if kind in ("cosine", "dot", "scaled_dot") and query_width != memory_width:
        raise ValueError(
            f"score {kind} compares states of equal width; decoder states have {query_width}, "
            f"encoder states {memory_width} (both directions). Fix: equal widths, or score general"
        )


class Score(nn.Module):
    """Scores of queries against keys; what depends on the source alone is computed once."""

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """Keys (B, S, K) of a memory."""
        return memory_BSM

    def forward(self, queries_BTD: Tensor, keys_BSK: Tensor) -> Tensor:
        """(B, T, S) scores; weights are their softmax over S."""
        return queries_BTD @ keys_BSK.transpose(1, 2)


class Dot(Score):
    """s^T h (Luong et al. 2015; methods.md 44)."""


class ScaledDot(Score):
    """s^T h / sqrt(M): variance 1 for unit normals (Vaswani et al. 2017; methods.md 45)."""

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """See Score. The keys carry the scale: one product a source instead of one a step."""
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
    """beta * cos(s, h): addressing by content (Graves et al. 2014, eq. 5 and 6; methods.md 42).

    There the controller emits beta > 0 at each step; here it is one learned number, exp of a
    parameter. Without it the weights of two positions would differ by a factor of e^2 at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_sharpness = nn.Parameter(torch.tensor(_FIRST_SHARPNESS).log())

    def remember(self, memory_BSM: Tensor) -> Tensor:
        """See Score. Keys of length beta; fp32 for the norms, whatever the precision."""
        units_BSM = F.normalize(memory_BSM.float(), dim=-1)
        return (units_BSM * self.log_sharpness.exp()).to(memory_BSM.dtype)

    def forward(self, queries_BTD: Tensor, keys_BSK: Tensor) -> Tensor:
        """See Score."""
        units_BTD = F.normalize(queries_BTD.float(), dim=-1).to(keys_BSK.dtype)
        return units_BTD @ keys_BSK.transpose(1, 2)


class Additive(Score):
    """v^T tanh(W s + U h + b) (Bahdanau et al. 2015; methods.md 43); keys are U h + b.

    Takes O(B T S K) memory where the others take O(B T S).
    """

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
    """A score function with fresh weights.

    Raises:
        ValueError: cosine, dot or scaled_dot with unequal widths.
    """
    check_widths(kind, query_width, memory_width)
    if kind == "general":
        return General(query_width, memory_width)
    if kind == "additive":
        return Additive(query_width, memory_width)
    return {"dot": Dot, "scaled_dot": ScaledDot, "cosine": Cosine}[kind]()


@dataclass(frozen=True)
class Source:
    """What attention needs of an encoded source, computed once.

    Attributes:
        keys_BSK: what queries are compared with.
        values_BSM: what is averaged.
        hidden_B1S: true where a position gets weight 0.
    """

    keys_BSK: Tensor
    values_BSM: Tensor
    hidden_B1S: Tensor

    def select(self, rows: Tensor) -> "Source":
        """The source of the given rows, in their order."""
        return Source(
            self.keys_BSK.index_select(0, rows),
            self.values_BSM.index_select(0, rows),
            self.hidden_B1S.index_select(0, rows),
        )


class Attention(nn.Module):
    """c_t = sum_i alpha_ti h_i with alpha_t = softmax of the scores (methods.md 40)."""

    def __init__(self, kind: ScoreKind, query_width: int, memory_width: int) -> None:
        super().__init__()
        self.score = score(kind, query_width, memory_width)

    def remember(self, memory_BSM: Tensor, values_BSM: Tensor, is_real_BS: Tensor) -> Source:
        """Keys once a source.

        Args:
            memory_BSM: what the keys are made of.
            values_BSM: what is averaged: the memory, or a linear map of it, since
                W sum_i alpha_i h_i = sum_i alpha_i W h_i.
            is_real_BS: true where a position counts; at least one in every row.
        """
        return Source(self.score.remember(memory_BSM), values_BSM, ~is_real_BS[:, None])

    def forward(self, queries_BTD: Tensor, source: Source) -> Tensor:
        """(B, T, D) queries -> (B, T, M) contexts."""
        scores_BTS = self.score(queries_BTD, source.keys_BSK)
        scores_BTS = scores_BTS.masked_fill(source.hidden_B1S, -torch.inf)
        # In fp32 inside, also where it takes and gives bf16.
        weights_BTS = torch.softmax(scores_BTS, -1, dtype=scores_BTS.dtype)
        record(self, weights_BTS[:, None])
        return weights_BTS @ source.values_BSM
