"""Scheduled sampling (methods.md 6-11)."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.batches import pad_ids
from trainables.attention_rnn import AttentionRnnConfig
from trainables.conv import ConvConfig
from trainables.rnn import RnnConfig
from trainables.transformer import TransformerConfig
from vinedresser.batch import Batch
from vinedresser.config import Experiment, ModelConfig, Terms
from vinedresser.decode import greedy
from vinedresser.errors import ConfigError
from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.nn.norms import BatchNorm, PowerNorm
from vinedresser.nn.output import Output
from vinedresser.objective import Objective, target_nll
from vinedresser.objectives.likelihood import (
    LikelihoodConfig,
    ScheduledSampling,
    mixed_inputs,
    teacher_forcing_ratio,
)
from vinedresser.special_ids import BOS, EOS, PAD
from vinedresser.training.device import seed_step

pytestmark = pytest.mark.usefixtures("one_thread")


def sampled(model: Seq2Seq, probability: float, **more: Any) -> Objective:
    sampling = ScheduledSampling(probability=probability, decay="constant", **more)
    return Objective(Terms(likelihood=LikelihoodConfig(sampling=sampling)), model)


DECAYS = ("constant", "linear", "exponential", "inverse_sigmoid")


def share(decay: str, step: int, *, p: float = 1.0, k: float = 100.0) -> float:
    config = ScheduledSampling(probability=p, decay=decay, decay_steps=k)
    return teacher_forcing_ratio(config, step)


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
    # To the digits of the formula where it does not overflow, and by its limit where it does.
    for step in (1, 10, 1000, 30_000):
        wanted = k / (k + math.exp(step / k))
        assert share("inverse_sigmoid", step, k=k) == pytest.approx(wanted, rel=1e-12)
    assert share("inverse_sigmoid", 10**6, k=1.0) == pytest.approx(0, abs=1e-300)


def test_constant():
    assert {share("constant", step, p=0.3) for step in (0, 1, 10**6)} == {0.7}


@given(
    decay=st.sampled_from(DECAYS),
    p=st.floats(0, 1),
    k=st.floats(1, 1e5),
    steps=st.lists(st.integers(0, 10**7), min_size=2, max_size=20),
)
def test_the_share_falls_and_stays_above_its_floor(decay, p, k, steps):
    shares = [share(decay, step, p=p, k=k) for step in sorted(steps)]
    assert all(1 - p <= value <= 1 for value in shares)
    assert all(a >= b for a, b in itertools.pairwise(shares))


@pytest.mark.parametrize("decay", DECAYS)
def test_off_is_exactly_teacher_forcing(decay):
    assert {share(decay, step, p=0.0) for step in (0, 1, 10**6)} == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probability": 1.1}, r"probability: .*less than or equal to 1; found 1\.1"),
        ({"probability": -0.1}, r"probability: .*greater than or equal to 0; found -0\.1"),
        # The share of gold tokens has no name of its own: nobody can take one for the other.
        ({"epsilon": 0.9}, r"epsilon: unknown key; known here: .*probability"),
        ({"decay": "inverse_sigmoid", "decay_steps": 0.5}, r"below one half of gold.*Fix: "),
        ({"decay_steps": 0}, "decay_steps"),
        ({"feedback": "beam"}, "feedback: .*'argmax' or 'sample'"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        ScheduledSampling.from_json(changes)
    assert len(str(refusal.value).splitlines()) == 1


class Said(Output):
    """Its states are log-probabilities; counts the rows that are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def log_probs(self, states: Tensor) -> Tensor:
        self.rows += len(states)
        return states


class Counting(Seq2Seq):
    """Whatever it is fed, it says 10 + t at position t."""

    def __init__(self) -> None:
        super().__init__()
        self.output = Said()

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        said_T = 10 + torch.arange(inputs_BT.shape[1])
        return F.one_hot(said_T, 10 + inputs_BT.shape[1]).float().expand(len(inputs_BT), -1, -1)


