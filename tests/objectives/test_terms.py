"""Terms of the objective: discovery, weights, and a term that needs all that a pass offers."""

import itertools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.objectives.reinforce import Reinforce, ReinforceConfig
from tests.short_run import GATED, a_run, ending, experiment, killed_run
from vinedresser.batch import Batch
from vinedresser.config import Batching, Experiment, Terms
from vinedresser.config.kinds import kinds
from vinedresser.config.terms import TERMS
from vinedresser.data.batching.reader import stream
from vinedresser.data.shards import ShardSet, open_shards, tokenizers
from vinedresser.errors import ConfigError
from vinedresser.model import Vocabulary
from vinedresser.nn.gates import HeadGates, head_gates
from vinedresser.objective import Objective
from vinedresser.special_ids import EOS, PAD
from vinedresser.training.device import Device
from vinedresser.training.optimizer import build_optimizer
from vinedresser.training.step import Step, training_steps

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Device(torch.device("cpu"), None)
REINFORCE = "tests.objectives.reinforce"


@pytest.fixture(autouse=True)
def _the_tests_hold_a_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VINEDRESSER_PACKAGES", "tests")


def with_terms(config: Experiment, terms: Mapping[str, Any]) -> Experiment:
    return config.override({"objective": terms})


def bits(state: Any) -> Any:
    """The state of an objective, tensors as bytes."""
    if isinstance(state, torch.Tensor):
        return state.detach().numpy().tobytes()
    if isinstance(state, Mapping):
        return {key: bits(value) for key, value in state.items()}
    return [bits(value) for value in state] if isinstance(state, list | tuple) else state


# Discovery and weights.


def test_terms_are_modules():
    assert {"head_penalty", "likelihood"} <= set(kinds(TERMS))
    assert list(Terms().active) == ["likelihood"]
    terms = Terms.from_json({REINFORCE: {"weight": 0.5}})
    assert list(terms.active) == ["likelihood", REINFORCE]
    assert isinstance(terms.active[REINFORCE], ReinforceConfig)
    assert Terms.from_json(json.loads(json.dumps(terms.to_json()))) == terms


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            {"likelyhood": {}},
            "likelyhood: there is no term of the objective likelyhood; did you mean likelihood?",
        ),
        ({"likelihood": {"smoothing": 0.1}}, "likelihood.smoothing: unknown key; did you mean lab"),
        ({"likelihood": {"weight": -1}}, "likelihood.weight: .* greater than or equal to 0"),
        ({"likelihood": {"weight": True}}, "likelihood.weight: expected a number"),
        ({"head_penalty": {"weight": 0.1}}, "objective.head_penalty: .*set model.concrete_heads"),
        ({"os.path": {}}, "os.path: not in the allowed packages"),
        ({"tests.short_run": {}}, "defines 0 subclasses of TermConfig"),
    ],
)
def test_a_wrong_term_is_an_error_before_the_first_step(reversal, terms, message):
    with pytest.raises(ConfigError, match=message):
        with_terms(experiment(reversal), terms)


def test_a_weight_of_0_is_absence_to_the_bit(reversal, tmp_path):
    config = experiment(reversal, **{"model.concrete_heads": ["enc_self"]})
    present = {"head_penalty": {"weight": 0}, REINFORCE: {"weight": 0}}
    found = []
    for name, terms in (("absent", {}), ("present", present)):
        run = a_run(with_terms(config, terms), reversal, tmp_path / name)
        found.append(ending(run, run.execute()))
        assert list(run.objective.terms) == ["likelihood"]
    assert found[0] == found[1]


def test_without_the_likelihood_its_curve_is_logged_all_the_same(reversal):
    config = with_terms(experiment(reversal), {"likelihood": {"weight": 0}, REINFORCE: {}})
    objective, steps = trained(config, reversal, steps=2)
    assert list(objective.terms) == [REINFORCE]
    assert all(0 < float(step.nll / step.tokens) < 10 for step in steps)
    assert dict(steps[0].metrics) == {"baseline_rate": 0.05}


# The penalty on heads.


