"""Evaluation of a model on a split: decoded quality, teacher-forced loss, use of the source."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vinedresser.batch import Batch
from vinedresser.config import Decoding, Experiment
from vinedresser.data.batching.reader import Split, in_order
from vinedresser.data.batching.side import Side
from vinedresser.data.corpora.row import SourceItem
from vinedresser.data.tokenizers.tokenizer import SourceEncoder, TextTokenizer
from vinedresser.decode import decode, forced
from vinedresser.errors import InterruptedRunError
from vinedresser.metrics import measure
from vinedresser.model import Seq2Seq
from vinedresser.special_ids import EOS


@dataclass(frozen=True)
class Scoring:
    """Settings of an evaluation.

    `cap` is the longest output in tokens; `sentences` are scored, evenly spread over the split, 0
    for all.
    """

    metric: str
    decoding: Decoding
    cap: int
    sentences: int = 0

    @classmethod
    def of(cls, experiment: Experiment, *, sentences: int = 0) -> "Scoring":
        """Return the settings of an experiment, over some sentences or all."""
        task = experiment.task
        return cls(task.metric, experiment.decoding, task.max_target_length, sentences)


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a split: decoded quality and teacher-forced loss (methods.md 4).

    Attributes:
        metric: the name of `value`.
        value: inferred (decoded) score, see metrics.measure for unit and direction.
        signature: how it was computed.
        teacher_forced_loss: nats per real target token, without label smoothing.
        teacher_forced_error: wrong argmax tokens among real ones, given gold prefixes, percent.
        exact_error: the metric `ser`, sentences not exactly right in percent.
        sentences: number of scored sentences.
        length_ratio: decoded tokens per reference token, EOS included.
    """

    metric: str
    value: float
    signature: str
    teacher_forced_loss: float
    teacher_forced_error: float
    exact_error: float
    sentences: int
    length_ratio: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON with the value under the metric's own name: `{"per": 11.6, ...}`."""
        plain = asdict(self)
        return {self.metric: plain.pop("value"), **plain}


@dataclass(frozen=True)
class Evaluated:
    """Scores and what they were computed from, in the order of the split.

    Attributes:
        scores: of all sentences together.
        sources: source texts, or paths of recordings.
        hypotheses: decoded texts.
        references: texts of the corpus.
        outputs: decoded ids of each sentence and EOS.
        targets: reference ids of each sentence, EOS included.
        is_wrong: whether the most probable token, given the reference's prefix, is another: one
            flag per id of `targets`.
        folds_case: capitals and small letters count as equal.
    """

    scores: Scores
    sources: list[str]
    hypotheses: list[str]
    references: list[str]
    outputs: list[list[int]]
    targets: list[list[int]]
    is_wrong: list[list[bool]]
    folds_case: bool = False

    def samples(self, count: int = 20) -> list[tuple[str, str, str]]:
        """Return (source, reference, hypothesis) of the first sentences."""
        rows = zip(self.sources, self.references, self.hypotheses, strict=True)
        return list(rows)[:count]


def tokenized(
    rows: Sequence[tuple[SourceItem, str]], source: SourceEncoder, target: TextTokenizer
) -> Split:
    """Return plain (source, target) rows as a split, encoded by a finished model's tokenizers."""
    sources, references = [s for s, _ in rows], [t for _, t in rows]
    sides = Side.of(sources, source), Side.of(references, target)
    names = [s if isinstance(s, str) else " ".join(s) for s in sources]
    return Split("texts", *sides, names, references)


