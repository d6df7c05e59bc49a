"""Attention maps with their tokens, diagonality and entropy.

B sentences, H heads, T queries, S keys.
methods.md 98.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vinedresser.batch import Batch
from vinedresser.bundle import Bundle
from vinedresser.data.batching.reader import Split
from vinedresser.data.batching.side import Side, batch_of
from vinedresser.data.tokenizers.flat import flattened
from vinedresser.data.tokenizers.frames import Filterbank
from vinedresser.data.tokenizers.tokenizer import SourceEncoder, TextTokenizer
from vinedresser.decode import greedy
from vinedresser.errors import DataError
from vinedresser.figures.attention import attention_figure
from vinedresser.model import Seq2Seq
from vinedresser.nn.subsampling import SubsamplingConfig
from vinedresser.special_ids import BOS
from vinedresser.tracking import Tracker

Floats = NDArray[np.floating[Any]]
# source: the source attends to itself; cross: the output to the source; output: to itself.
Kind = Literal["source", "cross", "output"]
Tokenizers = tuple[SourceEncoder, TextTokenizer]

# Characters of a label, at most.
_LABEL = 14
# Softmax in bf16 rounds each weight by up to 2^-9 of itself.
_ROUNDING = 2**-8


def diagonality(weights: Floats) -> Floats:
    """Return the diagonality of weights (..., T, S), (...), in [-1, 1].

    The Pearson correlation of query position t and key position s when one of the T queries is
    drawn at random and s by its weights: p(t, s) = a_ts / T (derived here; methods.md 98). 1 is
    the diagonal, also of a rectangle, -1 the anti-diagonal. It is 0 where s does not depend on t:
    uniform weights, or all on one key. Weights that are the diagonal's with a share l and uniform
    with 1 - l give l: blurred heads score less, unlike in the correlation of t with the
    expected position. Shifting the diagonal does not change it, so a head that looks
    one ahead is as diagonal; a causal head is by its shape: uniform over 0..t is sqrt(3/7) = 0.65.

    Args:
        weights: >= 0; rows need not sum to exactly 1. Padding is cut off, or has weight 0 along S.

    Returns:
        nan where T or S is 1, for there is no diagonal, and where a weight is nan.
    """
    T, S = weights.shape[-2:]
    if min(T, S) < 2:
        return np.full(weights.shape[:-2], np.nan)
    joint = weights.astype(np.float64)
    joint /= joint.sum((-2, -1), keepdims=True)
    t, s = np.arange(T) / (T - 1), np.arange(S) / (S - 1)
    of_t, of_s = joint.sum(-1), joint.sum(-2)
    mean_t, mean_s = of_t @ t, of_s @ s
    variance_t, variance_s = of_t @ t**2 - mean_t**2, of_s @ s**2 - mean_s**2
    covariance = ((joint @ s) * t).sum(-1) - mean_t * mean_s
    spread = np.sqrt(np.maximum(variance_t * variance_s, 0))
    # On one key: what is left of its variance is rounding.
    is_flat = variance_s < 1e-12
    found = np.where(is_flat, 0.0, covariance / np.where(is_flat, 1.0, spread))
    return np.asarray(np.clip(found, -1, 1))


def entropy(weights: Floats) -> Floats:
    """Return the mean over queries of -sum_s a log a, in nats: (..., T, S) -> (...), in [0, ln S].

    0 where each query attends to one key, ln S where it attends to all equally.
    """
    wide = weights.astype(np.float64)
    logs = np.log(np.where(wide > 0, wide, 1.0))
    return np.asarray(-(wide * logs).sum(-1).mean(-1))


@dataclass(frozen=True)
class Axis:
    """One side of a map.

    Attributes:
        name: of the side.
        labels: one per position; pieces of subsampled positions together.
        seconds: distance of the positions of a recording; 0 for tokens.
    """

    name: str
    labels: tuple[str, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class AttentionMap:
    """Attention of the heads of one module for one sentence pair.

    Attributes:
        name: path of the module in the model.
        kind: sides of queries and keys.
        weights: (H, T, S) float32; rows sum to 1 but for rounding.
        rows: queries. A row of the output is the token that it predicts, `</s>` the last.
        columns: keys. Of the output these are the tokens that were fed, `<s>` first.
    """

    name: str
    kind: Kind
    weights: NDArray[np.float32]
    rows: Axis
    columns: Axis

    @property
    def diagonality(self) -> list[float]:
        """Return the diagonality of each head."""
        return [float(value) for value in diagonality(self.weights)]

    @property
    def entropy(self) -> list[float]:
        """Return the entropy of each head in nats."""
        return [float(value) for value in entropy(self.weights)]

    @property
    def most_entropy(self) -> float:
        """Return ln S, the entropy of uniform weights."""
        return math.log(self.weights.shape[-1])


@dataclass(frozen=True)
class Attended:
    """Attention of a model while it decoded, or was fed, an output.

    Attributes:
        source: text, or paths.
        target: text of the output side.
        is_forced: the target was given; else it is the model's own greedy output.
        maps: one per module that attends, in the order of the pass.
    """

    source: str
    target: str
    is_forced: bool
    maps: tuple[AttentionMap, ...]

    def best(self, kind: Kind = "cross") -> tuple[str, int, float] | None:
        """Return (module, head, diagonality) of the most diagonal head of a kind; None without."""
        heads = [
            (found.name, head, value)
            for found in self.maps
            if found.kind == kind
            for head, value in enumerate(found.diagonality)
            if not math.isnan(value)
        ]
        return max(heads, key=lambda entry: entry[2], default=None)

    def to_json(self) -> dict[str, Any]:
        """Return plain values without the weights."""
        modules = {
            each.name: {
                "looks": each.kind,
                "diagonality": each.diagonality,
                "entropy": each.entropy,
                "most_entropy": each.most_entropy,
                "rows": each.rows.labels,
                "columns": each.columns.labels,
            }
            for each in self.maps
        }
        best = dict(zip(("module", "head", "diagonality"), self.best() or (), strict=False))
        own = {"source": self.source, "target": self.target, "is_forced": self.is_forced}
        return {**own, "best": best, "modules": modules}


def attention_of(bundle: Bundle, source: str, target: str | None = None) -> Attended:
    """Return every attention weight of a finished model on one sentence pair.

    The source is one that `Bundle.translate` takes; the target is fed to the decoder, None for its
    own greedy output.

    Raises:
        DataError: the source is refused by `Bundle.translate`, the target is too long, or the
            model has no attention.
    """
    cap, tokenizer = bundle.experiment.task.max_target_length, bundle.target_tokenizer
    read = bundle.read([source])
    if target is None:
        ids = greedy(bundle.model, *read.tensors(), cap=cap).ids[0]
    else:
        ids = tokenizer.encode(target)
        if len(ids) >= cap:
            raise DataError(f"target: {len(ids)} tokens; expected at most {cap - 1}")
    output_ids = flattened([ids])
    output = Side(output_ids.values, np.array([0, len(output_ids.values)]))
    batch = batch_of(read, output, np.zeros(1, np.int64))
    maps = attention_maps(bundle.model, batch, (bundle.source_tokenizer, tokenizer))
    if not maps:
        kind = type(bundle.experiment.model).__module__
        raise DataError(
            f"{bundle.folder}: a model of {kind} has no attention; Fix: name a model with "
            "attention, as transformer, attention_rnn or conv"
        )
    text = tokenizer.decode(ids) if target is None else target
    return Attended(source, text, target is not None, tuple(maps))


def attention_maps(model: Seq2Seq, batch: Batch, tokenizers: Tokenizers) -> list[AttentionMap]:
    """Return the maps of a batch of one sentence pair, under teacher forcing without dropout.

    The kind follows from a module's `is_cross` where it has one, else it is `cross`; modules of
    the encoder (`Seq2Seq.is_of_encoder`) are `source`.

    Raises:
        ValueError: more than one sentence, or rows of weights that do not sum to 1.
    """
    if len(batch.source_BS) != 1:
        raise ValueError(f"{len(batch.source_BS)} sentences; a map is of one")
    tokenizer = tokenizers[1]
    outputs = Axis("output", _names(tokenizer, batch.target_BT[0].tolist()))
    inputs = Axis("output so far", _names(tokenizer, [BOS, *batch.target_BT[0].tolist()[:-1]]))
    sources = _Sources(model, batch, tokenizers[0])
    maps = []
    for name, weights_BHTS in model.attention(batch).items():
        weights = weights_BHTS[0].float().cpu().numpy()
        _refuse_other_sums(name, weights)
        kind = kind_of(model, name)
        columns = inputs if kind == "output" else sources(weights.shape[-1])
        rows = columns if kind == "source" else outputs
        maps.append(AttentionMap(name, kind, weights, rows, columns))
    return maps


def kind_of(model: Seq2Seq, name: str) -> Kind:
    """Return the kind of attention of a module, by its name."""
    if model.is_of_encoder(name):
        return "source"
    module: nn.Module = model.get_submodule(name)
    return "cross" if getattr(module, "is_cross", True) else "output"


def _refuse_other_sums(name: str, weights: Floats) -> None:
    """Refuse weights that do not sum to 1; nan, of a model that has diverged, is accepted."""
    sums = weights.astype(np.float64).sum(-1)
    off = np.abs(sums[np.isfinite(sums)] - 1)
    if off.size and off.max() > _ROUNDING:
        raise ValueError(f"{name}: attention weights of a query sum to 1 +- {off.max():.3g}")


class _Sources:
    """Axes of the source, also of one that the encoder has shortened."""

    def __init__(self, model: Seq2Seq, batch: Batch, encoder: SourceEncoder) -> None:
        self._length = int(batch.source_lengths_B[0])
        self._shift = encoder.config.shift_ms / 1000 if isinstance(encoder, Filterbank) else 0.0
        config = getattr(getattr(model, "config", None), "subsampling", None)
        self._factor = 0
        if isinstance(config, SubsamplingConfig):
            self._factor = config.factor**config.reductions
        if self._shift:
            return
        self._names = _names(encoder, batch.source_BS[0].tolist())
        # Symbols are words of their own; pieces and characters carry their spaces.
        self._glue = " " if getattr(encoder, "kind", "") == "symbols" else ""

    def __call__(self, positions: int) -> Axis:
        """Return the axis of `positions`; several source tokens may share one.

        A position covers the `factor` tokens or frames at which the stride of its reductions
        begins; a convolution reads some on either side of them too.
        """
        factor = 1
        if positions != self._length:
            factor = self._factor or -(-self._length // positions)
        if self._shift:
            apart = factor * self._shift
            return Axis("source", tuple(f"{i * apart:.2f}" for i in range(positions)), apart)
        spans = (self._names[i * factor : (i + 1) * factor] for i in range(positions))
        return Axis("source", tuple(_short(self._glue.join(span)) for span in spans))


def _names(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    # A space is a character like others, and would be an invisible label.
    return tuple(_short(piece.replace(" ", "\u2423")) for piece in tokenizer.pieces(ids))


def _short(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "\u2026"


class AttentionWatch:
    """Attention of a model in training on a few fixed dev sentences.

    Up to 32 of them give the diagonality, each under its gold target; one of median length, with
    at most 20 target tokens, is drawn.
    """

    def __init__(self, dev: Split, tokenizers: Tokenizers) -> None:
        self._tokenizers = tokenizers
        longest = np.maximum(dev.source_lengths, dev.target_lengths)
        wanted = min(float(np.median(dev.target_lengths)), 20.0)
        drawn = int(np.abs(dev.target_lengths - wanted).argmin())
        spread = np.unique(np.linspace(0, len(dev) - 1, min(32, len(dev))).astype(np.int64))
        # Maps have up to longest^2 weights per head: 65,536 are 32 sentences of 45 tokens, or one
        # recording of 2.6 s.
        fits = len(spread) * longest[spread].max() ** 2 <= 1 << 16
        self._drawn = dev.batch(np.array([drawn], np.int64))
        self._batch = dev.batch(spread) if fits else self._drawn

    def diagonality(self, model: Seq2Seq) -> dict[str, list[float]]:
        """Return module -> mean diagonality of each head over the sentences; cross attention only.

        Sentences of one target token have none and do not count.
        """
        batch = self._batch.to(model.device)
        lengths = self._batch.target_lengths_B.tolist()
        found = {}
        for name, weights_BHTS in model.attention(batch).items():
            if kind_of(model, name) != "cross":
                continue
            weights = weights_BHTS.float().cpu().numpy()
            each = [diagonality(weights[i, :, :T]) for i, T in enumerate(lengths) if T > 1]
            if each and weights.shape[1]:
                found[name] = [float(value) for value in np.mean(each, 0)]
        return found

    def look(self, model: Seq2Seq, tracker: Tracker, step: int) -> Mapping[str, float]:
        """Store a figure of each module of cross attention in the run.

        Returns:
            `dev/diagonality` of the most diagonal head; nothing for a model that does not attend.
        """
        values = self.diagonality(model)
        if not values:
            return {}
        for found in attention_maps(model, self._drawn.to(model.device), self._tokenizers):
            if found.kind == "cross" and found.weights.size:
                picture = attention_figure(found, note=f"step {step}")
                tracker.figure(picture, f"attention/{found.name}/step-{step:08d}.png")
        return {"dev/diagonality": max(max(heads) for heads in values.values())}
