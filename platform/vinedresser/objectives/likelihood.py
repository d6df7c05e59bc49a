"""Conditional maximum likelihood with label smoothing and scheduled sampling.

Methods.md 1 and 78; scheduled sampling is 6 to 11: the decoder is fed its own predictions. For
each token there is a coin: an input after BOS is the target's token with a probability of the
teacher-forcing ratio, else the model's prediction there: its argmax, or a draw from its softmax. No
gradient goes through that choice; the states and the loss are those of teacher forcing on the mixed
inputs.

A recurrent decoder is fed step by step: its prediction at step t follows the mixed prefix, which
holds own predictions already (Bengio et al. 2015). Others take two passes over all positions, the
first one teacher-forced: their predictions follow the target's prefix (Mihaylova and Martins 2019),
so that at a ratio of 0 the second pass reads one-step predictions and never what the model decodes.
With `exact` every decoder is fed step by step, from its caches.

The estimator is not proper (Huszar 2015): report the teacher-forced loss with the inferred
metric, as every evaluation here does. Evaluation itself never samples.
"""

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.config import ModelConfig, Section, TermConfig
from vinedresser.config.experiment import Probability
from vinedresser.model import Memory, Seq2Seq
from vinedresser.objective import Part, Pass, Term, target_nll

Feedback = Literal["argmax", "sample"]


class ScheduledSampling(Section):
    """Feeding the model its own predictions (methods.md 6-11; Bengio et al. 2015).

    `probability` is p, the share of target inputs taken from the model itself, 0.1 to 0.4 as a
    rule; papers give the teacher-forcing ratio, epsilon = 1 - p, which is no setting here. Whatever
    the decay, p never exceeds `probability`.
    """

    probability: Probability = 0.0
    # The model's most probable token, or one drawn from its probabilities.
    feedback: Feedback = "argmax"
    # Predict each token after the mixed prefix, step by step, on models that are not recurrent too;
    # recurrent ones always do. False: two passes over all positions, predictions follow the
    # target's prefix. The default is the cheaper one (costs: `mixed_inputs`).
    exact: bool = False
    # How the ratio falls from 1: at once, linearly, k**i, or k / (k + exp(i / k)).
    decay: Literal["constant", "linear", "exponential", "inverse_sigmoid"] = "linear"
    # linear: updates until `probability` is reached; exponential: updates until the ratio is 1/e;
    # inverse_sigmoid: k itself, at least 1; the ratio is k / (k + 1) at first and 0.5 at k * ln(k).
    decay_steps: PositiveFloat = 500.0

    @model_validator(mode="after")
    def _starts_with_targets(self) -> Self:
        if self.decay == "inverse_sigmoid" and self.decay_steps < 1:
            raise ValueError(
                f"decay inverse_sigmoid with decay_steps {self.decay_steps:g} starts below one "
                "half of gold tokens; Fix: decay_steps of 1 or more"
            )
        return self


class LikelihoodConfig(TermConfig):
    """Cross-entropy of the targets, in nats per real target token."""

    # Share of the target mass spread evenly over the vocabulary.
    label_smoothing: Probability = 0.0
    sampling: ScheduledSampling = ScheduledSampling()

    def build(self, model: Seq2Seq) -> "Likelihood":  # noqa: ARG002 - part of the interface
        """Return the likelihood, which has no parameters."""
        return Likelihood(self)

    def check(self, model: ModelConfig) -> None:
        """See TermConfig."""
        norm_kind = getattr(model, "norm_kind", "layer")
        if self.sampling.exact and norm_kind != "layer":
            raise ValueError(
                "sampling.exact feeds one position at a time, model.norm_kind "
                f"{norm_kind} takes statistics over all of them; set one of: sampling.exact=false, "
                "norm_kind=layer"
            )


class Likelihood(Term):
    """Negative log-likelihood of the targets, on mixed inputs under scheduled sampling."""

    is_nll = True

    def __init__(self, config: LikelihoodConfig) -> None:
        super().__init__()
        self._config = config

    def forward(self, found: Pass) -> Part:
        """See Term."""
        model, batch, sampling = found.model, found.batch, self._config.sampling
        ratio = teacher_forcing_ratio(sampling, found.step - 1) if self.training else 1.0
        if ratio == 1:
            states_BTD = found.states_BTD
        else:
            inputs_BT = mixed_inputs(
                model,
                found.memory,
                batch,
                teacher_forcing_ratio=ratio,
                feedback=sampling.feedback,
                exact=sampling.exact,
            )
            states_BTD = model.decode(found.memory, inputs_BT, batch.is_real_BT)
        return target_nll(model, states_BTD, batch, label_smoothing=self._config.label_smoothing)

    def metrics(self, step: int) -> Mapping[str, float]:
        """Return the teacher-forcing ratio."""
        ratio = teacher_forcing_ratio(self._config.sampling, step - 1)
        return {"teacher_forcing_ratio": ratio}


