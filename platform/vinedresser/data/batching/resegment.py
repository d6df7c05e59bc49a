"""Subword regularisation while reading: the same text in other pieces each time it is met.

Kudo 2018 for unigram models, BPE dropout (Provilkov et al. 2020) for BPE. Batches are planned on
the plain segmentation with room to spare, and what does not fit keeps it.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np

from vinedresser.config import Batching
from vinedresser.data.batching.side import Side
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.data.tokenizers.pieces import SentencePiece
from vinedresser.errors import DataError
from vinedresser.special_ids import EOS

# Share of rows whose other pieces shall fit where the plain ones would have.
FITTING = 0.95


@dataclass(frozen=True)
class Resegmenter:
    """Replaces the ids of a batch by another segmentation of the same text.

    Attributes:
        source: the source side's tokenizer; None leaves the side as it is.
        target: the target side's.
        alpha: see `Batching.subword_alpha`.
        tokens: the batch's budget; sentences x longest side stays within it.
        max_source: no source becomes longer, in tokens, EOS included.
        max_target: the same for targets.
        room: the budget over the one that batches are planned for, >= 1.
    """

    source: SentencePiece | None
    target: SentencePiece | None
    alpha: float
    tokens: int
    max_source: int
    max_target: int
    room: float = 1.0

    def __call__(self, source: Side, target: Side, *, seed: int) -> tuple[Side, Side]:
        """Segment both sides of a batch anew: a pure function of the batch and the seed < 2^31."""
        longest = self.tokens // max(1, len(source.lengths))
        return (
            self._side(source, self.source, limit=min(longest, self.max_source), seed=seed),
            self._side(target, self.target, limit=min(longest, self.max_target), seed=seed + 1),
        )

    def _side(self, side: Side, tokenizer: SentencePiece | None, *, limit: int, seed: int) -> Side:
        if tokenizer is None:
            return side
        flat = side.values.tolist()
        edges = side.offsets.tolist()
        plain = [flat[a : b - 1] for a, b in itertools.pairwise(edges)]
        drawn = tokenizer.resample(plain, alpha=self.alpha, seed=seed)
        # A plan never lets the plain row exceed the limit.
        rows = [new if 0 < len(new) < limit else old for new, old in zip(drawn, plain, strict=True)]
        lengths = np.array([len(row) + 1 for row in rows], dtype=np.int64)
        values = np.array([i for row in rows for i in (*row, EOS)], dtype=side.values.dtype)
        return Side(values, np.concatenate([[0], np.cumsum(lengths)]))


def resegmenter(
    shards: ShardSet, batching: Batching, sample: tuple[Side, Side]
) -> Resegmenter | None:
    """Return the resegmenter of `batch.subword_alpha`, or None where it is 0.

    At 0.1, BPE makes 1.36 times as many pieces of Multi30k, at 0.2 1.72 times; batches then hold
    0.55 and 0.43 of the rows. The sample is both sides of some rows, the same for each run: how
    much longer they become is how much room is left.

    Raises:
        DataError: neither side has a tokenizer that can segment in more than one way.
    """
    if not batching.subword_alpha:
        return None
    task = shards.task
    source, target = (t if isinstance(t, SentencePiece) else None for t in tokenizers(shards))
    if source is None and target is None:
        raise DataError(
            f"batch.subword_alpha is {batching.subword_alpha}, but no side of {task.name} has a "
            "bpe or unigram tokenizer. Fix: set batch.subword_alpha=0, or prepare with one"
        )
    limits = (task.max_source_length, task.max_target_length)
    free = Resegmenter(source, target, batching.subword_alpha, 1 << 40, *limits)
    plain, drawn = (
        np.maximum(*(side.lengths for side in sides)) for sides in (sample, free(*sample, seed=0))
    )
    room = float(np.quantile(drawn / plain, FITTING)) if len(plain) else 1.0
    return replace(free, tokens=batching.max_padded_tokens, room=max(1.0, room))


def seed_of(*key: int) -> int:
    """Return a 31-bit seed of some numbers, even; `Resegmenter` uses it and the next one."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 2 << 1