class Adding(Seq2Seq):
    """A recurrence: it says the sum of all that it was fed, so that each own token counts on."""

    is_recurrent = True
    vocabulary = 10**3

    def __init__(self) -> None:
        super().__init__()
        self.output = Said()

    def start(self, memory: Memory, max_length: int) -> Tensor:
        return torch.zeros((), dtype=torch.int64)

    def step(self, state: Tensor, tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        state = state + tokens_B
        return F.one_hot(state % self.vocabulary, self.vocabulary).float(), state


def gold(rows: int, length: int) -> Batch:
    padded = pad_ids([[5] * (length - 1) + [EOS]] * rows)
    return Batch(*padded, *padded, torch.arange(rows))


TASK = {
    "name": "t",
    "corpus": {
        "train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}
    },
    "tokenizer": {"kind": "symbols"},
    "metric": "per",
}  # fmt: skip

NOWHERE = Memory(torch.zeros(0), torch.zeros(0))


def test_no_gold_after_the_beginning_at_p_1():
    found = mixed_inputs(Counting(), NOWHERE, gold(50, 9), teacher_forcing_ratio=0.0)
    assert (found == torch.tensor([BOS, *range(10, 18)])).all()


def test_a_recurrence_says_what_follows_from_its_own_tokens():
    """1, then 1, 2, 4, ...: each is the sum of all before it, and 5 nowhere."""
    found = mixed_inputs(Adding(), NOWHERE, gold(50, 9), teacher_forcing_ratio=0.0)
    assert (found == torch.tensor([1, 1, 2, 4, 8, 16, 32, 64, 128])).all()


class AddingWhole(Adding):
    """The same function of its prefix, over all positions at once."""

    is_recurrent = False

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        return F.one_hot(inputs_BT.cumsum(1) % self.vocabulary, self.vocabulary).float()


def test_two_passes_follow_gold_and_exact_feedback_follows_its_own_tokens():
    batch = gold(50, 9)
    twice = mixed_inputs(AddingWhole(), NOWHERE, batch, teacher_forcing_ratio=0.0)
    assert (twice == torch.tensor([1, 1, 6, 11, 16, 21, 26, 31, 36])).all()
    found = mixed_inputs(AddingWhole(), NOWHERE, batch, teacher_forcing_ratio=0.0, exact=True)
    assert (found == torch.tensor([1, 1, 2, 4, 8, 16, 32, 64, 128])).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer", "conv"])
def test_exact_feedback_is_what_the_model_decodes(name):
    """Through training: the second pass is fed the greedy output."""
    differs = False
    for seed in range(6):
        model, batch = real(MODELS[name], seed)
        objective = sampled(model.eval(), 1, exact=True)  # without dropout
        with pytest.MonkeyPatch.context() as patch:
            spy = Spy(model, patch)
            objective(batch, batch.tokens, step=1, seed=0)
        (fed_BT,) = spy.inputs
        free = greedy(model, batch.source_BS, batch.source_lengths_B, cap=9).ids
        for row, ids, length in zip(fed_BT.tolist(), free, batch.target_lengths_B, strict=True):
            count = min(len(ids), int(length) - 1)
            assert row[1 : 1 + count] == ids[:count]
        memory = model.encode(batch.source_BS, batch.source_lengths_B)
        differs |= not torch.equal(
            fed_BT, mixed_inputs(model, memory, batch, teacher_forcing_ratio=0.0)
        )
    assert differs


def test_exact_feedback_refuses_norms_over_positions():
    plain = {"task": TASK, "model": {"kind": "transformer", "norm_kind": "batch"}}
    assert Experiment.from_json(plain)
    with pytest.raises(ConfigError, match=r"norm_kind batch takes statistics"):
        Experiment.from_json({**plain, "objective": {"likelihood": {"sampling": {"exact": True}}}})


def test_a_recurrence_with_some_gold():
    torch.manual_seed(0)
    batch = gold(40, 9)
    found = mixed_inputs(Adding(), NOWHERE, batch, teacher_forcing_ratio=0.5)
    sums = found.cumsum(1)[:, :-1]
    is_gold, is_sum = found[:, 1:] == 5, found[:, 1:] == sums
    assert (is_gold | is_sum).all()
    assert (found[:, 2] == 10 - 4).any()  # 1 + 5 said after gold
    assert (found[:, 2] == 2).any()  # 1 + 1 said after an own token


@pytest.mark.parametrize("model", [Counting(), Adding()], ids=["twice", "steps"])
def test_all_gold_at_p_0(model):
    batch = gold(50, 9)
    found = mixed_inputs(model, NOWHERE, batch, teacher_forcing_ratio=1.0)
    assert torch.equal(found, batch.inputs_BT)


@pytest.mark.parametrize("p", [0.1, 0.4])
@pytest.mark.parametrize("model", [Counting, Adding], ids=["twice", "steps"])
def test_the_share_of_own_tokens(p, model, monkeypatch):
    torch.manual_seed(0)
    batch = gold(400, 251)
    # Sums would outgrow the vocabulary: it says 7, always.
    monkeypatch.setattr(
        Adding, "step", lambda _, state, ids_B: (F.one_hot(ids_B * 0 + 7, 8).float(), state)
    )
    found = mixed_inputs(model(), NOWHERE, batch, teacher_forcing_ratio=1 - p)
    assert (found[:, 0] == BOS).all()
    own = found[:, 1:] != batch.inputs_BT[:, 1:]
    n = own.numel()
    assert n == 100_000
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs(float(own.float().mean()) - p) < 3 * sigma
    # One coin a token: neither whole sentences nor whole positions fall together.
    assert abs(float(own.float().mean(1).std()) - math.sqrt(p * (1 - p) / 250)) < 0.01
    assert abs(float(own.float().mean(0).std()) - math.sqrt(p * (1 - p) / 400)) < 0.01


def test_only_rows_that_take_their_own_token_are_projected():
    torch.manual_seed(0)
    model = Adding()
    inputs = mixed_inputs(model, NOWHERE, gold(100, 9), teacher_forcing_ratio=0.9)
    assert model.output.rows == int((inputs != gold(100, 9).inputs_BT).sum())
    assert 40 < model.output.rows < 120  # 80 of 800 are expected


SHARES = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])


