"""Checks that a model can learn: first loss, gradients, one small batch, and real data."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vinedresser.batch import Batch
from vinedresser.config import Experiment
from vinedresser.decode import greedy
from vinedresser.evaluate import Conditioning, conditioning_gap
from vinedresser.health.preflight.check import CheckResult
from vinedresser.health.preflight.sentences import Sentence, collated
from vinedresser.health.readings import first_losses
from vinedresser.health.rules import (
    MAX_FIRST_EXCESS,
    MIN_CONDITIONING_GAP,
    MIN_FIRST_EXCESS,
    is_uniform_guess,
)
from vinedresser.model import Seq2Seq
from vinedresser.objective import Objective, target_nll
from vinedresser.training.device import Device, seed_step
from vinedresser.training.optimizer import build_optimizer
from vinedresser.training.step import training_steps

# The loss in training and the one of log_probs() are the same sum in another order: 1e-6 of it.
MAX_LOSS_DRIFT = 1e-3
# Nats per token at which a batch counts as overfitted (methods.md 99), and updates for it.
LEARNED, OVERFIT_UPDATES = 0.01, 600
# Standard errors of the conditioning gap: a model without its source passes by chance with
# p = 3e-5 per look.
MIN_DEVIATIONS = 4.0
# From this many on, a failure is not certain: a Transformer on spoken digits had 0.005 +- 0.002
# nats after 200 updates, 0.06 after 300 and 0.7 after 600.
_SOME_DEVIATIONS = 2.0
# Updates after which the gap is measured. CMUdict, Multi30k and spoken digits pass after 50.
LOOKS = (25, 50, 100, 150, 200)
# Fewer updates than that decide nothing; time limit in seconds.
_MIN_UPDATES, _MAX_SECONDS = 100, 120.0


@torch.no_grad()
def check_first_loss(
    model: Seq2Seq, batch: Batch, *, vocabulary: int, is_fresh: bool
) -> CheckResult:
    """Check the loss before the first update against that of a uniform guess (methods.md 105).

    The model is in training mode, without dropout. A warm start, which is not fresh, must be better
    than guessing.
    """
    batch = batch.to(model.device)
    loss, other = first_losses(model, batch)
    guess = math.log(vocabulary)
    figures = {"first_loss": loss, "without_repeats": other, "ln_vocabulary": guess}
    found, written = f"{loss:.2f} nats/token", f"ln {vocabulary:,} = {guess:.2f}"
    if not is_fresh:
        pointer = (
            "the warm start predicts worse than a uniform guess: its weights do not belong to this "
            "data or model; look at `init`"
        )
        passed = loss < guess
        return CheckResult(
            "first loss", passed, found, f"below {written}", "" if passed else pointer, figures
        )
    states_BTD, is_real_BT = model(batch), batch.is_real_BT
    trained = float(target_nll(model, states_BTD, batch).mean)
    log_p_NV = model.output.log_probs(states_BTD[is_real_BT])
    decoded = float(F.nll_loss(log_p_NV, batch.target_BT[is_real_BT]))
    if abs(trained - decoded) > MAX_LOSS_DRIFT * max(1.0, decoded):
        return CheckResult(
            "first loss", False, f"{trained:.2f} nats/token in training, {decoded:.2f} by "
            "log_probs()",
            "the same",
            "training and decoding use different distributions: nll() and log_probs() of "
            "model.output disagree", figures,
        )  # fmt: skip
    passed, pointer = is_uniform_guess([loss, other], guess), ""
    if passed and not is_uniform_guess([loss], guess):
        found += f", {other:.2f} without repeats"
    if not passed:
        pointer = (
            "a fresh model predicts better than a uniform guess: the loss leaves tokens out, or "
            "the decoder sees the token that it predicts"
            if loss < guess
            else "the fresh model prefers wrong tokens: its logits are too large; look at the "
            "initial scale of the embeddings, of the output layer and of its bias"
        )
    wanted = f"{written} {MIN_FIRST_EXCESS:+g} to {MAX_FIRST_EXCESS:+g}"
    return CheckResult("first loss", passed, found, wanted, pointer, figures)


def check_gradients(model: Seq2Seq, batch: Batch) -> CheckResult:
    """Check that every trained tensor gets a gradient."""
    batch = batch.to(model.device)
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(target_nll(model, model(batch), batch).mean)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()]
    idle = [n for n, p in named if p.grad is None or not bool(p.grad.any())]
    wild = [n for n, p in named if p.grad is not None and not bool(p.grad.isfinite().all())]
    model.zero_grad(set_to_none=True)
    # A norm before a layer without heads is idle and harmless: one tensor in ten may be.
    passed = not wild and 10 * len(idle) < len(named)
    found = f"{len(named) - len(idle):,} of {len(named):,} tensors"
    pointer = ""
    if wild:
        pointer = f"a gradient is not finite: {', '.join(wild[:3])}; look at that layer's code"
    elif idle:
        pointer = (
            f"no gradient for {', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''}: "
            + ("idle, harmless if intended" if passed else "the graph from the loss is cut, as by "
               "detach() or no_grad(); these weights never learn")
        )  # fmt: skip
    figures = {"idle_tensors": float(len(idle)), "tensors": float(len(named))}
    return CheckResult(
        "gradients reach", passed, found, "9 of 10 or more, finite", pointer, figures
    )


def check_overfitting(
    model: Seq2Seq, sentences: Sequence[Sentence], device: Device, *, cap: int
) -> CheckResult:
    """Overfit a few sentences and decode them (methods.md 99).

    Adam at 0.3 / width, at most 3e-3, 10 updates of warm-up, gradients clipped at 1, no dropout:
    every form of the zoo needs 30 to 260 updates. The model is fresh, in training mode, without
    dropout, and trained further; the sentences have distinct sources.
    """
    batch = collated(sentences).to(device.primary)
    loss, right, updates = math.inf, 0, 0
    for updates in _overfitting(model, batch, device):  # noqa: B007 - its last value is reported
        model.eval()
        with torch.no_grad():
            loss = float(target_nll(model, model(batch), batch).mean)
        outputs = greedy(model, batch.source_BS, batch.source_lengths_B, cap=cap).ids
        model.train()
        wanted = [s.target_T.tolist()[:-1] for s in sentences]
        right = sum(a == b for a, b in zip(outputs, wanted, strict=True))
        if not math.isfinite(loss) or (loss < LEARNED and right == len(sentences)):
            break
    passed = loss < LEARNED and right == len(sentences)
    pointer = ""
    if not math.isfinite(loss):
        pointer = "the loss is not finite even at a small rate: look for a division or a log of 0"
    elif not passed and loss < LEARNED:
        pointer = (
            f"the loss is low but {len(sentences) - right} outputs are wrong: decoding step by "
            "step differs from the teacher-forced pass; look at start(), step() and positions"
        )
    elif not passed:
        pointer = (
            "the model cannot even overfit a few sentences: look at masks, at the shift of the "
            "decoder's inputs, and whether the decoder sees the source; then at its size"
        )
    return CheckResult(
        "overfit one batch", passed,
        f"{loss:.3g} nats/token, {right} of {len(sentences)} decoded, {updates} updates",
        f"< {LEARNED:g}, all, ≤ {OVERFIT_UPDATES}", pointer,
        {"loss": loss, "decoded": float(right), "updates": float(updates)},
    )  # fmt: skip


def _overfitting(model: Seq2Seq, batch: Batch, device: Device) -> Iterator[int]:
    """Yield the number of updates each time the loss may be low enough, and at the end."""
    width = model(batch).shape[-1]
    rate = min(3e-3, 0.3 / width)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses: list[Tensor] = []
    for update in range(1, OVERFIT_UPDATES + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, update / 10)
        seed_step(0, update, 0)
        with device.autocast():
            loss = target_nll(model, model(batch), batch).mean
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        # Rarely: reading the loss waits for the device.
        if update == OVERFIT_UPDATES or (update % 10 == 0 and float(losses[-1]) < LEARNED):
            yield update


def check_conditioning(
    objective: Objective,
    batches: Iterator[Batch],
    dev: Sequence[Batch],
    experiment: Experiment,
    device: Device,
    *,
    vocabulary: int,
) -> CheckResult:
    """Train briefly on real data, then measure the conditioning gap (methods.md 2).

    Held-out sentences get each other's sources of about the same length. Training ends as soon as
    the gap is significant. The objective is trained further; steps and warm-up are as `short` makes
    them.
    """
    if not any(len(batch.rows_B) > 1 for batch in dev):
        return CheckResult(
            "conditioning", None, "dev has no two sentences for a batch", "2 or more",
            "give dev more sentences, or raise decoding.max_padded_tokens",
        )  # fmt: skip
    model, optimizer = objective.model, build_optimizer(objective, experiment.optim)
    steps = training_steps(objective, batches, optimizer, experiment, device=device)
    since, loss, result = time.perf_counter(), 0.0, None
    updates, is_late = 0, False
    for updates in itertools.count():
        is_late = time.perf_counter() - since > _MAX_SECONDS
        if updates in LOOKS or is_late:
            result = conditioning_gap(model, dev)
            if is_late or updates == LOOKS[-1] or _is_significant(result):
                break
        step = next(steps)
        loss = float(step.nll / step.tokens)
        if not math.isfinite(loss):
            break
    # Worse than a uniform guess after all that: not learning.
    is_worse = result is None or result.true_loss > math.log(vocabulary) + MAX_FIRST_EXCESS
    if result is None or not math.isfinite(loss) or is_worse:
        return CheckResult(
            "conditioning", False, f"loss {loss:.3g} after {updates} updates",
            f"below ln {vocabulary:,} = {math.log(vocabulary):.2f}",
            "training diverges: lower optim.lr or optim.clip_norm, lengthen optim.warmup_steps",
            {"updates": float(updates)},
        )  # fmt: skip
    return conditioning_result(result, updates)


def _is_significant(result: Conditioning) -> bool:
    return result.gap >= MIN_CONDITIONING_GAP and result.deviations >= MIN_DEVIATIONS


def conditioning_result(result: Conditioning, updates: int) -> CheckResult:
    """Return the verdict on a gap after some updates: passed, failed, or undecided."""
    passed: bool | None = _is_significant(result)
    pointer = ""
    if not passed and updates < _MIN_UPDATES:
        passed = None
        pointer = (
            f"{updates} updates in {_MAX_SECONDS:.0f} s are too few to decide; run it on the "
            "machine of the training, or with a smaller batch.max_padded_tokens"
        )
    elif not passed and result.deviations >= _SOME_DEVIATIONS:
        passed = None
        pointer = (
            "the gap is small so far: the model may only start to use its source later. Train "
            "longer and watch dev/conditioning_gap; the rule source_ignored fires if it stays low"
        )
    elif not passed:
        pointer = (
            "shuffled sources cost nothing: source and target rows do not belong "
            "together (lines shifted or sorted on one side, wrongly encoded: `vinedresser "
            "describe` on the shards), or the decoder does not see its encoder"
        )
    return CheckResult(
        "conditioning", passed,
        f"{result.gap:+.3f} ± {result.error:.3f} nats/token, {updates} updates",
        f"> {MIN_CONDITIONING_GAP:g}, {MIN_DEVIATIONS:g} errors", pointer,
        {"gap": result.gap, "error": result.error, "true_loss": result.true_loss,
         "updates": float(updates)},
    )  # fmt: skip


def short(experiment: Experiment, *, tokens: int) -> Experiment:
    """Return the experiment for a short training: one worker, smaller batches, short warm-up."""
    update = {
        "warmup_steps": min(experiment.optim.warmup_steps, 20),
        "anneal": 0.0,
        "decay": "constant",
    }
    short = alone(experiment, steps=LOOKS[-1], max_padded_tokens=tokens)
    return short.model_copy(update={"optim": experiment.optim.model_copy(update=update)})


def alone(experiment: Experiment, *, steps: int, **batch: int) -> Experiment:
    """Return the experiment for one worker and some updates of one batch each, unless given."""
    update = {
        "steps": steps,
        "batch": experiment.batch.model_copy(update={"per_update": 0, **batch}),
        "compute": experiment.compute.model_copy(update={"workers": 1}),
    }
    return experiment.model_copy(update=update)
