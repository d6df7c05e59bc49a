"""A sentence's loss and output must not depend on its batch mates or on padding."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vinedresser.batch import BOS, EOS, Batch
from vinedresser.conditioning import sentence_nats
from vinedresser.decode import greedy
from vinedresser.health.sentences import Sentence, together, with_filled_padding
from vinedresser.health.verdict import Check
from vinedresser.model import Seq2Seq
from vinedresser.nn.gates import head_gates
from vinedresser.nn.norms import BatchNorm

# Nats per token that fp32 may differ by when matrices have another shape, or that share of losses
# over 1: the zoo stays below 1e-5; one position of a neighbour's is 1e-2 and more.
MAX_DRIFT = 1e-3
# Two next tokens whose log-probabilities are so near may swap places by rounding.
_TIE = 1e-3


@torch.no_grad()
def batch_invariance(
    model: Seq2Seq, dry: Seq2Seq, sentences: Sequence[Sentence], *, vocabulary: int, cap: int
) -> Check:
    """Sentences together against each alone, with PAD and with other things on padding.

    Args:
        model: as it is trained; in evaluation, losses and greedy outputs are compared.
        dry: without dropout; in training, losses are compared unless its gates draw noise.
        sentences: of different lengths.
        vocabulary: ids of the source; 0 for frames.
        cap: no output is longer.
    """
    was_training = model.training
    model.eval()
    try:
        drift, turned = _in_evaluation(model, sentences, vocabulary, cap)
    finally:
        model.train(was_training)
    drift_in_training = 0.0 if head_gates(dry) else _in_training(dry, sentences)
    # Not a fault but what batch normalisation is (nn/norms.py, methods.md 48).
    is_meant = any(isinstance(module, BatchNorm) for module in dry.modules())
    passed = drift <= MAX_DRIFT and not turned and (drift_in_training <= MAX_DRIFT or is_meant)
    figures = {"drift": drift, "drift_in_training": drift_in_training, "outputs": float(turned)}
    if not math.isfinite(drift):
        return Check(
            "batch invariance", None, "losses are not finite", f"≤ {MAX_DRIFT:g}, 0",
            "nothing can be compared before `conditioning` passes", {"outputs": float(turned)},
        )  # fmt: skip
    found = f"{max(drift, 0 if is_meant else drift_in_training):.1e} nats/token, {turned} outputs"
    pointer = ""
    if drift > MAX_DRIFT or turned:
        pointer = (
            "scores change with what else is in the batch: look for attention, convolution, "
            "recurrence or sums that reach over padding, and for statistics over the batch"
        )
    elif not passed:
        pointer = (
            "in training, losses change with what else is in the batch: look for statistics over "
            "the batch; nothing in the zoo but norm_kind=batch has them"
        )
    elif is_meant:
        pointer = (
            f"norm_kind=batch: in training {drift_in_training:.1e} nats/token hang on batch mates "
            "by design; evaluation and decoding do not"
        )
    return Check("batch invariance", passed, found, f"≤ {MAX_DRIFT:g}, 0", pointer, figures)


def _in_evaluation(
    model: Seq2Seq, sentences: Sequence[Sentence], vocabulary: int, cap: int
) -> tuple[float, int]:
    """Largest change of a loss, see `_drift`, and how many greedy outputs changed."""
    whole, alone = together(sentences), [together([s]) for s in sentences]
    own_B = torch.cat([_nats(model, batch) for batch in alone])
    filled = with_filled_padding(whole, vocabulary)
    drift = max(_drift(_nats(model, batch), own_B) for batch in (whole, filled))
    outputs = [_greedy(model, batch, cap)[0] for batch in alone]
    turned = sum(
        own != other and not _is_tie(model, batch, own, other)
        for batch, own, other in zip(alone, outputs, _greedy(model, whole, cap), strict=True)
    )
    return drift, turned


def _in_training(dry: Seq2Seq, sentences: Sequence[Sentence]) -> float:
    """Halves against the whole: one sentence alone is more than some forms can normalise.

    Each pass starts from the same running statistics.
    """
    dry.train()
    held = {name: tensor.clone() for name, tensor in dry.named_buffers()}
    parts = sentences[::2], sentences[1::2], [*sentences[::2], *sentences[1::2]]
    found = []
    for part in parts:
        for name, tensor in dry.named_buffers():
            tensor.copy_(held[name])
        found.append(_nats(dry, together(part)))
    return _drift(torch.cat(found[:2]), found[2])


def _drift(nats_B: Tensor, own_B: Tensor) -> float:
    """Largest change in nats per token; of losses over 1, which round as much more, their share."""
    return float(((nats_B - own_B).abs() / own_B.abs().clamp(min=1)).max())


def _nats(model: Seq2Seq, batch: Batch) -> Tensor:
    """(B,) nats per token of each sentence."""
    return sentence_nats(model, batch.to(model.device)).cpu() / batch.target_lengths_B


def _greedy(model: Seq2Seq, batch: Batch, cap: int) -> list[list[int]]:
    batch = batch.to(model.device)
    return greedy(model, batch.source_BS, batch.source_lengths_B, cap=cap).ids


def _is_tie(model: Seq2Seq, batch: Batch, own: list[int], other: list[int]) -> bool:
    """Whether two outputs part at two tokens that are equally probable but for rounding."""
    pairs = zip([*own, EOS], [*other, EOS], strict=False)
    at, (one, two) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    batch = batch.to(model.device)
    memory = model.encode(batch.source_BS, batch.source_lengths_B)
    prefix = torch.tensor([[BOS, *own[:at]]], device=model.device)
    log_p_V = model.logits(model.decode(memory, prefix)[0, -1]).float().log_softmax(-1)
    return abs(float(log_p_V[one] - log_p_V[two])) < _TIE
