"""Does a model listen to its source, or has it only learned the target language?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.model import Seq2Seq


@dataclass(frozen=True)
class Conditioning:
    """What sources of other sentences cost (methods.md 2).

    Attributes:
        gap: NLL(shuffled sources) - NLL(true sources), nats per real target token; 0 for a model
            that does not look at its source, above 1 for one that has learned a task.
        error: standard error of `gap` over sentences.
        true_nats: NLL(true sources), nats per token.
        sentences: how many had their source exchanged.
    """

    gap: float
    error: float
    true_nats: float
    sentences: int

    @property
    def deviations(self) -> float:
        """Standard errors between the gap and 0; 0 where the gap is exactly 0."""
        if self.gap == 0:
            return 0.0
        return self.gap / self.error if self.error else math.copysign(math.inf, self.gap)


@torch.no_grad()
def conditioning_gap(model: Seq2Seq, batches: Iterable[Batch]) -> Conditioning:
    """NLL with the sources of other sentences minus NLL with the own ones, in fp32, no dropout.

    Each sentence of a batch is given the source that stands half a batch away, so that nobody
    keeps his own. In batches of `in_order`, which are sorted by length, that is one of about the
    same length: the gap measures what sources say, not how long they are. Leaves the model in the
    mode it was in.

    Args:
        model: on any device.
        batches: on the CPU; those of one sentence are left out.

    Raises:
        ValueError: fewer than 2 sentences in all.
    """
    was_training = model.training
    model.eval()
    gaps, true, counts = [], [], []
    try:
        for host_batch in batches:
            if len(host_batch.rows_B) < 2:
                continue
            batch = host_batch.to(model.device)
            own_B, other_B = (sentence_nats(model, b) for b in (batch, with_other_sources(batch)))
            gaps.append((other_B - own_B).double().cpu())
            true.append(own_B.double().cpu())
            counts.append(host_batch.target_lengths_B.double())
    finally:
        model.train(was_training)
    if not gaps:
        raise ValueError("batches of 2 sentences or more are wanted, there is none")
    gap_N, true_N, count_N = (torch.cat(parts) for parts in (gaps, true, counts))
    n, tokens = len(gap_N), count_N.sum()
    gap = gap_N.sum() / tokens
    # Of a ratio of sums over sentences, which are drawn independently (Cochran 1977, 2.11).
    error = ((gap_N - gap * count_N) ** 2).sum().mul(n / (n - 1)).sqrt() / tokens
    return Conditioning(float(gap), float(error), float(true_N.sum() / tokens), n)


def with_other_sources(batch: Batch) -> Batch:
    """The batch with each source half a batch away from where it was: a derangement, B >= 2."""
    shift = len(batch.rows_B) // 2
    return Batch(
        batch.source_BS.roll(shift, 0),
        batch.source_lengths_B.roll(shift),
        batch.target_BT,
        batch.target_lengths_B,
        batch.rows_B,
    )


def sentence_nats(model: Seq2Seq, batch: Batch) -> Tensor:
    """(B,) teacher-forced NLL of each target, EOS included, in nats."""
    is_real_BT = batch.is_real_BT
    log_p_NV = model.output.log_probs(model(batch)[is_real_BT])
    nats_N = F.nll_loss(log_p_NV, batch.target_BT[is_real_BT], reduction="none")
    sentence_N = is_real_BT.nonzero()[:, 0]
    return nats_N.new_zeros(len(batch.rows_B)).index_add(0, sentence_N, nats_N)
