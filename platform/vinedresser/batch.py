"""Batch: padded ids and lengths. The shape legend of the whole project.

B sentences, S source positions, T target positions, D features, H heads, K features per head,
V vocabulary, N = real (not padded) target tokens of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vinedresser.special_ids import BOS, PAD


@dataclass(frozen=True)
class Batch:
    """Parallel sentences, padded on the right with PAD.

    Attributes:
        source_BS: int64, each row ends in EOS; or float32 frames (B, S, F), 0 on padding.
        source_lengths_B: int64, >= 1; ids count EOS, frames have none.
        target_BT: int64, targets of the decoder, each row ends in EOS.
        target_lengths_B: int64, EOS included, >= 1.
        rows_B: int64, the sentence's position in its split.
    """

    source_BS: Tensor
    source_lengths_B: Tensor
    target_BT: Tensor
    target_lengths_B: Tensor
    rows_B: Tensor

    @property
    def inputs_BT(self) -> Tensor:
        """Inputs of the decoder under teacher forcing: BOS, then the target without its end."""
        inputs_BT = torch.roll(self.target_BT, 1, dims=1)
        inputs_BT[:, 0] = BOS
        return inputs_BT

    @property
    def is_real_BT(self) -> Tensor:
        """True on target tokens, false on padding."""
        return self.target_BT != PAD

    @property
    def tokens(self) -> Tensor:
        """Real target tokens, EOS included; a scalar on the batch's device."""
        return self.target_lengths_B.sum()

    @property
    def padded(self) -> int:
        """Sentences x longest side: what a budget of tokens counts."""
        return len(self.rows_B) * max(self.source_BS.shape[1], self.target_BT.shape[1])

    def rows(self, first: int, end: int | None) -> "Batch":
        """Return some of the sentences, with their padding."""
        return Batch(*(tensor[first:end] for tensor in vars(self).values()))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; the copy does not wait where memory is pinned."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


def is_real(lengths_B: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size) bool, true before each length."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]
