"""Sentence pairs taken out of real batches, and new batches made of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vinedresser.batch import Batch
from vinedresser.special_ids import PAD


@dataclass(frozen=True)
class Sentence:
    """One pair, without padding.

    `source_S` and `target_T` are int64 ids, EOS at the end; the source of a speech task is float32
    frames (S, F). `row` is the index in its split.
    """

    source_S: Tensor
    target_T: Tensor
    row: int

    @property
    def longest(self) -> int:
        """Return the positions of the longer side."""
        return max(len(self.source_S), len(self.target_T))


def sentences_of(batch: Batch) -> list[Sentence]:
    """Return the rows of a batch."""
    return [
        Sentence(batch.source_BS[i, :source], batch.target_BT[i, :target], row)
        for i, (source, target, row) in enumerate(
            zip(
                batch.source_lengths_B.tolist(),
                batch.target_lengths_B.tolist(),
                batch.rows_B.tolist(),
                strict=True,
            )
        )
    ]


def collated(sentences: Sequence[Sentence]) -> Batch:
    """Return sentences as one batch, padded to the longest."""
    sources, targets = [s.source_S for s in sentences], [s.target_T for s in sentences]
    return Batch(
        pad_sequence(sources, batch_first=True, padding_value=PAD),
        torch.tensor([len(source) for source in sources]),
        pad_sequence(targets, batch_first=True, padding_value=PAD),
        torch.tensor([len(target) for target in targets]),
        torch.tensor([s.row for s in sentences]),
    )


def with_filled_padding(batch: Batch, vocabulary: int) -> Batch:
    """Return the batch with real ids, or frames of 9, instead of source padding.

    `vocabulary` counts the ids of the source; 0 for frames.
    """
    source_BS = batch.source_BS.clone()
    hidden_BS = torch.arange(source_BS.shape[1]) >= batch.source_lengths_B[:, None]
    source_BS[hidden_BS] = vocabulary - 1 if vocabulary else 9
    return replace(batch, source_BS=source_BS)


def distinct(sentences: Iterable[Sentence]) -> list[Sentence]:
    """Return the first sentence of each source: one source cannot have two right answers."""
    found: dict[bytes, Sentence] = {}
    for sentence in sentences:
        found.setdefault(sentence.source_S.numpy().tobytes(), sentence)
    return list(found.values())


def spread(sentences: Sequence[Sentence], count: int) -> list[Sentence]:
    """Return at most `count` sentences of evenly spread lengths, shortest first."""
    ordered = sorted(sentences, key=lambda s: (s.longest, s.row))
    if len(ordered) <= count:
        return ordered
    return [ordered[i * len(ordered) // count] for i in range(count)]