def measure_exposure_gap(evaluated: Evaluated, tokenizer: TextTokenizer) -> float:
    """Return the decoded minus the teacher-forced error, in percent points (methods.md 4).

    Both are errors per reference token of the target side, EOS included, whatever the metric is:
    edits of decoded tokens, and wrong tokens given the reference's own prefix.
    """
    hypotheses, references = (
        [" ".join(map(str, [*ids, EOS])) for ids in tokenizer.encode_many(texts)]
        for texts in (evaluated.hypotheses, evaluated.references)
    )
    return measure("wer", hypotheses, references).value - evaluated.scores.teacher_forced_error


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients; restore the mode of the model at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: Seq2Seq,
    split: Split,
    tokenizer: TextTokenizer,
    scoring: Scoring,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluated:
    """Decode a split in fp32 and score it.

    The model may be on any device and in any mode. `should_stop` is called before each batch.

    Raises:
        InterruptedRunError: `should_stop` returned true.
    """
    found: dict[int, tuple[list[int], list[int], list[bool]]] = {}
    nll = wrong = tokens = 0.0
    batches = in_order(
        split, tokens=scoring.decoding.max_padded_tokens, sentences=scoring.sentences
    )
    with _eval_mode(model):
        for host_batch in batches:
            if should_stop():
                raise InterruptedRunError(
                    "stopped on request during an evaluation; run the same command to resume"
                )
            batch = host_batch.to(model.device)
            is_real_BT = batch.is_real_BT
            states_ND, gold_N = model(batch)[is_real_BT], batch.target_BT[is_real_BT]
            log_p_NV = model.output.log_probs(states_ND)
            nll += float(F.nll_loss(log_p_NV, gold_N, reduction="sum"))
            is_wrong_N = log_p_NV.argmax(-1) != gold_N
            wrong += float(is_wrong_N.sum())
            tokens += len(gold_N)
            decoded = decode(
                model, batch.source_BS, batch.source_lengths_B, scoring.decoding, cap=scoring.cap
            )
            sizes = is_real_BT.sum(1).tolist()
            of_rows = (
                [[*ids, EOS] for ids in decoded.ids],
                [ids.tolist() for ids in torch.split(gold_N, sizes)],
                [flags.tolist() for flags in torch.split(is_wrong_N, sizes)],
            )
            found |= zip(host_batch.rows_B.tolist(), zip(*of_rows, strict=True), strict=True)
    order = sorted(found)
    outputs = [found[row][0] for row in order]
    targets = [found[row][1] for row in order]
    is_wrong = [found[row][2] for row in order]
    hypotheses = [tokenizer.decode(ids[:-1]) for ids in outputs]
    references = [split.references[row] for row in order]
    # Hypotheses without capitals are not scored against references with them.
    folds = tokenizer.folds_case
    measured = measure(scoring.metric, hypotheses, references, folds_case=folds)
    scores = Scores(
        metric=scoring.metric,
        value=measured.value,
        signature=f"{measured.signature}|{scoring.decoding.signature}|cap:{scoring.cap}",
        teacher_forced_loss=nll / tokens,
        teacher_forced_error=100 * wrong / tokens,
        exact_error=measure("ser", hypotheses, references, folds_case=folds).value,
        sentences=len(references),
        length_ratio=sum(map(len, outputs)) / tokens,
    )
    sources = [split.sources[row] for row in order]
    return Evaluated(scores, sources, hypotheses, references, outputs, targets, is_wrong, folds)


@dataclass(frozen=True)
class Conditioning:
    """Rise of the loss with the sources of other sentences (methods.md 2).

    Attributes:
        gap: NLL(shuffled sources) - NLL(true sources), nats per real target token; 0 for a model
            that does not use its source, above 1 for one that has learned a task.
        error: standard error of `gap` over sentences.
        true_loss: NLL(true sources), nats per token.
        sentences: number of sentences with an exchanged source.
    """

    gap: float
    error: float
    true_loss: float
    sentences: int

    @property
    def deviations(self) -> float:
        """Return the standard errors between the gap and 0; 0 where the gap is exactly 0."""
        if self.gap == 0:
            return 0.0
        return self.gap / self.error if self.error else math.copysign(math.inf, self.gap)


def conditioning_gap(model: Seq2Seq, batches: Iterable[Batch]) -> Conditioning:
    """Measure the loss with the sources of other sentences minus that with the true ones, in fp32.

    Each sentence of a batch gets the source at a distance of half a batch, so no sentence keeps its
    own. In batches of `in_order`, which are sorted by length, that is one of about the same length:
    the gap measures the content of sources, not their length. The model may be on any device and in
    any mode; batches are on the CPU, those of one sentence are left out.

    Raises:
        ValueError: no batch has 2 sentences.
    """
    gaps, true, counts = [], [], []
    with _eval_mode(model):
        for host_batch in batches:
            if len(host_batch.rows_B) < 2:
                continue
            batch = host_batch.to(model.device)
            own_B, other_B = (forced(model, b) for b in (batch, with_other_sources(batch)))
            gaps.append((other_B - own_B).double().cpu())
            true.append(own_B.double().cpu())
            counts.append(host_batch.target_lengths_B.double())
    if not gaps:
        raise ValueError("no batch has 2 sentences; the conditioning gap needs at least one")
    gap_N, true_N, count_N = (torch.cat(parts) for parts in (gaps, true, counts))
    n, tokens = len(gap_N), count_N.sum()
    gap = gap_N.sum() / tokens
    # Of a ratio of sums over sentences, which are drawn independently (Cochran 1977, 2.11).
    error = ((gap_N - gap * count_N) ** 2).sum().mul(n / (n - 1)).sqrt() / tokens
    return Conditioning(float(gap), float(error), float(true_N.sum() / tokens), n)


def with_other_sources(batch: Batch) -> Batch:
    """Return the batch with its sources rolled by half a batch: a derangement for B >= 2."""
    shift = len(batch.rows_B) // 2
    lengths_B = batch.source_lengths_B.roll(shift)
    return replace(batch, source_BS=batch.source_BS.roll(shift, 0), source_lengths_B=lengths_B)
