"""What every trainable keeps. A file in `trainables/` is found and tried with no other edit.

A module may list forms of its model in `VARIANTS`, name -> overrides of its configuration.
"""

import importlib
import itertools
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trainables
from vinedresser.batch import BOS, EOS, PAD, Batch, pad_ids
from vinedresser.config import Experiment, ModelConfig
from vinedresser.config.experiment import model_config_class
from vinedresser.decode import beam_search, greedy
from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.objectives import likelihood

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

SOURCE = [[4, 5, 6, 7, EOS], [8, EOS], [9, 4, 4, EOS]]
TARGET = [[6, 5, EOS], [7, 8, 9, 4, 5, 6, EOS], [10, EOS]]


def forms() -> Iterator[object]:
    for module in pkgutil.iter_modules(trainables.__path__):
        config = model_config_class(module.name)()
        yield pytest.param(config, id=module.name)
        holder = importlib.import_module(f"trainables.{module.name}")
        for name, changes in getattr(holder, "VARIANTS", {}).items():
            yield pytest.param(config.override(changes), id=f"{module.name}-{name}")


@pytest.fixture(params=forms())
def config(request) -> ModelConfig:
    return request.param


def build(config: ModelConfig, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    try:  # sizes that differ, unless the form shares one vocabulary
        return config.build(Vocabulary(13, 11)).eval()
    except ValueError:
        return config.build(Vocabulary(11, 11, joint=True)).eval()


@pytest.fixture
def model(config) -> Seq2Seq:
    return build(config)


def batch_of(source: list[list[int]], target: list[list[int]]) -> Batch:
    return Batch(*pad_ids(source), *pad_ids(target), torch.arange(len(source)))


@pytest.fixture
def batch() -> Batch:
    return batch_of(SOURCE, TARGET)


def encoded(model: Seq2Seq, batch: Batch) -> Memory:
    return model.encode(batch.source_BS, batch.source_lengths_B)


def logits_of(model: Seq2Seq, batch: Batch) -> Tensor:
    return model.logits(model(batch)).detach()


def stepwise(model: Seq2Seq, memory: Memory, inputs_BT: Tensor) -> Tensor:
    state = model.start(memory, inputs_BT.shape[1])
    steps = []
    for t in range(inputs_BT.shape[1]):
        logits_BV, state = model.step(state, inputs_BT[:, t])
        steps.append(logits_BV)
    return torch.stack(steps, 1)


def assert_near(found: Tensor, wanted: Tensor, within: float) -> None:
    torch.testing.assert_close(found, wanted, atol=within, rtol=0)


def test_every_module_of_the_zoo_is_tried():
    files = {file.stem for path in trainables.__path__ for file in Path(path).glob("*.py")}
    tried = {param.id.split("-")[0] for param in forms()}
    assert tried == files - {"__init__"}


@torch.no_grad()
def test_teacher_forced_equals_stepwise(model, batch):
    memory = encoded(model, batch)
    whole = model.logits(model.decode(memory, batch.inputs_BT))
    assert_near(stepwise(model, memory, batch.inputs_BT), whole, 1e-5)


@torch.no_grad()
def test_stepwise_beyond_any_table_that_was_built(model):
    long = batch_of([[4] * 299 + [EOS]], [[5] * 280 + [EOS]])
    memory = encoded(model, long)
    whole = model.logits(model.decode(memory, long.inputs_BT))
    assert_near(stepwise(model, memory, long.inputs_BT), whole, 2e-5)


@torch.no_grad()
def test_a_state_sees_its_own_and_earlier_inputs_only(model, batch):
    memory, inputs_BT = encoded(model, batch), batch.inputs_BT
    states_BTD = model.decode(memory, inputs_BT)
    for t in range(inputs_BT.shape[1]):
        changed_BT = inputs_BT.clone()
        changed_BT[:, t] = (inputs_BT[:, t] + 1) % 11
        other_BTD = model.decode(memory, changed_BT)
        assert_near(other_BTD[:, :t], states_BTD[:, :t], 1e-6)
        moved_B = (other_BTD[:, t] - states_BTD[:, t]).abs().amax(-1)
        assert (moved_B > 1e-3).all()


def test_logits_depend_on_the_source(model):
    one, other = (logits_of(model, batch_of([s], [TARGET[0]])) for s in ([4, 5, 2], [6, 5, 2]))
    assert (one - other).abs().max() > 1e-4


def test_batch_mates_change_nothing(model, batch):
    together = logits_of(model, batch)
    for i, (source, target) in enumerate(zip(SOURCE, TARGET, strict=True)):
        alone = logits_of(model, batch_of([source], [target]))
        assert_near(together[i, : len(target)], alone[0], 1e-6 * float(alone.abs().max()))


def test_what_stands_on_padding_changes_nothing(model, batch):
    clean = logits_of(model, batch)
    filled = batch_of(SOURCE, TARGET)
    filled.source_BS[filled.source_BS == PAD] = 9
    found = logits_of(model, filled)
    assert_near(found, clean, 1e-6)
    memory = encoded(model, batch)
    memory.states_BSD.data[~memory.is_real_BS] = 7.0
    assert_near(model.logits(model.decode(memory, batch.inputs_BT)).detach(), clean, 1e-6)
    assert_near(stepwise(model, memory, batch.inputs_BT).detach(), clean, 1e-5)


def test_gradients_reach_every_parameter(model, batch):
    model.train()
    loss = likelihood(model, model(batch), batch)
    loss.mean.backward()
    parameters = dict(model.named_parameters())
    unused = [name for name, p in parameters.items() if p.grad is None]
    assert not unused  # data-parallel training waits for all of them
    assert all(p.grad.isfinite().all() for p in parameters.values())
    # No gradient is right only where no value matters: the norm before a layer without heads.
    model.eval()
    before = logits_of(model, batch)
    idle = [p for p in parameters.values() if p.numel() and not p.grad.any()]
    for parameter in idle:
        parameter.data += 1
    assert torch.equal(logits_of(model, batch), before)
    assert len(idle) < len(parameters) / 10


def test_weights_round_trip(config, model, batch, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({name: t.clone() for name, t in model.state_dict().items()}, path)
    other = build(config, seed=1)
    assert not torch.equal(logits_of(other, batch), logits_of(model, batch))
    other.load_state_dict(load_file(path))
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))


