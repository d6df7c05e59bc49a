"""Decoded quality of a model on a split, with the teacher-forced loss beside it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vinedresser.batch import EOS
from vinedresser.config import Decoding
from vinedresser.data.batching.reader import Split, in_order
from vinedresser.data.batching.side import Side
from vinedresser.data.corpora.row import Source
from vinedresser.data.tokenizers.tokenizer import SourceEncoder, TextTokenizer
from vinedresser.decode import decode
from vinedresser.errors import InterruptedRunError
from vinedresser.metrics import measure
from vinedresser.model import Seq2Seq


@dataclass(frozen=True)
class Scores:
    """A model on a split: inferred quality first, teacher-forced loss beside it (methods.md 4).

    Attributes:
        metric: the name of `value`.
        value: inferred (decoded) score, see metrics.measure for unit and direction.
        signature: how it was computed.
        teacher_forced_nats: cross-entropy per real target token, without label smoothing.
        teacher_forced_error: wrong argmax tokens among real ones, given gold prefixes, percent.
        exact_error: the metric `ser`, sentences not exactly right in percent.
        sentences: how many were scored.
    """

    metric: str
    value: float
    signature: str
    teacher_forced_nats: float
    teacher_forced_error: float
    exact_error: float
    sentences: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the value under the metric's own name: `{"per": 11.6, ...}`."""
        plain = asdict(self)
        return {self.metric: plain.pop("value"), **plain}


@dataclass(frozen=True)
class Evaluated:
    """Scores and what they were computed from, in the split's order."""

    scores: Scores
    sources: list[str]
    hypotheses: list[str]
    references: list[str]

    def samples(self, count: int = 20) -> list[tuple[str, str, str]]:
        """(source, reference, hypothesis) of the first sentences."""
        rows = zip(self.sources, self.references, self.hypotheses, strict=True)
        return list(rows)[:count]


def tokenized(
    rows: Sequence[tuple[Source, str]], source: SourceEncoder, target: TextTokenizer
) -> Split:
    """Plain (source, target) rows as a split, by a finished model's own tokenizers."""
    sources, references = [s for s, _ in rows], [t for _, t in rows]
    sides = Side.of(sources, source), Side.of(references, target)
    names = [s if isinstance(s, str) else " ".join(s) for s in sources]
    return Split("texts", *sides, names, references)


def exposure_gap(evaluated: Evaluated, tokenizer: TextTokenizer) -> float:
    """Return the decoded minus the teacher-forced error, in percent points (methods.md 4).

    Both are errors per reference token of the target side, EOS included, whatever the metric is:
    edits of decoded tokens, and wrong tokens given the reference's own prefix.
    """
    hypotheses, references = (
        [" ".join(map(str, [*ids, EOS])) for ids in tokenizer.encode_many(texts)]
        for texts in (evaluated.hypotheses, evaluated.references)
    )
    return measure("wer", hypotheses, references).value - evaluated.scores.teacher_forced_error


@torch.no_grad()
def evaluate(  # noqa: PLR0913 - what, of what, how
    model: Seq2Seq,
    split: Split,
    tokenizer: TextTokenizer,
    *,
    metric: str,
    decoding: Decoding,
    cap: int,
    sentences: int = 0,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluated:
    """Decodes a split in fp32 and scores it; leaves the model in the mode it was in.

    Args:
        model: on any device.
        split: with reference texts.
        tokenizer: of the target side.
        metric: which score.
        decoding: search and batch size.
        cap: no output is longer, in tokens.
        sentences: how many are scored; 0 for all.
        should_stop: asked before each batch.

    Raises:
        InterruptedRunError: `should_stop` said so.
    """
    was_training = model.training
    model.eval()
    device = model.device
    rows: list[int] = []
    texts: list[str] = []
    nats = wrong = tokens = 0.0
    for host_batch in in_order(split, tokens=decoding.max_padded_tokens, sentences=sentences):
        if should_stop is not None and should_stop():
            model.train(was_training)
            raise InterruptedRunError("told to stop while evaluating; the same command goes on")
        batch = host_batch.to(device)
        is_real_BT = batch.is_real_BT
        states_ND, gold_N = model(batch)[is_real_BT], batch.target_BT[is_real_BT]
        log_p_NV = model.output.log_probs(states_ND)
        nats += float(F.nll_loss(log_p_NV, gold_N, reduction="sum"))
        wrong += float((log_p_NV.argmax(-1) != gold_N).sum())
        tokens += len(gold_N)
        decoded = decode(model, batch.source_BS, batch.source_lengths_B, decoding, cap=cap)
        rows += host_batch.rows_B.tolist()
        texts += [tokenizer.decode(ids) for ids in decoded.ids]
    model.train(was_training)
    by_row = sorted(zip(rows, texts, strict=True))
    order, hypotheses = [row for row, _ in by_row], [text for _, text in by_row]
    references = [split.references[row] for row in order]
    # Hypotheses without capitals are not scored against references with them.
    folds = tokenizer.folds_case
    measured = measure(metric, hypotheses, references, folds_case=folds)
    scores = Scores(
        metric=metric,
        value=measured.value,
        signature=measured.signature,
        teacher_forced_nats=nats / tokens,
        teacher_forced_error=100 * wrong / tokens,
        exact_error=measure("ser", hypotheses, references, folds_case=folds).value,
        sentences=len(references),
    )
    return Evaluated(scores, [split.sources[row] for row in order], hypotheses, references)
