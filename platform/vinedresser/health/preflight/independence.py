"""Checks that results depend neither on batch mates and padding nor on the way of decoding."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.decode import forced, greedy
from vinedresser.health.preflight.check import CheckResult
from vinedresser.health.preflight.sentences import Sentence, collated, with_filled_padding
from vinedresser.model import Seq2Seq
from vinedresser.nn.gates import head_gates
from vinedresser.nn.norms import BatchNorm
from vinedresser.special_ids import BOS, EOS

# Nats per token that fp32 may differ by when matrices have another shape, or that share of losses
# over 1: the zoo stays below 1e-5; one position of a neighbour's is 1e-2 and more.
MAX_DRIFT = 1e-3
# Two next tokens whose log-probabilities are so near may swap places by rounding.
_TIE = 1e-3
# Largest difference of a log-probability between the two ways of decoding, in float64
# (methods.md 3): the zoo stays below 1e-12.
MAX_STEPWISE = 1e-6


@torch.no_grad()
def check_batch_invariance(
    model: Seq2Seq, dry: Seq2Seq, sentences: Sequence[Sentence], *, vocabulary: int, cap: int
) -> CheckResult:
    """Check sentences in a batch against each alone, with PAD and with other ids on padding.

    The model is compared in evaluation, as it is trained: losses and greedy outputs. `dry`, without
    dropout, is compared in training by its losses, unless its gates draw noise. `vocabulary` counts
    the ids of the source, 0 for frames.
    """
    was_training = model.training
    model.eval()
    try:
        drift, turned = _in_evaluation(model, sentences, vocabulary, cap)
    finally:
        model.train(was_training)
    drift_in_training = 0.0 if head_gates(dry) else _in_training(dry, sentences)
    # Batch normalisation works so (nn/norms.py, methods.md 48).
    is_meant = any(isinstance(module, BatchNorm) for module in dry.modules())
    passed = drift <= MAX_DRIFT and not turned and (drift_in_training <= MAX_DRIFT or is_meant)
    figures = {"drift": drift, "drift_in_training": drift_in_training, "outputs": float(turned)}
    if not math.isfinite(drift):
        return CheckResult(
            "batch invariance", None, "losses are not finite", f"≤ {MAX_DRIFT:g}, 0",
            "nothing can be compared before `conditioning` passes", {"outputs": float(turned)},
        )  # fmt: skip
    found = f"{max(drift, 0 if is_meant else drift_in_training):.1e} nats/token, {turned} outputs"
    pointer = ""
    if drift > MAX_DRIFT or turned:
        pointer = (
            "scores change with the other sentences of the batch: look for attention, convolution, "
            "recurrence or sums that reach over padding, and for statistics over the batch"
        )
    elif not passed:
        pointer = (
            "in training, losses change with the other sentences of the batch: look for statistics "
            "over the batch; nothing in the zoo but norm_kind=batch has them"
        )
    elif is_meant:
        pointer = (
            f"norm_kind=batch: in training {drift_in_training:.1e} nats/token depend on batch "
            "mates by design; evaluation and decoding do not"
        )
    return CheckResult("batch invariance", passed, found, f"≤ {MAX_DRIFT:g}, 0", pointer, figures)


@torch.no_grad()
def check_stepwise_equality(model: Seq2Seq, sentences: Sequence[Sentence]) -> CheckResult:
    """Check that decoding step by step gives the teacher-forced log-probabilities (methods.md 3).

    In float64 and in evaluation mode, where both ways differ by rounding alone. The model is
    converted to float64.
    """
    exact = model.double().eval()
    batch = collated(sentences).to(exact.device)
    source_BS = batch.source_BS
    if source_BS.is_floating_point():
        source_BS = source_BS.double()
    memory = exact.encode(source_BS, batch.source_lengths_B)
    whole_BTD, drift = exact.decode(memory, batch.inputs_BT), 0.0
    state = exact.start(memory, batch.inputs_BT.shape[1])
    for t, is_real_B in enumerate(batch.is_real_BT.unbind(1)):
        states_BD, state = exact.step(state, batch.inputs_BT[:, t])
        log_p_BV, wanted_BV = map(exact.output.log_probs, (states_BD, whole_BTD[:, t]))
        found = (log_p_BV - wanted_BV)[is_real_B].abs().max()
        drift = max(drift, float(found))
    passed = drift <= MAX_STEPWISE
    pointer = "" if passed else (
        "step-by-step decoding differs from the teacher-forced pass: look at start(), step(), "
        "caches and positions"
    )  # fmt: skip
    return CheckResult(
        "stepwise equality", passed, f"{drift:.1e} nats", f"≤ {MAX_STEPWISE:g} in float64", pointer,
        {"drift": drift},
    )  # fmt: skip


def _in_evaluation(
    model: Seq2Seq, sentences: Sequence[Sentence], vocabulary: int, cap: int
) -> tuple[float, int]:
    """Return the largest change of a loss, see `_drift`, and the number of changed outputs."""
    whole, alone = collated(sentences), [collated([s]) for s in sentences]
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
    """Return the drift of halves against the whole: some forms cannot normalise one sentence.

    Each pass starts from the same running statistics.
    """
    dry.train()
    held = {name: tensor.clone() for name, tensor in dry.named_buffers()}
    parts = sentences[::2], sentences[1::2], [*sentences[::2], *sentences[1::2]]
    found = []
    for part in parts:
        for name, tensor in dry.named_buffers():
            tensor.copy_(held[name])
        found.append(_nats(dry, collated(part)))
    return _drift(torch.cat(found[:2]), found[2])


def _drift(nats_B: Tensor, own_B: Tensor) -> float:
    """Return the largest change in nats per token; relative for losses over 1."""
    return float(((nats_B - own_B).abs() / own_B.abs().clamp(min=1)).max())


def _nats(model: Seq2Seq, batch: Batch) -> Tensor:
    """Return the nats per token of each sentence, (B,)."""
    return forced(model, batch.to(model.device)).cpu() / batch.target_lengths_B


def _greedy(model: Seq2Seq, batch: Batch, cap: int) -> list[list[int]]:
    batch = batch.to(model.device)
    return greedy(model, batch.source_BS, batch.source_lengths_B, cap=cap).ids


def _is_tie(model: Seq2Seq, batch: Batch, own: list[int], other: list[int]) -> bool:
    """Return true if two outputs first differ at two equally probable tokens."""
    pairs = zip([*own, EOS], [*other, EOS], strict=False)
    at, (one, two) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    batch = batch.to(model.device)
    memory = model.encode(batch.source_BS, batch.source_lengths_B)
    prefix = torch.tensor([[BOS, *own[:at]]], device=model.device)
    log_p_V = model.output.log_probs(model.decode(memory, prefix)[0, -1])
    return abs(float(log_p_V[one] - log_p_V[two])) < _TIE