def test_configuration_round_trips_through_json(config):
    plain = config.to_json()
    assert plain["kind"] == type(config).__module__
    corpus = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
    task = {"name": "t", "corpus": corpus, "tokenizer": {"kind": "symbols"}, "metric": "per"}
    assert Experiment.from_json({"task": task, "model": plain}).model == config


def test_the_shortest_sentence_alone(model):
    batch = batch_of([[EOS]], [[EOS]])
    found = logits_of(model, batch)
    assert found.shape == (1, 1, 11)
    assert found.isfinite().all()
    assert len(greedy(model, batch.source_BS, batch.source_lengths_B, cap=1).ids[0]) <= 1


def test_bf16_is_finite_and_near_fp32(model, batch):
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = likelihood(model, model(batch), batch)
    loss.mean.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    # After the training pass, which moves running statistics where a model has some.
    wanted = logits_of(model, batch).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(model, batch)
    assert_near(found.float().log_softmax(-1), wanted, 0.1)


def test_overfits_one_batch_and_decodes_it(config, batch):
    model = build(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if model_width(model) < 100 else 3e-4)
    for _ in range(30):
        model.train()
        for _ in range(10):
            optimizer.zero_grad()
            likelihood(model, model(batch), batch).mean.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        loss = float(likelihood(model, model(batch), batch).mean.detach())
        if loss < 0.01:
            break
    assert loss < 0.01
    spoken = [ids[:-1] for ids in TARGET]
    assert greedy(model, batch.source_BS, batch.source_lengths_B, cap=20).ids == spoken
    beams = beam_search(model, batch.source_BS, batch.source_lengths_B, beam=3, alpha=0, cap=20)
    assert beams.ids == spoken


def model_width(model: Seq2Seq) -> int:
    """Features of the decoder's states; wide models want a smaller step."""
    memory = model.encode(torch.tensor([[EOS]]), torch.tensor([1]))
    return model.decode(memory, torch.tensor([[BOS]])).shape[-1]


@pytest.mark.parametrize("rows", [[2, 0, 0, 1, 2], [1], [2, 1, 0]], ids=str)
@torch.no_grad()
def test_select_takes_rows_in_their_order(model, batch, rows):
    memory = encoded(model, batch)
    prefix_BT, picked = batch.inputs_BT[:, :3], torch.tensor(rows)
    more_BT = torch.arange(2 * len(rows)).view(-1, 2) % 7 + 4  # repeated rows go on differently
    state = model.start(memory, 5)
    for t in range(3):
        _, state = model.step(state, prefix_BT[:, t])
    state = model.select(state, picked)
    found = []
    for t in range(2):
        logits_BV, state = model.step(state, more_BT[:, t])
        found.append(logits_BV)
    whole = torch.cat([prefix_BT[picked], more_BT], 1)
    for i, row in enumerate(rows):
        alone = batch_of([SOURCE[row]], [TARGET[row]])
        wanted = model.logits(model.decode(encoded(model, alone), whole[i : i + 1]))
        assert_near(torch.stack(found, 1)[i], wanted[0, 3:], 1e-5)


def test_fresh_weights_follow_the_seed(config, batch):
    one, same, other = (logits_of(build(config, seed), batch) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations((one, other), 2))