def test_the_gradient_of_the_head_penalty():
    """d/da of lambda * mean sigmoid(a + shift) = lambda * p (1 - p) / gates, once per update."""
    torch.manual_seed(0)
    corpus = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
    task = {"name": "t", "corpus": corpus, "tokenizer": {"kind": "symbols"}, "metric": "per"}
    kind = {"kind": "transformer", "d_model": 16, "num_heads": 2, "concrete_heads": ["enc_self"]}
    config = Experiment.from_json({"task": task, "model": kind})
    model = config.model.build(Vocabulary(10, 10))
    rows = torch.tensor([[4, 5, EOS], [6, EOS, PAD]])
    batch = Batch(rows, torch.tensor([3, 2]), rows, torch.tensor([3, 2]), torch.arange(2))
    terms = {"likelihood": {"weight": 0}, "head_penalty": {"weight": 0.7}}
    objective = Objective(Terms.from_json(terms), model)
    for share in (0.25, 0.75):
        objective(batch, batch.tokens, step=1, seed=0, share=share)[1].backward()
    gates = head_gates(model)
    count = sum(len(gate.log_alpha) for gate in gates)
    for gate in gates:
        p = gate.open_probability().detach()
        torch.testing.assert_close(gate.log_alpha.grad, 0.7 * p * (1 - p) / count)
    others = [p for n, p in model.named_parameters() if not n.endswith("log_alpha")]
    assert all(p.grad is None or not p.grad.any() for p in others)


# A term with parameters, state and an optimizer, which samples and scores sentences.


def trained(
    config: Experiment, shards: ShardSet, *, steps: int, device: Device = HERE
) -> tuple[Objective, list[Step]]:
    torch.manual_seed(0)
    encoders = tokenizers(shards)
    model = config.model.build(Vocabulary(*(encoder.size for encoder in encoders)))
    objective = Objective(config.objective, model, encoders[1])
    optimizer = build_optimizer(objective, config.optim)
    batches = stream(
        shards, config.batch, seed=1, rank=device.rank,
        of=device.world_size,
    )  # fmt: skip
    updates = training_steps(objective, batches, optimizer, config, device=device)
    return objective, list(itertools.islice(updates, steps))


def test_it_is_trained_beside_the_model(reversal):
    config = with_terms(experiment(reversal), {REINFORCE: {"weight": 0.1, "lr": 1}})
    objective, steps = trained(config, reversal, steps=24)
    term = objective.terms[REINFORCE]
    assert isinstance(term, Reinforce)
    assert int(term.sentences) == sum(len(step.batches[0].rows_B) for step in steps)
    # The error of the first samples is about 100 %, a fresh baseline expects about 0.
    fresh, _ = trained(config, reversal, steps=0)
    assert term.baseline.bias.item() < fresh.terms[REINFORCE].baseline.bias.item() - 0.1
    alone, _ = trained(experiment(reversal), reversal, steps=24)
    assert not same_weights(alone.model, objective.model)
    own = {id(p) for p in term.parameters()}
    assert not own & {id(p) for p in objective.joint_parameters()}


def test_without_an_optimizer_of_its_own_the_main_one_takes_it(reversal, monkeypatch):
    monkeypatch.setattr(Reinforce, "build_optimizer", lambda _: None)
    config = with_terms(experiment(reversal), {REINFORCE: {"weight": 0.1}})
    objective, _ = trained(config, reversal, steps=8)
    assert not objective.optimizers
    assert {id(p) for p in objective.terms[REINFORCE].parameters()} < {
        id(p) for p in objective.joint_parameters()
    }
    assert objective.terms[REINFORCE].baseline.bias.item() != 0


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("whose", ["term", "model"])
def test_an_update_that_is_left_out_is_left_out_for_all(reversal, whose):
    config = with_terms(experiment(reversal), {REINFORCE: {"weight": 0.1}})
    torch.manual_seed(0)
    encoders = tokenizers(reversal)
    model = config.model.build(Vocabulary(*(encoder.size for encoder in encoders)))
    objective = Objective(config.objective, model, encoders[1])
    term = objective.terms[REINFORCE]
    optimizer = build_optimizer(objective, config.optim)
    updates = training_steps(
        objective,
        stream(reversal, Batching(max_padded_tokens=160), seed=1),
        optimizer,
        config,
        device=HERE,
    )
    next(updates)
    before = bits([model.state_dict(), list(term.parameters()), optimizer.state_dict()["state"],
                   objective.optimizers[REINFORCE].state_dict()])  # fmt: skip
    weight = next((term if whose == "term" else model).parameters())
    hook = weight.register_hook(lambda grad: grad * math.nan)
    assert not math.isfinite(float(next(updates).gradient_norm))
    hook.remove()
    after = bits([model.state_dict(), list(term.parameters()), optimizer.state_dict()["state"],
                  objective.optimizers[REINFORCE].state_dict()])  # fmt: skip
    assert after == before
    assert math.isfinite(float(next(updates).gradient_norm))
    assert not torch.equal(weight, torch.zeros_like(weight))


