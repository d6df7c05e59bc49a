"""methods.md 48: what each normalisation needs of a batch."""

import pytest
import torch
from torch import nn

from vinedresser.errors import TrainingError
from vinedresser.nn.norms import BatchNorm, LayerNorm, PowerNorm, build_norm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

D = 6
REAL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True, False, False, False, False]])


@pytest.fixture
def x_BTD() -> torch.Tensor:
    return 2 + 3 * torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))


def near(found, wanted, within=1e-5):
    torch.testing.assert_close(found, wanted, atol=within, rtol=0)


@pytest.mark.parametrize("kind", ["layer", "batch", "power"])
def test_fresh_norms_start_as_the_plain_one(kind):
    norm = build_norm(kind, D)
    assert isinstance(norm, {"layer": LayerNorm, "batch": BatchNorm, "power": PowerNorm}[kind])
    assert [tuple(p.shape) for p in norm.parameters()] == [(D,), (D,)]
    assert norm.weight.tolist() == [1.0] * D
    assert norm.bias.tolist() == [0.0] * D


@pytest.mark.parametrize("training", [True, False])
def test_layer_norm_is_a_function_of_one_position(x_BTD, training):
    norm = LayerNorm(D).train(training)
    together = norm(x_BTD, REAL)
    near(together, nn.functional.layer_norm(x_BTD, (D,)))
    near(norm(x_BTD[1:2, 2:3]), together[1:2, 2:3], 1e-6)


class TestBatchNorm:
    def test_equals_torch_where_all_is_real(self, x_BTD):
        ours, theirs = BatchNorm(D), nn.BatchNorm1d(D)
        for _ in range(2):
            ours.zero_grad()
            theirs.zero_grad()
            a, b = (x_BTD.clone().requires_grad_() for _ in range(2))
            found, wanted = ours(a), theirs(b.transpose(1, 2)).transpose(1, 2)
            near(found, wanted)
            found.square().sum().backward()
            wanted.square().sum().backward()
            near(a.grad, b.grad, 1e-4)
            near(ours.weight.grad, theirs.weight.grad, 1e-3)

    def test_statistics_are_of_real_positions_only(self, x_BTD):
        norm, real = BatchNorm(D), x_BTD[REAL]
        found = norm(x_BTD, REAL)
        near(found[REAL].mean(0), torch.zeros(D))
        near(found[REAL].std(0, correction=0), torch.ones(D), 1e-4)
        # The first update sets the running values to the batch's own.
        near(norm.mean, real.mean(0))
        near(norm.mean_square, real.var(0), 1e-4)
        filled = torch.where(REAL[:, :, None], x_BTD, 1e3)
        near(BatchNorm(D)(filled, REAL)[REAL], found[REAL])

    def test_evaluation_uses_running_values_so_batch_mates_change_nothing(self, x_BTD):
        norm = BatchNorm(D)
        for shift in range(20):
            norm(x_BTD + shift, REAL)
        norm.eval()
        together = norm(x_BTD, REAL)
        near(norm(x_BTD[:1]), together[:1], 1e-6)
        near(together, (x_BTD - norm.mean) / (norm.mean_square + 1e-5).sqrt())

    def test_running_mean_is_a_plain_then_a_moving_average(self):
        norm, values = BatchNorm(1), [float(v) for v in range(1, 16)]
        wanted = 0.0
        for step, value in enumerate(values, 1):
            norm(torch.full((2, 3, 1), value))
            wanted += max(1 / step, 0.1) * (value - wanted)
            assert float(norm.mean) == pytest.approx(wanted, abs=1e-5)
            if step == 10:
                assert wanted == pytest.approx(5.5)

    def test_batch_mates_and_later_positions_do_count_in_training(self, x_BTD):
        """The limit that nn/norms.py states: neither independence nor causality in training."""
        changed = x_BTD.clone()
        changed[2, 4] += 5
        found = BatchNorm(D)(x_BTD), BatchNorm(D)(changed)
        assert (found[0][:2] - found[1][:2]).abs().max() > 0.1
        assert (found[0][2, :4] - found[1][2, :4]).abs().max() > 0.1

    def test_one_sentence_is_refused_in_training(self, x_BTD):
        norm = BatchNorm(D)
        with pytest.raises(
            TrainingError, match=r"one sentence.*Fix: raise batch\.max_padded_tokens"
        ):
            norm(x_BTD[:1])
        assert norm.eval()(x_BTD[:1]).isfinite().all()


