import math

import pytest
import torch
from torch import Tensor

from tests.batches import pad_ids
from vinedresser.batch import Batch
from vinedresser.model import Seq2Seq
from vinedresser.nn.output import FullOutput
from vinedresser.objective import target_nll
from vinedresser.special_ids import BOS, EOS, PAD

V = 7
TARGETS = [[4, 5, 6, EOS], [EOS], [6, 6, EOS]]


class Identity(FullOutput):
    """Its states are its scores."""

    def __init__(self) -> None:
        super().__init__(V, V)
        self.weight.data, self.bias.data = torch.eye(V), torch.zeros(V)
        self.requires_grad_(False)


class Plain(Seq2Seq):
    """A model of which only the output layer is used."""

    def __init__(self) -> None:
        super().__init__()
        self.output = Identity()


def batch_of(targets: list[list[int]]) -> Batch:
    padded = pad_ids(targets)
    return Batch(*padded, *padded, torch.arange(len(targets)))


@pytest.fixture
def batch() -> Batch:
    return batch_of(TARGETS)


@pytest.fixture
def scores_BTV() -> Tensor:
    return torch.randn(3, 4, V, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_uniform_logits_cost_ln_v_a_token(batch, smoothing):
    loss = target_nll(Plain(), torch.full((3, 4, V), 3.0), batch, label_smoothing=smoothing)
    assert int(loss.tokens) == 8
    assert float(loss.mean) == pytest.approx(math.log(V), rel=1e-6)


def test_the_sum_of_log_probabilities_by_hand(batch, scores_BTV):
    log_p = scores_BTV.log_softmax(-1)
    wanted = -sum(log_p[b, t, v] for b, row in enumerate(TARGETS) for t, v in enumerate(row))
    assert float(target_nll(Plain(), scores_BTV, batch).total) == pytest.approx(float(wanted))


def test_padding_adds_nothing(batch, scores_BTV):
    clean = target_nll(Plain(), scores_BTV, batch, label_smoothing=0.1)
    dirty = scores_BTV.clone()
    dirty[batch.target_BT == PAD] = math.nan
    found = target_nll(Plain(), dirty.requires_grad_(), batch, label_smoothing=0.1)
    assert torch.equal(found.total, clean.total)
    found.total.backward()
    assert (dirty.grad[batch.target_BT == PAD] == 0).all()


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_a_perfect_model_costs_the_entropy_of_the_smoothed_target(batch, smoothing):
    """methods.md 78."""
    gold, rest = 1 - smoothing + smoothing / V, smoothing / V
    target_BTV = torch.full((3, 4, V), rest).scatter(2, batch.target_BT[..., None], gold)
    loss = target_nll(Plain(), target_BTV.log(), batch, label_smoothing=smoothing)
    entropy = -gold * math.log(gold) - (V - 1) * rest * math.log(rest)
    assert float(loss.mean) == pytest.approx(entropy, rel=1e-5)
    sure = target_nll(Plain(), 30 * target_BTV, batch, label_smoothing=smoothing)
    assert float(sure.mean) > entropy


def test_sums_add_over_parts_and_means_do_not(batch, scores_BTV):
    whole = target_nll(Plain(), scores_BTV, batch)
    parts = [
        target_nll(Plain(), scores_BTV[i : i + 1, : len(row)], batch_of([row]))
        for i, row in enumerate(TARGETS)
    ]
    assert float(sum(p.total for p in parts)) == pytest.approx(float(whole.total), rel=1e-6)
    assert sum(int(p.tokens) for p in parts) == int(whole.tokens)
    assert float(sum(p.mean for p in parts)) / 3 != pytest.approx(float(whole.mean), rel=1e-3)


def test_large_scores_stay_finite_and_bf16_is_summed_in_fp32(batch):
    loss = target_nll(Plain(), 1e4 * torch.eye(V)[torch.arange(4) + 1].expand(3, 4, V), batch)
    assert loss.total.isfinite()
    half = target_nll(Plain(), torch.zeros(3, 4, V, dtype=torch.bfloat16), batch)
    assert float(half.mean) == pytest.approx(math.log(V), rel=1e-6)


def test_teacher_forcing_feeds_the_target_one_later(batch):
    wanted = [[BOS, 4, 5, 6], [BOS], [BOS, 6, 6]]
    for inputs, row, length in zip(batch.inputs_BT, wanted, batch.target_lengths_B, strict=True):
        assert inputs[: int(length)].tolist() == row
    assert int(batch.tokens) == int(batch.is_real_BT.sum()) == 8
