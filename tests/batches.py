"""Batches out of lists of ids."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vinedresser.special_ids import PAD


def pad_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return lists of ids as (B, longest) int64 padded with PAD, and their lengths (B,)."""
    lengths = [len(row) for row in rows]
    padded = torch.full((len(rows), max(lengths)), PAD, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded, torch.tensor(lengths, dtype=torch.int64)
