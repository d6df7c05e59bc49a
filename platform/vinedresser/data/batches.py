"""From shards to padded tensors: an endless, resumable stream, and a finite, sorted pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vinedresser.batch import PAD, Batch
from vinedresser.data.encode import take_ragged
from vinedresser.data.order import Ints, Order, arrange, refuse_longer
from vinedresser.data.shards import ShardSet
from vinedresser.errors import DamagedError, DataError


@dataclass(frozen=True)
class Side:
    """Ids of one side: row i is values[offsets[i] : offsets[i + 1]], EOS at its end.

    Attributes:
        values: flat ids, uint16 up to 65,536 of them, else int32.
        offsets: (n + 1,) int64.
    """

    values: NDArray[Any]
    offsets: Ints

    @property
    def lengths(self) -> Ints:
        """(n,) tokens of each row, EOS included."""
        return np.diff(self.offsets)

    def padded(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """Rows -> ids (B, longest) padded with PAD, and lengths (B,); both int64."""
        lengths_B = self.offsets[rows + 1] - self.offsets[rows]
        padded = np.full((len(rows), int(lengths_B.max())), PAD, dtype=np.int64)
        is_real = np.arange(padded.shape[1]) < lengths_B[:, None]
        padded[is_real] = take_ragged(self.values, self.offsets[rows], lengths_B)
        return torch.from_numpy(padded), torch.from_numpy(lengths_B)


@dataclass(frozen=True)
class Split:
    """A split in memory, in the corpus's order: about 2 bytes a token, no object a row.

    Attributes:
        name: train, dev or test.
        source: source ids.
        target: target ids.
        sources: source texts of dev and test; empty for train.
        references: target texts of dev and test; empty for train.
    """

    name: str
    source: Side
    target: Side
    sources: list[str]
    references: list[str]

    def __len__(self) -> int:
        return len(self.source.offsets) - 1

    @property
    def source_lengths(self) -> Ints:
        """(n,) source tokens of each row, EOS included."""
        return self.source.lengths

    @property
    def target_lengths(self) -> Ints:
        """(n,) target tokens of each row, EOS included."""
        return self.target.lengths

    def batch(self, rows: Ints) -> Batch:
        """The given rows, in their order, as padded tensors on the CPU."""
        return Batch(
            *self.source.padded(rows), *self.target.padded(rows), torch.from_numpy(rows.copy())
        )


def load_split(shards: ShardSet, name: str) -> Split:
    """Reads a split whole; page checksums are verified.

    Raises:
        DataError: the set has no such split.
        DamagedError: a shard cannot be read; names it.
    """
    if name not in shards.counts:
        raise DataError(f"{shards.folder} has no {name} split; it has {', '.join(shards.counts)}")
    table = pa.concat_tables(_read(shards.folder / file) for file in shards.meta["shards"][name])
    order = np.argsort(table["row"].to_numpy())
    if len(order) != shards.counts[name]:
        raise DamagedError(
            f"{shards.folder}: {len(order)} {name} rows, the manifest says {shards.counts[name]}; "
            "re-run `prepare`"
        )
    texts = {"source_text": list[str](), "target_text": list[str]()}
    for column in texts:
        if column in table.column_names:
            texts[column] = table[column].take(pa.array(order)).to_pylist()
    return Split(
        name, _side(table["source"], order), _side(table["target"], order), *texts.values()
    )


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: unreadable ({reason}); re-run `prepare`") from None


def _side(column: pa.ChunkedArray, order: Ints) -> Side:
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    sizes = [np.diff(chunk.offsets.to_numpy()).astype(np.int64) for chunk in column.chunks]
    values, lengths = np.concatenate(chunks), np.concatenate(sizes)
    starts = (np.cumsum(lengths) - lengths)[order]
    lengths = lengths[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Side(take_ragged(values, starts, lengths), offsets)


class Batches:
    """An endless sequence of training batches: a pure function of (seed, index).

    Index i is batch i % per_epoch of epoch i // per_epoch. Every epoch holds each row once. Its
    batches come in an order of their own, and rows of equal lengths change places between them,
    so that epochs differ in composition at the same padding and the same number of batches.

    Attributes:
        per_epoch: batches of an epoch.
    """

    def __init__(self, split: Split, *, tokens: int, seed: int) -> None:
        """Plans the epoch; DataError where a single row is longer than the budget."""
        lengths = (split.source_lengths, split.target_lengths)
        refuse_longer(*lengths, tokens=tokens)
        self._split, self._seed = split, seed
        self._order = arrange(*lengths, tokens=tokens)
        self.per_epoch = len(self._order.cuts) - 1
        if not self.per_epoch:
            raise DataError(f"{split.name}: 0 rows; nothing to train on")
        self._epoch = -1
        self._rows = self._turns = self._order.rows

    def rows(self, index: int) -> Ints:
        """Row numbers of a batch; a new epoch costs a sort, 0.2 s a million rows."""
        epoch, at = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._rows, self._turns = _shuffled(self._order, self._seed, epoch)
            self._epoch = epoch
        turn = int(self._turns[at])
        return self._rows[self._order.cuts[turn] : self._order.cuts[turn + 1]]

    def __getitem__(self, index: int) -> Batch:
        return self._split.batch(self.rows(index))


def _shuffled(order: Order, seed: int, epoch: int) -> tuple[Ints, Ints]:
    """An epoch's rows, shuffled within equal lengths, and the order of its batches."""
    random = np.random.default_rng([seed, epoch])
    turns = np.argsort(random.random(len(order.cuts) - 1), kind="stable")
    return order.rows[np.lexsort((random.random(len(order.rows)), order.ties))], turns


def stream(
    split: Split, *, tokens: int, seed: int, rank: int = 0, of: int = 1, at: int = 0
) -> Iterator[Batch]:
    """Training batches without end; the caller counts steps.

    Step s (0-based) of rank r is the batch of global index s * of + r. So ranks never overlap,
    lose nothing, have equally many steps, and a stream resumes at any step in constant time.

    Args:
        split: what to train on.
        tokens: sentences x longest side of a batch, at most.
        seed: the same seed, the same batches; >= 0.
        rank: which worker, 0 <= rank < of.
        of: how many workers.
        at: steps already taken.

    Raises:
        DataError: a single row is longer than `tokens`, or there is none.
    """
    if not 0 <= rank < of or at < 0:
        raise ValueError(f"rank {rank} of {of} at {at}: 0 <= rank < of and at >= 0 are wanted")
    batches = Batches(split, tokens=tokens, seed=seed)
    return _from(batches, start=at * of + rank, step=of)


def _from(batches: Batches, *, start: int, step: int) -> Iterator[Batch]:
    index = start
    while True:
        yield batches[index]
        index += step


def in_order(split: Split, *, tokens: int, sentences: int = 0) -> Iterator[Batch]:
    """Each row once, sorted by length, for evaluation; `rows_B` tells where it belongs.

    Args:
        split: what to evaluate on.
        tokens: sentences x longest side of a batch; a longer row comes alone.
        sentences: 0 for all rows, else this many, evenly spread over the split and the same for
            every seed.
    """
    total = len(split)
    count = min(sentences, total) if sentences else total
    chosen = np.arange(count, dtype=np.int64) * total // max(1, count)
    lengths = (split.source_lengths[chosen], split.target_lengths[chosen])
    for rows in arrange(*lengths, tokens=tokens).batches():
        yield split.batch(chosen[rows])
