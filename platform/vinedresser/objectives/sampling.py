"""Scheduled sampling: feeding the decoder its own predictions (methods.md 6-11).

A coin a token: each of the decoder's inputs after BOS is the gold token with probability epsilon,
else what the model itself says there: its argmax, or a draw from its softmax. No gradient goes
through that choice; the states and the loss are those of teacher forcing on the mixed inputs.

A recurrent decoder is fed step by step: its prediction at step t follows the mixed prefix, which
holds own predictions already (Bengio et al. 2015). Others take two passes over all positions, the
first one teacher-forced: their predictions follow the gold prefix (Mihaylova and Martins 2019), so
that at epsilon = 0 the second pass reads one-step predictions and never what the model decodes.
With `exact` every decoder is fed step by step, from its caches.

The estimator is not proper (Huszar 2015): report teacher-forced nats beside the inferred metric,
as every evaluation here does. Evaluation itself never samples.
"""

import math

import torch
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.config import Feedback, ScheduledSampling
from vinedresser.model import Memory, Seq2Seq


def gold_share(config: ScheduledSampling, step: int) -> float:
    """Share epsilon of gold tokens among the decoder's inputs, in [1 - probability, 1].

    linear: 1 - probability * i / decay_steps (methods.md 8); exponential: exp(-i / decay_steps),
    which is k**i with k = exp(-1 / decay_steps) (9); inverse_sigmoid: k / (k + exp(i / k)) with
    k = decay_steps (10); none of them below 1 - probability.

    Args:
        config: probability, decay and decay_steps.
        step: optimizer updates done so far, 0-based.
    """
    k, floor = config.decay_steps, 1 - config.probability
    if config.probability == 0:
        return 1.0
    if config.decay == "constant":
        return floor
    if config.decay == "linear":
        share = 1 - config.probability * step / k
    elif config.decay == "exponential":
        share = math.exp(-step / k)
    else:
        # k / (k + exp(i / k)) over k. exp overflows at 709; past 700 the share is below 1e-300.
        share = 1 / (1 + math.exp(min(step / k - math.log(k), 700)))
    return max(floor, share)


@torch.no_grad()
def mixed_inputs(
    model: Seq2Seq,
    memory: Memory,
    batch: Batch,
    *,
    epsilon: float,
    feedback: Feedback = "argmax",
    exact: bool = False,
) -> Tensor:
    """Decoder inputs (B, T) where each gold token after BOS is kept with probability epsilon.

    epsilon = 1 is teacher forcing, epsilon = 0 feeds no gold token after BOS. Coins and draws are
    a function of torch's seed. On padding, inputs stay what they are. An EOS that the model says
    before the target's end is fed as any other token: the target goes on, and so does its loss.

    Cost: a pass of the decoder without gradient, and the output layer for the share of tokens that
    are fed back. CPU time of a step over that of teacher forcing (one core, 4,096 tokens of 11 to
    18 a sentence, vocabulary 8,000, medians of alternating steps, fp32 / bf16; p = 1 - epsilon):

                             p = .25        p = 1, argmax   p = 1, sample
        rnn                  1.16 / 1.15    1.29 / 1.27     1.33 / 1.32
        rnn-small            1.16 / 1.24    1.28 / 1.34     1.28 / 1.38
        transformer-small    1.20 / 1.21    1.27 / 1.28     1.30 / 1.34
        conv-small           1.18 / 1.16    1.24 / 1.23     1.23 / 1.27

    With `exact`, transformer-small took 1.37 at p = 1, argmax, fp32, where two passes took 1.26
    (3,840 tokens, 15 per sentence); the cost of steps grows with the length of the targets.

    Args:
        model: in the mode that it trains in: dropout applies here too, with masks of its own.
        memory: the batch's encoded source.
        batch: supplies gold inputs and padding.
        epsilon: share of gold tokens, in [0, 1].
        feedback: the model's most probable token, or one drawn from its probabilities.
        exact: step by step on any model, so that predictions follow the mixed prefix.
    """
    inputs_BT = batch.inputs_BT
    # On the CPU: the same coins whatever the device.
    is_own_BT = (torch.rand(inputs_BT.shape) >= epsilon).to(inputs_BT.device)
    is_own_BT[:, 0] = False
    is_own_BT &= batch.is_real_BT
    feed = _feed_steps if exact or model.is_recurrent else _feed_twice
    return feed(model, memory, batch, is_own_BT, feedback)


def _feed_twice(
    model: Seq2Seq, memory: Memory, batch: Batch, is_own_BT: Tensor, feedback: Feedback
) -> Tensor:
    """Own tokens from a first, teacher-forced pass over all positions."""
    inputs_BT = batch.inputs_BT
    states_BTD = model.decode(memory, inputs_BT, batch.is_real_BT)
    # What stands at t was said at t - 1. Column 0 has no own token, so none wraps around.
    states_ND = states_BTD[torch.roll(is_own_BT, -1, dims=1)]
    inputs_BT[is_own_BT] = _said(model, states_ND, feedback)
    return inputs_BT


def _feed_steps(
    model: Seq2Seq, memory: Memory, batch: Batch, is_own_BT: Tensor, feedback: Feedback
) -> Tensor:
    """Own tokens step by step, up to the last one; only rows that take theirs are projected."""
    inputs_BT = batch.inputs_BT
    # The only wait for the device: how many rows take their own token at each step.
    counts = is_own_BT.sum(0).tolist()
    rows_of = torch.split(is_own_BT.t().nonzero()[:, 1], counts)
    last = max((t for t, count in enumerate(counts) if count), default=0)
    state = model.start(memory, last)
    for t in range(last):
        states_BD, state = model.step(state, inputs_BT[:, t])
        if counts[t + 1]:
            rows = rows_of[t + 1]
            inputs_BT[rows, t + 1] = _said(model, states_BD[rows], feedback)
    return inputs_BT


def _said(model: Seq2Seq, states_ND: Tensor, feedback: Feedback) -> Tensor:
    """(N, D) -> one token id each (N,)."""
    if feedback == "argmax":
        return model.output.best(states_ND, 1)[1][:, 0]
    return model.output.sample(states_ND)