class TestPowerNorm:
    def test_forward_by_hand(self, x_BTD):
        norm, psi2 = PowerNorm(D), torch.ones(D)
        for step in range(1, 14):
            x = x_BTD * step
            # The batch's own statistics are for the next update.
            near(norm(x, REAL), x / (psi2 + 1e-5).sqrt(), 1e-4)
            psi2 = psi2 + max(1 / step, 0.1) * (x[REAL].square().mean(0) - psi2)
            torch.testing.assert_close(norm.mean_square, psi2)
        near(norm.eval()(x_BTD), x_BTD / (psi2 + 1e-5).sqrt())

    def test_backward_by_hand(self, x_BTD):
        norm, nu = PowerNorm(D), torch.zeros(D)
        norm.weight.data = torch.linspace(0.5, 2, D)
        weight = torch.linspace(-1, 1, D)
        for _ in range(4):
            scale = (norm.mean_square + 1e-5).rsqrt()
            x = x_BTD.clone().requires_grad_()
            (norm(x, REAL) * weight)[REAL].sum().backward()
            y = x_BTD * scale
            grad = (weight * norm.weight.detach()).expand_as(y)
            near(x.grad[REAL], ((grad - nu * y) * scale)[REAL], 1e-4)
            assert not x.grad[~REAL].any()
            nu = nu * (1 - 0.1 * y[REAL].square().mean(0)) + 0.1 * (grad * y)[REAL].mean(0)
            torch.testing.assert_close(norm.nu, nu)
        assert nu.abs().min() > 0

    def test_the_first_gradient_is_that_of_a_constant_scale(self, x_BTD):
        norm = PowerNorm(D)
        x = x_BTD.clone().requires_grad_()
        norm(x).sum().backward()
        near(x.grad, torch.full_like(x, (1 + 1e-5) ** -0.5))

    def test_one_sentence_padding_and_mates_are_fine_in_training(self, x_BTD):
        warm = PowerNorm(D)
        warm(x_BTD, REAL)
        state = warm.state_dict()

        def run(x, real):
            norm = PowerNorm(D)
            norm.load_state_dict(state)
            return norm.train()(x, real), norm.mean_square

        (together, of_all), (alone, of_one) = run(x_BTD, REAL), run(x_BTD[1:2, :3], REAL[1:2, :3])
        near(alone, together[1:2, :3], 1e-6)
        assert (of_one - of_all).abs().max() > 0.01
        filled, of_filled = run(torch.where(REAL[:, :, None], x_BTD, 1e3), REAL)
        near(filled[REAL], together[REAL], 1e-6)
        torch.testing.assert_close(of_filled, of_all)


@pytest.mark.parametrize("kind", ["batch", "power"])
def test_statistics_stay_in_fp32_under_autocast(x_BTD, kind):
    norm = build_norm(kind, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x_BTD.bfloat16(), REAL)
    assert found.dtype == norm.mean_square.dtype == torch.float32


@pytest.mark.parametrize("kind", ["batch", "power"])
def test_frozen_they_do_in_training_what_they_do_in_evaluation(kind, x_BTD):
    norm = build_norm(kind, D)
    for shift in range(5):
        norm(x_BTD + shift, REAL)
    norm.weight.requires_grad_(requires_grad=False)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    found = norm(x_BTD + 9, REAL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    assert torch.equal(found, norm.eval()(x_BTD + 9, REAL))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["batch", "power"])
def test_a_pass_that_is_not_finite_leaves_no_trace(kind, bad, x_BTD):
    """methods.md 101: its update is left out, and so are its statistics."""
    norm, plain = build_norm(kind, D), build_norm(kind, D)

    def update(norm, x):
        x = x.clone().requires_grad_()
        norm(x, REAL).square().sum().backward()
        return x.grad

    spoilt = x_BTD.clone()
    spoilt[0, 1, 2] = bad
    for shift in range(4):
        update(norm, x_BTD + shift)
        update(plain, x_BTD + shift)
        before = {name: tensor.clone() for name, tensor in norm.named_buffers()}
        assert not update(norm, spoilt).isfinite().all()
        for name, tensor in norm.named_buffers():
            assert torch.equal(tensor, before[name]), name
    near(update(norm, x_BTD), update(plain, x_BTD), 0)
    for (name, tensor), wanted in zip(norm.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(tensor, wanted), name
    assert float(norm.updates) == 5


def test_an_infinite_gradient_leaves_power_norm_its_own(x_BTD):
    norm = PowerNorm(D)
    norm(x_BTD.requires_grad_(), REAL).sum().backward()
    before = norm.nu.clone()
    (norm(x_BTD, REAL) * torch.inf).sum().backward()
    assert before.any()
    assert torch.equal(norm.nu, before)
    assert (norm.updates, bool(norm.mean_square.isfinite().all())) == (2, True)
