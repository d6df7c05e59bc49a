import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vinedresser.batch import Batch
from vinedresser.config import Experiment, Optim, Terms
from vinedresser.errors import ConfigError
from vinedresser.model import Vocabulary
from vinedresser.nn.gates import HeadGates
from vinedresser.objective import Objective
from vinedresser.training.device import Device
from vinedresser.training.optimizer import build_optimizer, freeze, learning_rate, set_learning_rate
from vinedresser.training.step import training_steps

NOAM = Optim(lr=1, warmup_steps=4000, decay="noam", anneal=0.0)


def noam(step: int) -> float:
    return learning_rate(NOAM, step=step, steps=100_000, d_model=512)


def test_vaswanis_schedule():
    """methods.md 73: d**-.5 * min(t**-.5, t * w**-1.5)."""
    assert noam(4000) == pytest.approx(6.98771e-4, rel=1e-5)
    assert noam(1) == pytest.approx(1.7469e-7, rel=1e-4)
    for step in (1, 17, 3999, 4000, 4001, 50_000, 100_000):
        assert noam(step) == pytest.approx(512**-0.5 * min(step**-0.5, step * 4000**-1.5))


def test_noam_with_the_width_of_the_model(tiny_study):
    base = {**tiny_study["base"], "steps": 8, "evaluation": {}}
    optim = {"lr": 1, "decay": "noam", "warmup_steps": 4, "anneal": 0}
    experiment = Experiment.from_json({**base, "optim": optim})
    model = experiment.model.build(Vocabulary(10, 10))
    ids_BT, lengths_B = torch.full((2, 3), 4), torch.tensor([3, 3])
    batch = Batch(ids_BT, lengths_B, ids_BT, lengths_B, torch.arange(2))
    objective = Objective(experiment.objective, model)
    optimizer = build_optimizer(objective, experiment.optim)
    here = Device(torch.device("cpu"), None)
    steps = training_steps(objective, itertools.repeat(batch), optimizer, experiment, device=here)
    d = experiment.model.d_model
    wanted = [d**-0.5 * min(s**-0.5, s * 4**-1.5) for s in range(1, 9)]
    assert [step.learning_rate for step in steps] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"kind": "rnn"}}, "model.d_model"),
        ({"optim": {"lr": 1, "decay": "noam", "warmup_steps": 0}}, "warmup_steps 0"),
        ({"optim": {"lr": 2e-3, "decay": "noam", "warmup_steps": 4}}, "optim.lr=1"),
    ],
)
def test_noam_is_refused_where_its_inputs_are_unknown(tiny_study, changes, message):
    optim = {"lr": 1, "decay": "noam", "warmup_steps": 4}
    with pytest.raises(ConfigError, match=message):
        Experiment.from_json({**tiny_study["base"], "optim": optim, **changes})


def test_vaswanis_schedule_rises_then_falls():
    rates = [noam(step) for step in range(1, 20_001)]
    assert max(rates) == rates[3999]
    assert all(a < b for a, b in itertools.pairwise(rates[:4000]))
    assert all(a > b for a, b in itertools.pairwise(rates[3999:]))


def test_the_rate_falls_to_zero_one_step_after_the_last():
    config = Optim(lr=1.0, warmup_steps=0, anneal=0.25)
    rates = [learning_rate(config, step=step, steps=100) for step in range(1, 101)]
    assert rates[:75] == [1.0] * 75
    assert rates[75:] == pytest.approx([(25 - i) / 26 for i in range(25)])
    assert learning_rate(config, step=101, steps=100) == 0


def test_a_run_that_anneals_throughout():
    config = Optim(lr=1.0, warmup_steps=0, anneal=1.0)
    rates = [learning_rate(config, step=step, steps=4) for step in range(1, 5)]
    assert rates == pytest.approx([4 / 5, 3 / 5, 2 / 5, 1 / 5])


@given(
    warmup=st.integers(0, 50),
    steps=st.integers(50, 300),
    anneal=st.floats(0, 1),
    decay=st.sampled_from(["constant", "inverse_sqrt"]),
)
def test_every_rate_is_positive_and_at_most_the_peak(warmup, steps, anneal, decay):
    config = Optim(lr=0.01, warmup_steps=warmup, anneal=anneal, decay=decay)
    rates = [learning_rate(config, step=step, steps=steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 0.01 for rate in rates)
    after = rates[max(warmup, 1) - 1 :]
    assert all(a >= b for a, b in itertools.pairwise(after))


class Gated(nn.Module):
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gates = nn.Linear(3, 2), HeadGates(2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


NO_TERMS = Terms.from_json({"likelihood": {"weight": 0}})
CONFIG = Optim(lr=0.5, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)


def test_gates_have_a_group_and_a_rate_of_their_own():
    model = Gated()
    terms = {"likelihood": {"weight": 0}, "head_penalty": {"gate_lr_factor": 10}}
    objective = Objective(Terms.from_json(terms), model)
    optimizer = build_optimizer(objective, CONFIG)
    rest, gates = optimizer.param_groups
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.linear.parameters()}
    assert [id(p) for p in gates["params"]] == [id(model.gates.log_alpha)]
    assert (rest["weight_decay"], gates["weight_decay"]) == (0.1, 0.0)
    set_learning_rate(optimizer, 0.02)
    assert (rest["lr"], gates["lr"]) == (0.02, pytest.approx(0.2))
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-7)


def test_without_gates_there_is_one_group():
    assert len(build_optimizer(Objective(NO_TERMS, nn.Linear(2, 2)), CONFIG).param_groups) == 1


def test_tied_weights_are_updated_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    objective = Objective(NO_TERMS, model)
    optimizer = build_optimizer(objective, CONFIG)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_the_first_adam_step_is_the_rate_times_the_sign():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    objective = Objective(NO_TERMS, model)
    optimizer = build_optimizer(objective, Optim(weight_decay=0.0))
    set_learning_rate(optimizer, 0.25)
    model.weight.grad = torch.full((1, 1), -3.0)
    optimizer.step()
    assert model.weight.item() == pytest.approx(0.25, rel=1e-4)
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.25)


class Tied(nn.Module):
    """One table under three names, the last of them in a layer that has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.source_embedding, self.target_embedding = nn.Embedding(5, 3), nn.Embedding(5, 3)
        self.between, self.output = nn.Linear(3, 3), nn.Linear(3, 5)
        self.source_embedding.weight = self.target_embedding.weight = self.output.weight


TABLE = "source_embedding.weight = target_embedding.weight = output.weight"


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["output*"], [TABLE, "output.bias"]),
        (["output.weight"], [TABLE]),
        (["target_embedding*", "source_embedding*"], [TABLE]),
        (["between.*"], ["between.weight", "between.bias"]),
        (["between.*", "*embedding*"], [TABLE, "between.weight", "between.bias"]),
        ([], []),
    ],
    ids=str,
)
def test_a_shared_weight_is_frozen_by_any_of_its_names(patterns, wanted):
    model = Tied()
    assert freeze(model, patterns) == wanted
    trained = [
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    ]
    assert not set(trained) & set(" = ".join(wanted).split(" = "))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective = Objective(NO_TERMS, model)
    optimizer = build_optimizer(objective, CONFIG)
    model.output(model.between(model.source_embedding(torch.arange(5)))).exp().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_everything_is_not_frozen_and_unknown_names_are_told():
    with pytest.raises(ConfigError, match="covers every parameter"):
        freeze(Tied(), ["output*", "between*"])
    with pytest.raises(ConfigError, match=r"named output\.wieght; did you mean output\.weight\?"):
        freeze(Tied(), ["output.wieght"])