class Drawing(Counting):
    """It says each token with its share."""

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        return SHARES.log().expand(*inputs_BT.shape, -1)


def test_sampled_feedback_has_the_models_probabilities():
    torch.manual_seed(0)
    found = mixed_inputs(
        Drawing(), NOWHERE, gold(400, 251), teacher_forcing_ratio=0.0, feedback="sample"
    )
    counts = torch.bincount(found[:, 1:].flatten(), minlength=6)
    assert int(counts.sum()) == 100_000
    assert (counts[SHARES == 0] == 0).all()
    for count, p in zip(counts.tolist(), SHARES.tolist(), strict=True):
        assert abs(count / 1e5 - p) <= 3 * math.sqrt(p * (1 - p) / 1e5)
    # Each its own draw: neighbours agree as often as two independent ones do.
    agree = float((found[:, 1:-1] == found[:, 2:]).float().mean())
    assert agree == pytest.approx(float(SHARES.square().sum()), abs=0.01)
    assert (
        mixed_inputs(Drawing(), NOWHERE, gold(9, 9), teacher_forcing_ratio=0.0)[:, 1:] == 1
    ).all()


SIZES = {"width": 16, "encoder_units": 8, "dropout": 0.1}
MODELS = {
    "transformer": TransformerConfig(
        d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1
    ),
    "conv": ConvConfig(d_model=16, encoder_layers=1, decoder_layers=1),
    "rnn": RnnConfig(**SIZES),
    "feeding": AttentionRnnConfig(**SIZES, input_feeding=True),
}


def real(config: ModelConfig = MODELS["transformer"], seed: int = 0) -> tuple[Seq2Seq, Batch]:
    torch.manual_seed(seed)
    source = pad_ids([[4, 5, 6, EOS], [7, EOS]])
    target = pad_ids([[8, 9, EOS], [4, 5, 6, 7, EOS]])
    return config.build(Vocabulary(10, 10)), Batch(*source, *target, torch.arange(2))


