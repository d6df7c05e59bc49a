"""Scheduled sampling: feeding the decoder its own predictions (methods.md 6-11).

Bengio et al. 2015; for models that are trained on whole sequences in two passes, Mihaylova and
Martins 2019. The estimator is not proper (Huszar 2015): report teacher-forced nats beside the
inferred metric, as every evaluation here does.
"""

import math

import torch
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.config import ScheduledSampling
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
        # exp overflows at 709; past 700 the share is below 1e-300 for any k.
        share = k / (k + math.exp(min(step / k, 700)))
    return max(floor, share)


@torch.no_grad()
def mixed_inputs(model: Seq2Seq, memory: Memory, batch: Batch, *, epsilon: float) -> Tensor:
    """Decoder inputs (B, T) where each gold token after BOS is kept with probability epsilon.

    The rest are the model's own argmax from a first teacher-forced pass. epsilon = 1 is teacher
    forcing, epsilon = 0 feeds no gold token after BOS. The first pass reuses the encoded source
    and has no backward pass.
    """
    inputs_BT = batch.inputs_BT
    predicted_BT = model.logits(model.decode(memory, inputs_BT)).argmax(-1)
    own_BT = torch.roll(predicted_BT, 1, dims=1)
    is_gold_BT = torch.rand(inputs_BT.shape, device=inputs_BT.device) < epsilon
    is_gold_BT[:, 0] = True
    return torch.where(is_gold_BT, inputs_BT, own_BT)
