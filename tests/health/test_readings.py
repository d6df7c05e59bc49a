"""Readings against brute force: norms parameter by parameter, dead units from kept outputs."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tests.batches import pad_ids
from vinedresser.batch import Batch, is_real
from vinedresser.config import Experiment
from vinedresser.health.activations import Activations, observed
from vinedresser.health.readings import Readings, layer_of
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.objective import Objective
from vinedresser.special_ids import EOS
from vinedresser.training.device import Device
from vinedresser.training.optimizer import build_optimizer, freeze
from vinedresser.training.step import training_steps

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Device(torch.device("cpu"), None)
SMALL = {"d_model": 16, "d_ff": 24, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
RNN = {"kind": "attention_rnn", "width": 16, "encoder_units": 8}
MODELS = {
    "transformer": {"kind": "transformer", **SMALL},
    # The first layer has no heads left: its projections are empty.
    "pruned": {"kind": "transformer", **SMALL, "alive_heads": {"enc_self": [[0, 0], [1, 1]]}},
    "all_tied": {"kind": "transformer", **SMALL, "tie": "all"},
    "gated": {"kind": "transformer", **SMALL, "concrete_heads": ["enc_self"]},
    "lstm": RNN,
    "feeding": {**RNN, "input_feeding": True},
    "gru_feeding": {**RNN, "cell": "gru", "input_feeding": True},
    "conv": {"kind": "conv", "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
    "rnn": {"kind": "rnn", "width": 16, "encoder_units": 16},
}
ROWS = [[4, 5, 6, 7, 8, EOS], [5, EOS], [6, 6, EOS], [7, 4, EOS], [EOS], [8, 7, 6, EOS]]


def experiment(model: dict[str, object], **changes: object) -> Experiment:
    corpus = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
    task = {"name": "t", "corpus": corpus, "tokenizer": {"kind": "symbols"}, "metric": "per"}
    base = Experiment.from_json({"task": task, "model": model})
    fixed = {"steps": 4, "optim.warmup_steps": 0, "evaluation.num_evaluations": 1}
    return base.override({**fixed, **changes})


def built(config: Experiment) -> Seq2Seq:
    torch.manual_seed(0)
    return config.model.build(Vocabulary(10, 10, joint=True))


def batch_of(rows: list[list[int]]) -> Batch:
    padded = pad_ids(rows)
    return Batch(*padded, *padded, torch.arange(len(rows)))


def endless() -> Iterator[Batch]:
    while True:
        yield batch_of(ROWS[:3])
        yield batch_of(ROWS[3:])


def trained(model: Seq2Seq, config: Experiment, monitor: Readings | None) -> None:
    objective = Objective(config.objective, model)
    optimizer = build_optimizer(objective, config.optim)
    steps = training_steps(objective, endless(), optimizer, config, device=HERE, monitor=monitor)
    assert len(list(steps)) == config.steps


class ByHand(Readings):
    """Computes the same with a loop a parameter, at every due step."""

    def __init__(self, model: Seq2Seq, *, every: int) -> None:
        super().__init__(model, every=every)
        self.model, self.found = model, []

    def gradients(self, index: int) -> None:
        super().gradients(index)
        if not self.is_due(index):
            return
        layers: dict[str, list[Tensor]] = {}
        self.old = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            layers.setdefault(layer_of(name), []).append(grad.clone().flatten())
        self.grads = {layer: torch.cat(parts) for layer, parts in layers.items()}

    @torch.no_grad()
    def updated(self, index: int) -> None:
        super().updated(index)
        if not self.is_due(index):
            return
        found: dict[str, dict[str, float]] = {}
        for layer, grads in self.grads.items():
            own = [(n, p) for n, p in self.model.named_parameters() if layer_of(n) == layer]
            whole = sum(float((self.old[n].double() ** 2).sum()) for n, _ in own)
            found[layer] = {
                "gradient_norm": float(grads.double().norm()),
                "gradient_max_abs": float(grads.abs().max()),
                "parameter_norm": math.sqrt(whole),
            }
            matrices = [(n, p) for n, p in own if p.dim() > 1]
            if matrices:
                moved = sum(float(((p - self.old[n]).double() ** 2).sum()) for n, p in matrices)
                weights = sum(float((self.old[n].double() ** 2).sum()) for n, _ in matrices)
                found[layer]["update_ratio"] = math.sqrt(moved / weights)
        self.found.append((index, found))


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_equals_the_one_by_hand(name):
    config = experiment(MODELS[name])
    model = built(config)
    monitor = ByHand(model, every=2)
    trained(model, config, monitor)
    metrics = monitor.take()
    assert (
        [reading.step for reading in monitor.history] == [s for s, _ in monitor.found] == [1, 2, 4]
    )
    for reading, (_, wanted) in zip(monitor.history, monitor.found, strict=True):
        assert set(reading.layers) == set(wanted)
        for layer, values in wanted.items():
            seen = {k: v for k, v in reading.layers[layer].items() if "activation" not in k}
            assert seen == pytest.approx(values, rel=1e-4, abs=1e-9), layer
    last = monitor.found[-1][1]
    for key in ("gradient_norm", "parameter_norm"):
        whole = math.sqrt(sum(values[key] ** 2 for values in last.values()))
        assert metrics[f"monitor/{key}"] == pytest.approx(whole, rel=1e-4)
    largest = max(values["gradient_max_abs"] for values in last.values())
    assert metrics["monitor/gradient_max_abs"] == pytest.approx(largest)
    assert 0 < metrics["monitor/update_ratio_min"] <= metrics["monitor/update_ratio_max"] < 1
    assert metrics["monitor/memory_mb"] > metrics.get("monitor/allocated_mb", 1) > 0


@pytest.mark.parametrize("name", MODELS)
def test_watching_changes_no_bit(name):
    config = experiment(MODELS[name])
    models = [built(config) for _ in range(2)]
    trained(models[0], config, None)
    trained(models[1], config, Readings(models[1], every=1))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_touched_between_due_steps(monkeypatch):
    config = experiment(MODELS["transformer"])
    monitor = Readings(built(config), every=50)
    assert [i for i in range(1, 201) if monitor.is_due(i)] == [1, 50, 100, 150, 200]
    monkeypatch.setattr(torch, "_foreach_norm", None)  # would fail
    assert isinstance(monitor.watching(49, batch_of(ROWS)), nullcontext)
    monitor.gradients(49)
    monitor.updated(49)
    assert monitor.take() == {}
    assert monitor.history == []


def test_hooks_are_gone_after_a_step_also_one_that_failed():
    model = built(experiment(MODELS["transformer"]))
    monitor = Readings(model, every=1)
    hooks = []

    def fails() -> None:
        with monitor.watching(1, batch_of(ROWS)):
            hooks.extend(torch_module._global_forward_hooks)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()
    assert hooks
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks


def test_a_wrong_interval_is_refused():
    with pytest.raises(ValueError, match="every is 0"):
        Readings(built(experiment(RNN)), every=0)


def test_names_of_layers():
    assert layer_of("encoder.0.enc_self.output.weight") == "encoder.0"
    assert layer_of("encoder.layers.2.ahead.rnn.bias_ih_l0") == "encoder.layers.2"
    assert layer_of("target_embedding.weight") == "target_embedding"
    assert layer_of("source_bias") == "source_bias"


def test_layers_go_from_source_to_output_and_are_few():
    base = experiment({"kind": "transformer-base"}).model
    layers = Readings(base.build(Vocabulary(10, 10)), every=1).layers
    sides = [f"{side}.{i}" for side in ("encoder", "decoder") for i in range(6)]
    assert [layer for layer in layers if layer[-1].isdigit()] == sides
    assert layers[0] == "source_embedding"
    assert layers[-1] == "output"
    assert len(layers) == 17


def test_gradients_decay_from_block_to_block_and_not_to_a_norm():
    deep = {**RNN, "encoder_layers": 2, "decoder_layers": 2, "layer_norm": True}
    model = built(experiment(deep))
    monitor = Readings(model, every=1)
    assert "norms.1" in monitor.layers
    for name, p in model.named_parameters():
        # Root mean squares: 0.5 below, 2 on top, and what a gain may have.
        p.grad = torch.full_like(
            p, {"encoder.layers.0": 0.5, "decoder.1": 2.0}.get(layer_of(name), 99)
        )
    monitor.gradients(1)
    assert monitor.take()["monitor/gradient_decay"] == pytest.approx(0.25)


class TestSource:
    def norm(self, model: Seq2Seq, config: Experiment) -> dict[str, float]:
        monitor = Readings(model, every=4)
        trained(model, config, monitor)
        return monitor.take()

    def test_an_encoder_that_is_cut_off_has_no_gradient(self, monkeypatch):
        config = experiment(MODELS["transformer"])
        model = built(config)
        assert self.norm(model, config)["monitor/gradient_norm_source"] > 1e-3
        encode = type(model).encode
        with torch.no_grad():
            cut = torch.no_grad()(encode)
        monkeypatch.setattr(type(model), "encode", cut)
        found = self.norm(built(config), config)
        assert found["monitor/gradient_norm_source"] == 0
        assert found["monitor/gradient_decay"] == 0
        assert found["monitor/gradient_norm"] > 1e-3

    def test_shared_embeddings_are_not_the_encoders_alone(self):
        apart, tied = (
            Readings(built(experiment(MODELS[name])), every=1)
            for name in ("transformer", "all_tied")
        )
        names = [n for n, _ in built(experiment(MODELS["transformer"])).named_parameters()]
        own = [n for n in names if n.startswith(("encoder", "source_embedding"))]
        assert int(apart._is_source_P.sum()) == len(own)
        assert int(tied._is_source_P.sum()) == len(own) - 1

    def test_a_frozen_encoder_is_not_mistaken_for_a_dead_one(self):
        config = experiment(MODELS["transformer"])
        model = built(config)
        freeze(model, ["encoder*", "source_embedding*"])
        found = self.norm(model, config)
        assert "monitor/gradient_norm_source" not in found
        assert found["monitor/gradient_norm"] > 0


class Net(nn.Module):
    """One activation function over three linear units, given as a module or as a function."""

    def __init__(self, act: object) -> None:
        super().__init__()
        self.inner, self.act = nn.Linear(2, 4), act

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        out: Tensor = self.act(self.inner(x_BTD))
        return out


def seen(model: nn.Module, *args: Tensor) -> Activations:
    found = Activations()
    with observed(model, frozenset(), found):
        model(*args)
    return found


class TestActivations:
    @pytest.mark.parametrize("act", [F.relu, torch.relu, nn.ReLU(), Tensor.relu, nn.ReLU(True)])
    def test_a_negative_bias_kills_its_units(self, act):
        net = Net(act)
        with torch.no_grad():
            net.inner.bias.copy_(torch.tensor([-1e3, 1e3, -1e3, 1e3]))
        (alive_F,) = seen(net, torch.randn(3, 5, 2)).alive.values()
        assert alive_F.tolist() == [False, True, False, True]

    def test_what_fires_on_padding_alone_is_dead(self):
        net = Net(F.relu)
        x_BTD, lengths_B = torch.randn(2, 3, 2), torch.tensor([3, 1])
        with torch.no_grad():
            net.inner.weight.zero_()
            net.inner.weight[0, 0] = 1.0
            net.inner.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 1.0]))
            x_BTD[:, :, 0] = -1.0
            x_BTD[1, 2, 0] = 1.0  # padding
        (masked,) = seen(net, x_BTD, is_real(lengths_B, 3)).alive.values()
        (unmasked,) = seen(net, x_BTD).alive.values()
        assert masked.tolist() == [False, True, False, True]
        assert unmasked.tolist() == [True, True, False, True]

    @pytest.mark.parametrize("act", [torch.tanh, nn.Tanh(), torch.sigmoid, nn.Sigmoid()])
    def test_crafted_input_saturates_everything(self, act):
        net, x_BTD = Net(act), torch.ones(3, 5, 2)
        with torch.no_grad():
            net.inner.weight.fill_(100)
        ((found, of),) = seen(net, x_BTD).saturated.values()
        assert int(found) == int(of) == 3 * 5 * 4
        with torch.no_grad():
            net.inner.weight.zero_()
            net.inner.bias.zero_()
        ((found, of),) = seen(net, x_BTD).saturated.values()
        assert (int(found), int(of)) == (0, 60)
        real_BT = is_real(torch.tensor([5, 1, 2]), 5)
        ((_, of),) = seen(net, x_BTD, real_BT).saturated.values()
        assert int(of) == 8 * 4

    def test_a_glu_by_its_gate(self):
        net = Net(F.glu)
        with torch.no_grad():
            net.inner.weight.zero_()
            net.inner.bias.copy_(torch.tensor([100.0, 100.0, 4.6, -4.5]))  # logit(.99) = 4.595
        ((place, (found, of)),) = seen(net, torch.randn(3, 5, 2)).saturated.items()
        assert place == "model gate"
        assert (int(found), int(of)) == (15, 30)

    def test_micro_batches_add_up(self):
        net, found = Net(F.relu), Activations()
        with torch.no_grad():
            net.inner.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 0], [1, 0]]))
            net.inner.bias.copy_(torch.tensor([0.0, 0, -1, 0]))
        for value in (1.0, -1.0):
            with observed(net, frozenset({""}), found):
                net(torch.full((1, 1, 2), value))
        assert found.alive["model relu"].tolist() == [True, True, False, True]
        assert found.extremes[""].tolist() == [0.0, 1.0]

    def test_passes_without_gradients_do_not_count(self):
        net = Net(F.relu)
        with torch.no_grad():
            assert not seen(net, torch.randn(1, 1, 2)).alive


def test_dead_units_of_a_transformer_equal_those_by_hand():
    config = experiment(MODELS["transformer"])
    model = built(config).train()
    layer = model.encoder[1].feed_forward
    with torch.no_grad():
        layer.inner.bias[:7] = -100.0
    kept: list[Tensor] = []
    handle = layer.inner.register_forward_hook(lambda _m, _i, out: kept.append(out.detach()))
    monitor, batch = Readings(model, every=1), batch_of(ROWS)
    with monitor.watching(1, batch_of(ROWS)):
        model(batch)
    handle.remove()
    metrics = monitor.take()
    real = is_real(batch.source_lengths_B, batch.source_BS.shape[1])
    dead = int((F.relu(kept[-1])[real] == 0).all(0).sum())
    place = monitor.history[0].functions["encoder.1.feed_forward relu"]
    assert place == {"dead": dead, "units": 24}
    assert dead >= 7
    of_all = monitor.history[0].functions.values()
    share = sum(p["dead"] for p in of_all) / sum(p["units"] for p in of_all)
    assert metrics["monitor/dead_share"] == pytest.approx(share)


def test_extremes_equal_those_by_hand():
    model = built(experiment(MODELS["transformer"])).train()
    kept: dict[str, Tensor] = {}
    for i, layer in enumerate(model.encoder):
        layer.register_forward_hook(lambda _m, _i, out, i=i: kept.update({f"encoder.{i}": out}))
    monitor = Readings(model, every=1)
    with monitor.watching(1, batch_of(ROWS)):
        model(batch_of(ROWS))
    monitor.take()
    layers = monitor.history[0].layers
    for name, out in kept.items():
        assert layers[name]["activation_min"] == pytest.approx(float(out.detach().min()))
        assert layers[name]["activation_max"] == pytest.approx(float(out.detach().max()))


def test_head_gates_may_be_closed():
    model = built(experiment(MODELS["gated"])).train()
    monitor = Readings(model, every=1)
    with monitor.watching(1, batch_of(ROWS)):
        model(batch_of(ROWS))
    monitor.take()
    assert not any("gates" in place or "sigmoid" in place for place in monitor.history[0].functions)


def test_places_of_the_zoo():
    found = {}
    for name in ("transformer", "lstm", "feeding", "gru_feeding", "conv", "rnn"):
        model = built(experiment(MODELS[name])).train()
        monitor = Readings(model, every=1)
        with monitor.watching(1, batch_of(ROWS)):
            model(batch_of(ROWS))
        monitor.take()
        found[name] = set(monitor.history[0].functions)
    blocks = [f"{side}.{i}" for side in ("encoder", "decoder") for i in range(2)]
    two_way = {f"encoder.layers.0.{way}.rnn gates" for way in ("ahead", "back")}
    assert found == {
        "transformer": {f"{block}.feed_forward relu" for block in blocks},
        "lstm": {"model tanh", *two_way, "decoder.0.rnn gates"},
        "feeding": {"model tanh", *two_way, "model gates"},
        "gru_feeding": {"model tanh", *two_way, "model sigmoid"},
        "conv": {f"{block} gate" for block in blocks},
        "rnn": {"encoder.0.ahead.rnn gates", "decoder.0.rnn gates"},
    }


def test_a_history_survives_a_checkpoint():
    config = experiment(MODELS["transformer"])
    model = built(config)
    monitor, other = Readings(model, every=2), Readings(model, every=2)
    trained(model, config, monitor)
    monitor.take()
    other.load_state_dict(monitor.state_dict())
    assert other.history == monitor.history
    assert len(other.history) == 3


def test_broken_gradients_are_told_as_they_are():
    model = built(experiment(MODELS["transformer"]))
    monitor = Readings(model, every=1)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    monitor.gradients(1)
    assert math.isnan(monitor.take()["monitor/gradient_norm"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["transformer", "lstm", "feeding", "gru_feeding", "conv"])
def test_nothing_waits_for_the_gpu_but_take(name):
    device = torch.device("cuda")
    config = experiment(MODELS[name])
    model = built(config).to(device).train()
    monitor, batch = Readings(model, every=1), batch_of(ROWS).to(device)
    objective = Objective(config.objective, model)
    optimizer = build_optimizer(objective, config.optim)
    is_real_BT = batch.is_real_BT
    for index in (1, 2):
        torch.cuda.set_sync_debug_mode("error" if index == 2 else "default")
        try:
            with monitor.watching(index, batch):
                states_BTD = model(batch)
            model.output.log_probs(states_BTD).masked_fill(
                ~is_real_BT[..., None], 0
            ).sum().backward()
            monitor.gradients(index)
            optimizer.step()
            monitor.updated(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert monitor.take()["monitor/gradient_norm"] > 0
