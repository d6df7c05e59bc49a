"""Closed forms of the hard concrete distribution (methods.md 80-82)."""

import math

import pytest
import torch
from torch import nn

from vinedresser.nn.gates import (
    HIGH,
    LOW,
    OPEN_LOG_ALPHA,
    TEMPERATURE,
    HeadGates,
    expected_open_share,
    head_gates,
)


def gates_at(*log_alpha: float) -> HeadGates:
    built = HeadGates(len(log_alpha))
    built.log_alpha.data = torch.tensor(log_alpha)
    return built


def test_constants_of_the_paper():
    assert (TEMPERATURE, LOW, HIGH) == (0.33, -0.1, 1.1)


def test_probabilities_at_zero():
    gate = gates_at(0.0)
    assert gate.open_probability()[0].item() == pytest.approx(0.688112, abs=1e-6)
    # By symmetry a gate is 1 as often as it is 0.
    assert (1 - gate.open_probability()[0]).item() == pytest.approx(0.311888, abs=1e-6)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.0])
def test_sampled_gates_have_the_closed_form_masses(log_alpha):
    torch.manual_seed(1)
    n = 100_000
    gate = gates_at(log_alpha).train()
    drawn = gate(n).detach()[:, 0]
    assert ((drawn >= 0) & (drawn <= 1)).all()
    shift = TEMPERATURE * math.log(11)
    masses = {
        0.0: 1 / (1 + math.exp(log_alpha + shift)),
        1.0: 1 / (1 + math.exp(-log_alpha + shift)),
    }
    for value, p in masses.items():
        share = float((drawn == value).float().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert gate.open_probability()[0].item() == pytest.approx(1 - masses[0.0], abs=1e-6)


def test_deterministic_gates_close_and_open_at_ln_11():
    edge = math.log(11)
    assert edge == pytest.approx(2.39790, abs=1e-5)
    e = 1e-4
    values = gates_at(-edge - e, -edge + e, 0.0, edge - e, edge + e).deterministic()
    closed, ajar, half, nearly, open_ = values.tolist()
    assert closed == 0
    assert 0 < ajar < 1e-4
    assert half == pytest.approx(0.5)
    assert 1 - 1e-4 < nearly < 1
    assert open_ == 1


def test_evaluation_is_deterministic_and_the_same_for_every_sentence():
    gate = gates_at(0.5, -1.0).eval()
    found = gate(3)
    assert torch.equal(found, gate.deterministic().expand(3, 2))


def test_fresh_gates_change_nothing_and_are_mostly_open():
    gate = HeadGates(4)
    assert gate.deterministic().tolist() == [1.0] * 4
    assert gate.open_probability()[0].item() == pytest.approx(0.97, abs=1e-6)
    assert math.log(11) < OPEN_LOG_ALPHA


class Gated(nn.Module):
    def __init__(self, sizes=(2, 6)):
        super().__init__()
        self.layers = nn.ModuleList(HeadGates(size) for size in sizes)


def test_the_penalty_is_the_mean_over_all_gates_not_over_layers():
    model = Gated()
    for layer, value in zip(head_gates(model), (0.0, 2.0), strict=True):
        layer.log_alpha.data.fill_(value)
    p0, p2 = 0.688112, 1 / (1 + math.exp(-2.0 - 0.33 * math.log(11)))
    assert expected_open_share(model).item() == pytest.approx((2 * p0 + 6 * p2) / 8, abs=1e-6)


def test_48_gates_at_zero_sum_to_the_papers_value():
    model = Gated([8] * 6)
    for layer in head_gates(model):
        layer.log_alpha.data.zero_()
    assert 48 * expected_open_share(model).item() == pytest.approx(33.0294, abs=1e-4)


def test_the_penalty_pushes_every_gate_shut():
    model = Gated()
    expected_open_share(model).backward()
    assert all((layer.log_alpha.grad > 0).all() for layer in head_gates(model))


def test_a_sample_passes_gradient_on():
    gate = gates_at(0.0, 0.0).train()
    torch.manual_seed(0)
    gate(64).sum().backward()
    assert (gate.log_alpha.grad > 0).all()


def test_bf16_weights_still_sample_in_fp32():
    gate = HeadGates(2).bfloat16().train()
    assert gate(4).dtype == torch.float32


def test_a_model_without_gates_has_no_penalty():
    with pytest.raises(ValueError, match="concrete_heads"):
        expected_open_share(nn.Linear(2, 2))