def teacher_forcing_ratio(config: ScheduledSampling, step: int) -> float:
    """Return the share of target tokens among the decoder's inputs, in [1 - probability, 1].

    linear: 1 - probability * i / decay_steps (methods.md 8); exponential: exp(-i / decay_steps),
    which is k**i with k = exp(-1 / decay_steps) (9); inverse_sigmoid: k / (k + exp(i / k)) with k =
    decay_steps (10); none of them below 1 - probability. `step` counts the optimizer updates done
    so far, 0-based.
    """
    k, floor = config.decay_steps, 1 - config.probability
    if config.probability == 0:
        return 1.0
    if config.decay == "constant":
        return floor
    if config.decay == "linear":
        ratio = 1 - config.probability * step / k
    elif config.decay == "exponential":
        ratio = math.exp(-step / k)
    else:
        # k / (k + exp(i / k)) over k. exp overflows at 709; past 700 the ratio is below 1e-300.
        ratio = 1 / (1 + math.exp(min(step / k - math.log(k), 700)))
    return max(floor, ratio)


@torch.no_grad()
def mixed_inputs(
    model: Seq2Seq,
    memory: Memory,
    batch: Batch,
    *,
    teacher_forcing_ratio: float,
    feedback: Feedback = "argmax",
    exact: bool = False,
) -> Tensor:
    """Return decoder inputs (B, T) where the ratio is each target token's chance to be kept.

    A ratio of 1 is teacher forcing; 0 feeds no target token after BOS. Coins and draws are a
    function of torch's seed. On padding, inputs stay as they are. An EOS that the model predicts
    before the target's end is fed as any other token: the target continues, and so does its loss.

    Cost: a pass of the decoder without gradient, and the output layer for the share of tokens that
    are fed back. CPU time of a step over that of teacher forcing (one core, 4,096 tokens of 11 to
    18 per sentence, vocabulary 8,000, medians of alternating steps, fp32 / bf16; p = 1 - ratio):

                             p = .25        p = 1, argmax   p = 1, sample
        rnn                  1.16 / 1.15    1.29 / 1.27     1.33 / 1.32
        rnn-small            1.16 / 1.24    1.28 / 1.34     1.28 / 1.38
        transformer-small    1.20 / 1.21    1.27 / 1.28     1.30 / 1.34
        conv-small           1.18 / 1.16    1.24 / 1.23     1.23 / 1.27

    With `exact`, transformer-small took 1.37 at p = 1, argmax, fp32, where two passes took 1.26
    (3,840 tokens, 15 per sentence); the cost of steps grows with the length of the targets. Dropout
    applies in the mode of the model, with separate masks. Feedback is the model's most probable
    token, or one drawn from its probabilities.
    """

    def predicted(states_ND: Tensor) -> Tensor:
        """(N, D) -> one token id each (N,)."""
        if feedback == "argmax":
            return model.output.best(states_ND, 1)[1][:, 0]
        return model.output.sample(states_ND)

    inputs_BT = batch.inputs_BT
    # On the CPU: the same coins whatever the device.
    is_own_BT = (torch.rand(inputs_BT.shape) >= teacher_forcing_ratio).to(inputs_BT.device)
    is_own_BT[:, 0] = False
    is_own_BT &= batch.is_real_BT
    if not (exact or model.is_recurrent):
        # Two passes: own tokens from a first, teacher-forced pass over all positions. The token at
        # t was predicted at t - 1. Column 0 has no own token, so none wraps around.
        states_BTD = model.decode(memory, inputs_BT, batch.is_real_BT)
        inputs_BT[is_own_BT] = predicted(states_BTD[torch.roll(is_own_BT, -1, dims=1)])
        return inputs_BT
    # Step by step, up to the last own token; only rows that take theirs are projected. The only
    # wait for the device: how many rows take their own token at each step.
    counts = is_own_BT.sum(0).tolist()
    rows_of = torch.split(is_own_BT.t().nonzero()[:, 1], counts)
    last = max((t for t, count in enumerate(counts) if count), default=0)
    state = model.start(memory, last)
    for t in range(last):
        states_BD, state = model.step(state, inputs_BT[:, t])
        if counts[t + 1]:
            rows = rows_of[t + 1]
            inputs_BT[rows, t + 1] = predicted(states_BD[rows])
    return inputs_BT
