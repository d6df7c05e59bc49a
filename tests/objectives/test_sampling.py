"""Scheduled sampling (methods.md 6-11)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainables.transformer import TransformerConfig
from vinedresser.batch import BOS, EOS, PAD, Batch, pad_ids
from vinedresser.config import Objective, ScheduledSampling
from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.objectives import gold_share, mixed_inputs
from vinedresser.train import Trainee

pytestmark = pytest.mark.usefixtures("one_thread")

DECAYS = ("constant", "linear", "exponential", "inverse_sigmoid")


def share(decay: str, step: int, *, p: float = 1.0, k: float = 100.0) -> float:
    config = ScheduledSampling(probability=p, decay=decay, decay_steps=k)
    return gold_share(config, step)


def test_linear():
    """k = 1, c = .001, eps_min = .2 of methods.md 8 is p = .8 reached after 800 updates."""
    shares = {step: share("linear", step, p=0.8, k=800) for step in (0, 500, 800, 801, 10**6)}
    assert shares == pytest.approx({0: 1.0, 500: 0.5, 800: 0.2, 801: 0.2, 10**6: 0.2})


def test_exponential():
    """k**i of methods.md 9 with k = .9."""
    k = -1 / math.log(0.9)
    assert share("exponential", 0, k=k) == 1
    assert share("exponential", 10, k=k) == pytest.approx(0.348678, abs=1e-6)
    assert share("exponential", 100, k=100) == pytest.approx(1 / math.e)
    assert share("exponential", 10, p=0.3, k=k) == pytest.approx(0.7)


@pytest.mark.parametrize(("k", "half"), [(2000, 15201.8), (100, 460.5)])
def test_inverse_sigmoid(k, half):
    assert share("inverse_sigmoid", 0, k=k) == pytest.approx(k / (k + 1))
    assert k * math.log(k) == pytest.approx(half, abs=0.05)
    assert share("inverse_sigmoid", round(half), k=k) == pytest.approx(0.5, abs=2e-3)
    assert share("inverse_sigmoid", 10**6, k=k) == pytest.approx(0, abs=1e-9)
    assert share("inverse_sigmoid", 10**6, p=0.25, k=k) == 0.75


def test_constant():
    assert {share("constant", step, p=0.3) for step in (0, 1, 10**6)} == {0.7}


@given(
    decay=st.sampled_from(DECAYS),
    p=st.floats(0, 1),
    k=st.floats(0.1, 1e5),
    steps=st.lists(st.integers(0, 10**7), min_size=2, max_size=20),
)
def test_the_share_falls_and_stays_above_its_floor(decay, p, k, steps):
    shares = [share(decay, step, p=p, k=k) for step in sorted(steps)]
    assert all(1 - p <= value <= 1 for value in shares)
    assert all(a >= b for a, b in itertools.pairwise(shares))


@pytest.mark.parametrize("decay", DECAYS)
def test_off_is_exactly_teacher_forcing(decay):
    assert {share(decay, step, p=0.0) for step in (0, 1, 10**6)} == {1.0}


class Counting(Seq2Seq):
    """Whatever it is fed, it says 10 + t at position t."""

    def decode(self, memory: Memory, inputs_BT: Tensor) -> Tensor:
        said_T = 10 + torch.arange(inputs_BT.shape[1])
        return F.one_hot(said_T, 10 + inputs_BT.shape[1]).float().expand(len(inputs_BT), -1, -1)

    def logits(self, states: Tensor) -> Tensor:
        return states


def gold(rows: int, length: int) -> Batch:
    padded = pad_ids([[5] * (length - 1) + [EOS]] * rows)
    return Batch(*padded, *padded, torch.arange(rows))


NOWHERE = Memory(torch.zeros(0), torch.zeros(0))


def test_no_gold_after_the_beginning_at_p_1():
    found = mixed_inputs(Counting(), NOWHERE, gold(50, 9), epsilon=0.0)
    assert (found == torch.tensor([BOS, *range(10, 18)])).all()


def test_all_gold_at_p_0():
    batch = gold(50, 9)
    found = mixed_inputs(Counting(), NOWHERE, batch, epsilon=1.0)
    assert torch.equal(found, batch.inputs_BT)


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_the_share_of_own_tokens(p):
    torch.manual_seed(0)
    batch = gold(400, 251)
    found = mixed_inputs(Counting(), NOWHERE, batch, epsilon=1 - p)
    assert (found[:, 0] == BOS).all()
    own = found[:, 1:] != batch.inputs_BT[:, 1:]
    n = own.numel()
    assert n == 100_000
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs(float(own.float().mean()) - p) < 3 * sigma
    # One coin a token: neither whole sentences nor whole positions fall together.
    assert abs(float(own.float().mean(1).std()) - math.sqrt(p * (1 - p) / 250)) < 0.01


def real() -> tuple[Seq2Seq, Batch]:
    torch.manual_seed(0)
    config = TransformerConfig(d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1)
    source = pad_ids([[4, 5, 6, EOS], [7, EOS]])
    target = pad_ids([[8, 9, EOS], [4, 5, 6, 7, EOS]])
    return config.build(Vocabulary(10, 10)), Batch(*source, *target, torch.arange(2))


class Spy:
    """Notes what a model's decoder was fed, and whether it was to learn from it."""

    def __init__(self, model: Seq2Seq, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[Tensor] = []
        self.learns: list[bool] = []
        decode = model.decode

        def spied(memory: Memory, inputs_BT: Tensor) -> Tensor:
            self.inputs.append(inputs_BT.clone())
            states_BTD = decode(memory, inputs_BT)
            self.learns.append(states_BTD.requires_grad)
            return states_BTD

        monkeypatch.setattr(model, "decode", spied)


def test_the_second_pass_is_fed_the_first_ones_predictions(monkeypatch):
    model, batch = real()
    model.eval()  # no dropout: predictions can be computed again
    spy = Spy(model, monkeypatch)
    Trainee(model, Objective())(batch, 0.0, batch.tokens)
    first, second = spy.inputs
    assert torch.equal(first, batch.inputs_BT)
    assert spy.learns == [False, True]
    predicted = model.logits(model(batch)).argmax(-1)
    assert torch.equal(second[:, 1:], predicted[:, :-1])
    assert (second[:, 0] == BOS).all()


def test_teacher_forcing_decodes_once(monkeypatch):
    model, batch = real()
    spy = Spy(model, monkeypatch)
    Trainee(model, Objective())(batch, 1.0, batch.tokens)
    assert len(spy.inputs) == 1
    assert (spy.inputs[0][batch.target_BT == PAD] != BOS).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_reach_every_parameter_after_the_pass_without(precision):
    model, batch = real()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        _, goal = Trainee(model, Objective())(batch, 0.5, batch.tokens)
    goal.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
