"""The full output layer: its fused loss against the plain formula, search and draws in blocks."""

import math
import random

import pytest
import torch
from torch import Tensor

from vinedresser.nn.output import FullOutput, Output

WORDS, WIDTH = 5000, 8


class Plain(FullOutput):
    """The same distribution, its loss by the plain formula."""

    def nll(self, states_ND: Tensor, targets_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
        return Output.nll(self, states_ND, targets_N, smoothing=smoothing)


@pytest.fixture
def gold_N() -> Tensor:
    """137 targets: three blocks of rows, the last one not full."""
    draw = random.Random(0)
    return torch.tensor([draw.randrange(4, WORDS) for _ in range(137)])


def gradients(
    output: FullOutput, gold_N: Tensor, smoothing: float, *, spread: float = 1.0, seed: int = 1
) -> list[Tensor]:
    """Nll, then gradients of the states and the parameters; the loss is scaled by 1 / tokens."""
    torch.manual_seed(seed)
    states_ND = (spread * torch.randn(len(gold_N), WIDTH)).to(output.weight.dtype).requires_grad_()
    total = output.nll(states_ND, gold_N, smoothing=smoothing)
    (total / len(gold_N)).backward()
    return [total.detach(), states_ND.grad, *(p.grad for p in output.parameters())]


def twins(dtype: torch.dtype = torch.float32) -> tuple[FullOutput, Plain]:
    fused, plain = FullOutput(WIDTH, WORDS).to(dtype), Plain(WIDTH, WORDS).to(dtype)
    torch.manual_seed(0)
    for parameter in fused.parameters():
        torch.nn.init.uniform_(parameter, -(WIDTH**-0.5), WIDTH**-0.5)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_output_layer_and_loss_in_one_are_the_plain_formula(gold_N, smoothing, dtype, within):
    fused, plain = twins(dtype)
    pairs = zip(*(gradients(m, gold_N, smoothing) for m in (fused, plain)), strict=True)
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(
            found, wanted, rtol=within, atol=within * float(wanted.abs().max())
        )


def test_in_bf16_it_is_nearer_to_fp32_than_autocast_is(gold_N):
    """Errors over eight draws of the states; a sum that cancels may be near by chance."""
    fused, plain = twins()
    errors = torch.zeros(2, 4)
    for seed in range(8):
        found = []
        for output, precision in ((plain, False), (fused, True), (plain, True)):
            output.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision):
                found.append(gradients(output, gold_N, 0.1, seed=seed))
        for row, tensors in zip(errors, found[1:], strict=True):
            for i, (ours, exact) in enumerate(zip(tensors, found[0], strict=True)):
                row[i] += float((ours - exact).norm() / exact.norm()) / 8
    assert (errors[0] < (1.1 * errors[1]).clamp(min=1e-5)).all()
    assert (errors < 0.02).all()


def test_improbable_targets_keep_their_nats(gold_N):
    """Softmax of a target 1,000 nats away is 0 in fp32, its logarithm would be infinite."""
    pairs = [gradients(output, gold_N, 0.1, spread=1e3) for output in twins()]
    assert float(pairs[1][0]) > 100 * 137
    for found, wanted in zip(*pairs, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_frozen_output_layer_gets_no_gradient(gold_N):
    fused, plain = twins()
    fused.weight.requires_grad_(False)
    _, of_states, of_weight, of_bias = gradients(fused, gold_N, 0.1)
    assert of_weight is None
    _, wanted_states, _, wanted_bias = gradients(plain, gold_N, 0.1)
    torch.testing.assert_close((of_states, of_bias), (wanted_states, wanted_bias))


def test_what_is_not_a_number_stays_one(gold_N):
    fused, _ = twins()
    torch.nn.init.constant_(fused.bias, math.nan)
    assert all(found.isnan().any() for found in gradients(fused, gold_N, 0.1))


def test_blocks_change_neither_search_nor_draws():
    """600 rows are three blocks; a draw depends on the generator and on its row alone."""
    output, _ = twins()
    states_ND = 5 * torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(3))
    log_p_NV = output.log_probs(states_ND)
    for k in (1, 4):
        wanted = log_p_NV.topk(k)
        found, ids = output.best(states_ND, k)
        torch.testing.assert_close(found, wanted.values, atol=1e-5, rtol=0)
        assert torch.equal(ids, wanted.indices)
    drawn = output.sample(states_ND, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    apart = [output.sample(row_1D, generator) for row_1D in states_ND.split(1)]
    assert torch.equal(drawn, torch.cat(apart))
    assert len(drawn.unique()) > 100


def test_draws_of_a_layer_without_its_own_are_those_of_its_probabilities():
    output, _ = twins()
    states_ND = 3 * torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(3))
    found, wanted = (
        kind.sample(output, states_ND, torch.Generator().manual_seed(5))
        for kind in (Output, FullOutput)
    )
    assert float((found == wanted).float().mean()) > 0.9  # exp(log p) rounds the sums
