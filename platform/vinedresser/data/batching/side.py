"""Side: the sequences of one side of some rows, flat, and how they become padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vinedresser.data.batching.plan import Ints
from vinedresser.data.tokenizers.flat import take_ragged
from vinedresser.data.tokenizers.tokenizer import SourceEncoder
from vinedresser.special_ids import PAD

if TYPE_CHECKING:  # workers that write shards do without torch
    from torch import Tensor

    from vinedresser.batch import Batch


@dataclass(frozen=True)
class Side:
    """Ids or frames of one side: row i is positions offsets[i] to offsets[i + 1] of the values.

    Attributes:
        values: flat ids, uint16 up to 65,536 of them, else int32, each row with EOS at its end;
            or flat frames, float16 or float32, `features` numbers per position.
        offsets: (n + 1,) int64, in positions.
        features: numbers of a frame; 0 for ids.
    """

    values: NDArray[Any]
    offsets: Ints
    features: int = 0

    @classmethod
    def of(cls, items: Sequence[Any], encoder: SourceEncoder) -> "Side":
        """Return the sequences that an encoder makes of texts, or of tuples of recordings."""
        values, lengths = encoder.flat(items)
        # 65,536 ids fit in two bytes; that halves shards and the memory of a loaded split.
        if not encoder.features and encoder.size <= 1 << 16:
            values = values.astype(np.uint16)
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]), encoder.features)

    @property
    def lengths(self) -> Ints:
        """(n,) ids of each row, EOS included; or its frames."""
        return np.diff(self.offsets)

    def take(self, rows: Ints) -> "Side":
        """Return the given rows, in their order."""
        width = self.features or 1
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        values = take_ragged(self.values, self.offsets[rows] * width, lengths * width)
        return Side(values, np.concatenate([[0], np.cumsum(lengths)]), self.features)

    def padded(self, rows: Ints) -> "tuple[Tensor, Tensor]":
        """Return rows as tensors, and their lengths (B,) int64.

        Ids become int64 (B, longest), padded with PAD; frames float32 (B, longest, features),
        padded with 0.
        """
        return self.take(rows).tensors()

    def tensors(self) -> "tuple[Tensor, Tensor]":
        """Return all its rows, as `padded` gives them; one row at least."""
        import torch

        lengths_B = self.lengths
        shape = (len(lengths_B), int(lengths_B.max()))
        is_real_BS = np.arange(shape[1]) < lengths_B[:, None]
        if self.features:
            frames_BSF = np.zeros((*shape, self.features), dtype=np.float32)
            frames_BSF[is_real_BS] = self.values.reshape(-1, self.features)
            return torch.from_numpy(frames_BSF), torch.from_numpy(lengths_B)
        ids_BS = np.full(shape, PAD, dtype=np.int64)
        ids_BS[is_real_BS] = self.values
        return torch.from_numpy(ids_BS), torch.from_numpy(lengths_B)


def join(sides: Sequence[Side]) -> Side:
    """Concatenate the rows of sides of equal features; one side at least."""
    if len(sides) == 1:
        return sides[0]
    lengths = np.concatenate([side.lengths for side in sides])
    values = np.concatenate([side.values for side in sides])
    return Side(values, np.concatenate([[0], np.cumsum(lengths)]), sides[0].features)


def batch_of(source: Side, target: Side, rows: Ints) -> "Batch":
    """Return rows as a batch on the CPU; `rows` are their places in the split."""
    import torch

    from vinedresser.batch import Batch

    return Batch(*source.tensors(), *target.tensors(), torch.from_numpy(rows.copy()))
