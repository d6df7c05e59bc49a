"""Parity: the proof that a smaller model computes the same function as the model it came from."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vinedresser.batch import Batch
from vinedresser.decode import greedy
from vinedresser.errors import TrainingError
from vinedresser.metrics import PARITY_TOLERANCE
from vinedresser.model import Seq2Seq


@dataclass(frozen=True)
class Parity:
    """Certificate that two models are one function.

    Attributes:
        max_abs: largest absolute difference of teacher-forced log-probabilities on real
            positions, of the stored weights computed in fp64. Only this one is bounded: fp32
            arithmetic alone is further from the exact value than the tolerance (2.5e-5 at
            log-probabilities of -40), so that fp32 cannot separate rounding from a wrong weight.
        max_abs_fp32: the same computed in fp32, which also contains the rounding of both models.
        is_same_output: whether greedy outputs in fp32 are identical.
        sentences: number of sentences compared.
        tokens: real target tokens among them.
    """

    max_abs: float
    max_abs_fp32: float
    is_same_output: bool
    sentences: int
    tokens: int

    @property
    def holds(self) -> bool:
        """True if the smaller model may replace the larger one (methods.md 85)."""
        return self.max_abs < PARITY_TOLERANCE and self.is_same_output

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the precision of `max_abs`."""
        return {**asdict(self), "precision": "fp64", "tolerance": PARITY_TOLERANCE}


@torch.no_grad()
def certify(model: Seq2Seq, smaller: Seq2Seq, batches: Iterator[Batch], *, cap: int) -> Parity:
    """Compare two models on real sentences.

    `cap` is the longest greedy output in tokens.

    Raises:
        TrainingError: they are not the same function.
    """
    pair = (model.eval(), smaller.eval())
    wide = (copy.deepcopy(model).double(), copy.deepcopy(smaller).double())
    largest, largest_fp32 = torch.zeros((), dtype=torch.float64), torch.zeros(())
    is_same, sentences, tokens = True, 0, 0
    for batch in batches:
        # torch.maximum keeps a NaN, Python's max may drop it.
        frames = batch.source_BS
        exact = replace(batch, source_BS=frames.double()) if frames.is_floating_point() else batch
        largest = torch.maximum(largest, _difference(*wide, exact))
        largest_fp32 = torch.maximum(largest_fp32, _difference(*pair, batch))
        first, second = (
            greedy(one, batch.source_BS, batch.source_lengths_B, cap=cap).ids for one in pair
        )
        is_same = is_same and first == second
        sentences, tokens = sentences + len(batch.rows_B), tokens + int(batch.tokens)
    if not sentences:
        raise TrainingError(
            "no sentences to compare the compacted model on; name a split with some"
        )
    parity = Parity(float(largest), float(largest_fp32), is_same, sentences, tokens)
    if not parity.holds:
        raise TrainingError(
            f"the compacted model is not the trained one: in fp64 log-probabilities differ by "
            f"{parity.max_abs:.2e} (expected below {PARITY_TOLERANCE:g}), greedy outputs "
            f"{'agree' if is_same else 'differ'}; report this with both models"
        )
    return parity


def _difference(model: Seq2Seq, smaller: Seq2Seq, batch: Batch) -> Tensor:
    """Return the largest difference of log-probabilities on real positions, on the CPU."""
    ours, theirs = (one.output.log_probs(one(batch)[batch.is_real_BT]) for one in (model, smaller))
    return (ours - theirs).abs().max().cpu()
