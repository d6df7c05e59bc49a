"""Flat: the sequences of some rows one after the other, without a Python object per row."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vinedresser.special_ids import BOS, EOS, PAD


class Flat(NamedTuple):
    """Sequences of rows.

    Attributes:
        values: int32 ids, EOS at the end of each row; or float16 frames, all their numbers.
        lengths: (n,) int64, positions of each row: ids with EOS, or frames.
    """

    values: NDArray[Any]
    lengths: NDArray[np.int64]


def flattened(rows: Sequence[Sequence[int]]) -> Flat:
    """Return lists of ids, EOS appended to each."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
    return Flat(np.insert(ids, np.cumsum(lengths), EOS), lengths + 1)


def take_ragged(
    values: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[Any]:
    """Concatenate the slices values[start : start + length] without a Python loop."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return values[shift + np.arange(len(shift))]


def real_ids(ids: Iterable[int]) -> list[int]:
    """Return ids without PAD, BOS and EOS."""
    return [int(i) for i in ids if i not in (PAD, BOS, EOS)]
