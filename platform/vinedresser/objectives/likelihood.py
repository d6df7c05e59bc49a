"""Conditional maximum likelihood with label smoothing (methods.md 1, 78).

N real target tokens, D features, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.model import Seq2Seq


@dataclass(frozen=True)
class Loss:
    """Sums over real target tokens; over ranks and micro-batches sums add, means do not.

    Attributes:
        total: nats, differentiable scalar.
        tokens: how many, int64 scalar.
    """

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Nats per token."""
        return self.total / self.tokens


def likelihood(
    model: Seq2Seq, states_BTD: Tensor, batch: Batch, *, label_smoothing: float = 0.0
) -> Loss:
    """Cross-entropy of the targets in nats, over real tokens only.

    States are picked before the output layer, so that padding costs no projection. Uniform
    logits give exactly ln |V| a token.

    Args:
        model: supplies the output layer.
        states_BTD: decoder states, position t predicting target t.
        batch: supplies targets and padding.
        label_smoothing: share of the target mass spread evenly over the vocabulary, in [0, 1].
    """
    is_real_BT = batch.is_real_BT
    states_ND, gold_N = states_BTD[is_real_BT], batch.target_BT[is_real_BT]
    total = model.output.nll(states_ND, gold_N, smoothing=label_smoothing)
    return Loss(total, batch.tokens)