def test_a_killed_run_resumes_to_the_bit(reversal, tmp_path):
    config = experiment(reversal, **GATED)
    terms = {**config.objective.to_json(), REINFORCE: {"weight": 0.1}}
    config = with_terms(config, terms)
    run = a_run(config, reversal, tmp_path / "whole")
    expected = ending(run, run.execute())
    wanted = bits(run.objective.state_dict())
    killed_run(config, reversal, tmp_path / "killed", 16)
    run = a_run(config, reversal, tmp_path / "killed")
    fresh = bits(run.objective.state_dict())
    assert ending(run, run.execute()) == expected
    assert bits(run.objective.state_dict()) == wanted != fresh
    assert wanted[REINFORCE]["optimizer"]["state"]


def test_decoding_leaves_model_and_draws_as_they_are(reversal, monkeypatch):
    """In a pass: eval mode while decoding, each module's own mode afterwards."""
    seen: list[bool] = []
    forward = Reinforce.forward

    def spied(self: Reinforce, found: Any) -> Any:
        gate = next(module for module in found.model.modules() if isinstance(module, HeadGates))
        gate.eval()
        modes = [module.training for module in found.model.modules()]
        state = torch.get_rng_state()
        one, again = (found.decode(found.generator()) for _ in range(2))
        assert one == again
        assert found.decode() != one
        assert torch.equal(torch.get_rng_state(), state)
        seen.append([module.training for module in found.model.modules()] == modes)
        assert all(len(ids) <= found.batch.target_BT.shape[1] for ids in one)
        perfect = found.sentence_scores("per", found.references)
        assert perfect.tolist() == [0.0] * len(one)
        return forward(self, found)

    monkeypatch.setattr(Reinforce, "forward", spied)
    config = experiment(reversal, **{"model.concrete_heads": ["enc_self"]})
    trained(with_terms(config, {REINFORCE: {}}), reversal, steps=2)
    assert seen == [True, True]


# Two ranks.


def shared(workers: int) -> Mapping[str, Any]:
    return {"batch.per_update": 2, "compute.workers": workers, "model.dropout": 0.1}


def state_of(objective: Objective) -> dict[str, list[Any]]:
    term = objective.terms[REINFORCE]
    named = [*objective.model.named_parameters(), *term.named_parameters()]
    return {name: tensor.tolist() for name, tensor in named}


def work_in_a_pair(rank: int, folder: Path, shards: ShardSet) -> None:
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    config = with_terms(experiment(shards, **shared(2)), {REINFORCE: {"weight": 0.1}})
    device = Device(torch.device("cpu"), None, rank, 2)
    objective, _ = trained(config, shards, steps=4, device=device)
    (folder / f"{rank}.json").write_text(json.dumps(state_of(objective)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_what_one_does(reversal, tmp_path, forked):
    config = with_terms(experiment(reversal, **shared(1)), {REINFORCE: {"weight": 0.1}})
    wanted = state_of(trained(config, reversal, steps=4)[0])
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='worker')"
    words = (__file__, tmp_path, reversal.folder)
    ranks = [forked(*words, rank, code=code) for rank in (0, 1)]
    told = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    for name, value in wanted.items():
        torch.testing.assert_close(
            torch.tensor(found[0][name]), torch.tensor(value), atol=2e-5, rtol=0, msg=name
        )


if __name__ == "worker":
    work_in_a_pair(int(sys.argv[4]), Path(sys.argv[2]), open_shards(Path(sys.argv[3])))
