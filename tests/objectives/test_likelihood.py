import math
import random

import pytest
import torch
from torch import Tensor, nn

from vinedresser.batch import BOS, EOS, PAD, Batch, pad_ids
from vinedresser.model import Memory, Seq2Seq
from vinedresser.objectives import likelihood

V = 7
TARGETS = [[4, 5, 6, EOS], [EOS], [6, 6, EOS]]


class Plain(Seq2Seq):
    """Its states are its logits."""

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        return states


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
    loss = likelihood(Plain(), torch.full((3, 4, V), 3.0), batch, label_smoothing=smoothing)
    assert int(loss.tokens) == 8
    assert float(loss.mean) == pytest.approx(math.log(V), rel=1e-6)


def test_the_sum_of_log_probabilities_by_hand(batch, scores_BTV):
    log_p = scores_BTV.log_softmax(-1)
    wanted = -sum(log_p[b, t, v] for b, row in enumerate(TARGETS) for t, v in enumerate(row))
    assert float(likelihood(Plain(), scores_BTV, batch).total) == pytest.approx(float(wanted))


def test_padding_adds_nothing(batch, scores_BTV):
    clean = likelihood(Plain(), scores_BTV, batch, label_smoothing=0.1)
    dirty = scores_BTV.clone()
    dirty[batch.target_BT == PAD] = math.nan
    found = likelihood(Plain(), dirty.requires_grad_(), batch, label_smoothing=0.1)
    assert torch.equal(found.total, clean.total)
    found.total.backward()
    assert (dirty.grad[batch.target_BT == PAD] == 0).all()


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_a_perfect_model_costs_the_entropy_of_the_smoothed_target(batch, smoothing):
    """methods.md 78."""
    gold, rest = 1 - smoothing + smoothing / V, smoothing / V
    target_BTV = torch.full((3, 4, V), rest).scatter(2, batch.target_BT[..., None], gold)
    loss = likelihood(Plain(), target_BTV.log(), batch, label_smoothing=smoothing)
    entropy = -gold * math.log(gold) - (V - 1) * rest * math.log(rest)
    assert float(loss.mean) == pytest.approx(entropy, rel=1e-5)
    sure = likelihood(Plain(), 30 * target_BTV, batch, label_smoothing=smoothing)
    assert float(sure.mean) > entropy


def test_sums_add_over_parts_and_means_do_not(batch, scores_BTV):
    whole = likelihood(Plain(), scores_BTV, batch)
    parts = [
        likelihood(Plain(), scores_BTV[i : i + 1, : len(row)], batch_of([row]))
        for i, row in enumerate(TARGETS)
    ]
    assert float(sum(p.total for p in parts)) == pytest.approx(float(whole.total), rel=1e-6)
    assert sum(int(p.tokens) for p in parts) == int(whole.tokens)
    assert float(sum(p.mean for p in parts)) / 3 != pytest.approx(float(whole.mean), rel=1e-3)


def test_large_scores_stay_finite_and_bf16_is_summed_in_fp32(batch):
    loss = likelihood(Plain(), 1e4 * torch.eye(V)[torch.arange(4) + 1].expand(3, 4, V), batch)
    assert loss.total.isfinite()
    half = likelihood(Plain(), torch.zeros(3, 4, V, dtype=torch.bfloat16), batch)
    assert float(half.mean) == pytest.approx(math.log(V), rel=1e-6)


def test_teacher_forcing_feeds_the_target_one_later(batch):
    wanted = [[BOS, 4, 5, 6], [BOS], [BOS, 6, 6]]
    for inputs, row, length in zip(batch.inputs_BT, wanted, batch.target_lengths_B, strict=True):
        assert inputs[: int(length)].tolist() == row
    assert int(batch.tokens) == int(batch.is_real_BT.sum()) == 8


WORDS, WIDTH = 5000, 8


class Projected(Plain):
    """Its states go through one linear layer."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.output = nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype)

    def logits(self, states: Tensor) -> Tensor:
        return self.output(states)

    def output_layer(self) -> nn.Linear:
        return self.output


class Kept(Projected):
    """The same, its logits kept: the plain formula."""

    def output_layer(self) -> None:
        return None


@pytest.fixture
def long_batch() -> Batch:
    """137 real tokens: three blocks of rows, the last one not full."""
    draw = random.Random(0)
    return batch_of([[draw.randrange(4, WORDS) for _ in range(n)] for n in (60, 1, 40, 36)])


def gradients(model: Plain, batch: Batch, smoothing: float, *, spread: float = 1.0) -> list[Tensor]:
    """Nats, then gradients of the states and the parameters; the loss is scaled by 1 / tokens."""
    torch.manual_seed(1)
    shape = (*batch.target_BT.shape, WIDTH)
    states_BTD = (spread * torch.randn(shape)).to(next(model.parameters()).dtype).requires_grad_()
    loss = likelihood(model, states_BTD, batch, label_smoothing=smoothing)
    loss.mean.backward()
    return [loss.total.detach(), states_BTD.grad, *(p.grad for p in model.parameters())]


def twins(**settings) -> tuple[Projected, Kept]:
    torch.manual_seed(0)
    fused, plain = Projected(**settings), Kept(**settings)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_layer_and_loss_in_one_are_the_plain_formula(
    long_batch, smoothing, dtype, within, bias
):
    fused, plain = twins(bias=bias, dtype=dtype)
    pairs = zip(*(gradients(m, long_batch, smoothing) for m in (fused, plain)), strict=True)
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(
            found, wanted, rtol=within, atol=within * float(wanted.abs().max())
        )


def test_in_bf16_it_is_nearer_to_fp32_than_autocast_is(long_batch):
    fused, plain = twins()
    exact = gradients(plain, long_batch, 0.1)
    found = []
    for model in (fused, plain):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, long_batch, 0.1))
    for ours, theirs, wanted in zip(*found, exact, strict=True):
        error, reference = ((t - wanted).norm() / wanted.norm() for t in (ours, theirs))
        assert float(error) < max(1.1 * float(reference), 1e-6) < 0.02


def test_improbable_targets_keep_their_nats(long_batch):
    """Softmax of a target 1,000 nats away is 0 in fp32, its logarithm would be infinite."""
    pairs = [gradients(model, long_batch, 0.1, spread=1e3) for model in twins()]
    assert float(pairs[1][0]) > 100 * 137
    for found, wanted in zip(*pairs, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_frozen_output_layer_gets_no_gradient(long_batch):
    fused, plain = twins()
    fused.output.weight.requires_grad_(False)
    _, of_states, of_weight, of_bias = gradients(fused, long_batch, 0.1)
    assert of_weight is None
    _, wanted_states, _, wanted_bias = gradients(plain, long_batch, 0.1)
    torch.testing.assert_close((of_states, of_bias), (wanted_states, wanted_bias))


def test_what_is_not_a_number_stays_one(long_batch):
    fused, _ = twins()
    torch.nn.init.constant_(fused.output.bias, math.nan)
    assert all(found.isnan().any() for found in gradients(fused, long_batch, 0.1))