class Spy:
    """Notes what a model's decoder was fed, and whether it was to learn from it."""

    def __init__(self, model: Seq2Seq, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[Tensor] = []
        self.learns: list[bool] = []
        decode = model.decode

        def spied(memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor) -> Tensor:
            self.inputs.append(inputs_BT.clone())
            states_BTD = decode(memory, inputs_BT, is_real_BT)
            self.learns.append(states_BTD.requires_grad)
            return states_BTD

        monkeypatch.setattr(model, "decode", spied)


def test_the_second_pass_is_fed_the_first_ones_predictions(monkeypatch):
    model, batch = real()
    model.eval()  # no dropout: predictions can be computed again
    spy = Spy(model, monkeypatch)
    sampled(model, 1)(batch, batch.tokens, step=1, seed=0)
    first, second = spy.inputs
    assert torch.equal(first, batch.inputs_BT)
    assert spy.learns == [False, True]
    predicted = model.output.log_probs(model(batch)).argmax(-1)
    is_fed = batch.is_real_BT[:, 1:]
    assert torch.equal(second[:, 1:][is_fed], predicted[:, :-1][is_fed])
    assert torch.equal(second[~batch.is_real_BT], batch.inputs_BT[~batch.is_real_BT])
    assert (second[:, 0] == BOS).all()


@pytest.mark.parametrize("name", MODELS)
def test_teacher_forcing_decodes_once(name, monkeypatch):
    model, batch = real(MODELS[name])
    spy = Spy(model, monkeypatch)
    sampled(model, 0)(batch, batch.tokens, step=1, seed=0)
    assert len(spy.inputs) == 1
    assert (spy.inputs[0][batch.target_BT == PAD] != BOS).all()
    # Off in evaluation, whatever the share.
    nats, _ = sampled(model, 1).eval()(batch, batch.tokens, step=1, seed=0)
    assert len(spy.inputs) == 2
    assert torch.equal(spy.inputs[1], batch.inputs_BT)
    assert torch.equal(nats, target_nll(model, model(batch), batch).total)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feedback", ["argmax", "sample"])
def test_seed_step_and_rank_alone_decide(name, feedback):
    model, batch = real(MODELS[name])

    def fed(seed: int, step: int, rank: int) -> list[list[int]]:
        seed_step(seed, step, rank)
        memory = model.encode(batch.source_BS, batch.source_lengths_B)
        return mixed_inputs(
            model, memory, batch, teacher_forcing_ratio=0.5, feedback=feedback
        ).tolist()

    triples = list(itertools.product(range(2), range(5), range(2)))
    found = [fed(*triple) for triple in triples]
    torch.rand(5)
    assert [fed(*triple) for triple in reversed(triples)] == found[::-1]
    # Six coins: two of 2**6 outcomes are seldom the same.
    assert sum(a != b for a, b in zip(found[::2], found[1::2], strict=True)) > 7  # of two ranks
    assert len({str(inputs) for inputs in found}) > 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_reach_every_parameter_after_the_pass_without(name, precision):
    model, batch = real(MODELS[name])
    objective = sampled(model, 0.5, feedback="sample")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        _, loss = objective(batch, batch.tokens, step=1, seed=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["batch", "power"])
def test_an_own_end_of_sentence_ends_nothing(kind, monkeypatch):
    """Norms over a batch count the batch's real positions, whatever the model said there."""
    model, batch = real(MODELS["transformer"].override({"norm_kind": kind}))
    norms = [m for m in model.decoder.modules() if isinstance(m, BatchNorm | PowerNorm)]
    assert len(norms) == 3
    masks: list[Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[1]))
    calls = []

    def ending(states_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        calls.append(len(states_ND))
        return torch.zeros(len(states_ND), k), torch.full((len(states_ND), k), EOS)

    monkeypatch.setattr(model.output, "best", ending)
    spy = Spy(model, monkeypatch)
    _, goal = sampled(model, 1)(batch, batch.tokens, step=1, seed=0)
    assert spy.inputs[1].tolist() == [[BOS, EOS, EOS, EOS, PAD], [BOS, EOS, EOS, EOS, EOS]]
    assert len(masks) == 6
    assert all(torch.equal(mask, batch.is_real_BT) for mask in masks)
    assert calls == [2 + 4]  # positions after BOS; padding is not projected
    assert goal.isfinite()
