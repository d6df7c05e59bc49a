"""Encoder and decoder on two devices (methods.md 36), for every model of the zoo.

Without a GPU the decoder stands on torch's `meta` device: it computes shapes and no numbers, and
nothing can be copied away from it, so that every crossing is seen and none can be made up for.
"""

import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trainables
from tests.batches import pad_ids
from tests.trainables.variants import FORMS
from vinedresser.batch import Batch
from vinedresser.config import Compute, Decoding, Terms
from vinedresser.config.kinds import ZOO, ModelConfig, kind_class
from vinedresser.decode import beam_search, greedy
from vinedresser.errors import ConfigError, MachineError
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.nn.gates import head_gates
from vinedresser.objective import Objective
from vinedresser.special_ids import EOS
from vinedresser.training.device import resolve_device

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, META = torch.device("cpu"), torch.device("meta")
MODELS = [info.name for info in pkgutil.iter_modules(trainables.__path__)]


def build(name: str, features: int = 0, **changes) -> Seq2Seq:
    torch.manual_seed(0)
    variants = FORMS[name]
    config = kind_class(ZOO, name, ModelConfig)().override(
        {**next(iter(variants.values())), **changes}
    )
    return config.build(Vocabulary(0 if features else 13, 11, features=features)).eval()


def batch_of() -> Batch:
    source = pad_ids([[4, 5, 6, 7, EOS], [8, EOS], [9, 4, 4, EOS]])
    target = pad_ids([[6, 5, EOS], [7, 8, 9, 4, 5, 6, EOS], [10, EOS]])
    return Batch(*source, *target, torch.arange(3))


@pytest.fixture(autouse=True)
def _no_autocast_on_meta(monkeypatch):
    """Torch raises where the `meta` device is asked whether autocast is on."""
    real = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and real(kind)
    )


class Crossings(TorchDispatchMode):
    """Shapes of all copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.ndim]
        if isinstance(out, torch.Tensor) and any(t.device != out.device for t in tensors):
            self.found.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("features", [0, 6])
def test_only_the_memory_crosses(name, features):
    model = build(name, features).to_devices(encoder=CPU, decoder=META)
    assert model.device == META
    source, lengths = batch_of().source_BS, batch_of().source_lengths_B
    if features:
        source = torch.randn(*source.shape, features)
    inputs = batch_of().inputs_BT.to(META)
    with Crossings() as crossings:
        memory = model.encode(source, lengths)
    states = tuple(memory.states_BSD.shape)
    assert sorted(crossings.found) == sorted([states, states[:2]])
    assert memory.states_BSD.device == memory.is_real_BS.device == META
    with Crossings() as crossings:
        assert model.output.log_probs(model.decode(memory, inputs)).shape == (3, 7, 11)
        state = model.start(memory, 2)
        for t in range(2):
            states, state = model.step(state, inputs[:, t])
            log_probs, ids = model.output.best(states, 2)
            assert log_probs.shape == ids.shape == (3, 2)
            assert log_probs.device == ids.device == META
    assert not crossings.found


@pytest.mark.parametrize("name", MODELS)
def test_encode_uses_all_of_the_encoders_weights_and_no_other(name):
    """By gradients: exactly what is on the encoder's device has one."""
    model = build(name, tie="none") if name in ("transformer", "conv") else build(name)
    memory = model.encode(batch_of().source_BS, batch_of().source_lengths_B)
    (memory.states_BSD * torch.randn_like(memory.states_BSD)).sum().backward()
    used = {n for n, p in model.named_parameters() if p.grad is not None}
    model.to_devices(encoder=CPU, decoder=META)
    assert used == {n for n, p in model.named_parameters() if p.device == CPU}
    assert used
    assert len(used) < len(list(model.parameters()))
    assert all(b.device in (CPU, META) for b in model.buffers())


@pytest.mark.parametrize("name", MODELS)
def test_the_encoder_moves_as_a_whole(name):
    model = build(name).to_devices(encoder=META, decoder=CPU)
    assert model.device == CPU
    with pytest.raises(NotImplementedError, match="meta tensor"):  # the way back to numbers
        model.encode(batch_of().source_BS, batch_of().source_lengths_B)


@pytest.mark.parametrize("name", MODELS)
def test_one_device_is_as_it_was(name):
    batch = batch_of()
    plain, placed = build(name), build(name).to_devices(encoder=CPU, decoder=CPU)
    assert placed.devices is None
    with Crossings() as crossings:
        assert torch.equal(placed(batch), plain(batch))
    assert not crossings.found


def test_a_shared_embedding_cannot_be_on_two_devices():
    config = kind_class(ZOO, "transformer", ModelConfig)().override({"d_model": 32, "tie": "all"})
    model = config.build(Vocabulary(11, 11, joint=True))
    with pytest.raises(ConfigError, match=r"share the embedding; Fix: set model\.tie=output"):
        model.to_devices(encoder=CPU, decoder=META)
    assert {p.device for p in model.parameters()} == {CPU}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": {"encoder": "cuda:0", "decoder": "tpu"}}, "devices"),
        ({"devices": {"encoder": "cpu"}}, "decoder"),
        ({"devices": {"encoder": "cpu", "decoder": "cpu"}, "device": "cpu"}, "both set"),
        ({"devices": {"encoder": "cpu", "decoder": "cpu"}, "workers": 2}, "set workers to 1"),
        ({"gpus": 1.5}, "whole number"),
        ({"gpus": 1, "device": "cpu"}, "set gpus to 0"),
        ({"gpus": 0, "device": "cuda"}, "set gpus to auto"),
        ({"gpus": -1}, "gpus"),
    ],
)
def test_what_cannot_be_placed_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Compute.from_json(changes)


def test_devices_are_resolved_on_this_machine():
    both = {"encoder": "cpu", "decoder": "cpu"}
    where = resolve_device(Compute.from_json({"devices": both}))
    assert (where.encoder_device, where.primary) == (CPU, CPU)
    assert resolve_device(Compute(device="cpu")).encoder_device == CPU
    far = Compute.from_json({"devices": {**both, "encoder": "cuda:99"}})
    assert far.cuda_devices == 100
    with pytest.raises(MachineError, match=r"compute\.devices names cuda:99"):
        resolve_device(far)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sides", [("cuda:0", "cpu"), ("cpu", "cuda:0")], ids=str)
def test_outputs_and_gradients_are_the_same_on_two_devices(name, sides):
    kinds = ["enc_self", "dec_self", "dec_enc"]
    changes = {"concrete_heads": kinds} if name == "transformer" else {}
    one, two = build(name, **changes), build(name, **changes)
    encoder, decoder = (torch.device(side) for side in sides)
    two.to_devices(encoder=encoder, decoder=decoder)
    found = []
    for model in (one, two):
        batch = batch_of().to(model.device)
        weight = 0.1 if head_gates(model) else 0.0
        terms = Terms.from_json({"head_penalty": {"weight": weight}})
        nats, loss = Objective(terms, model)(batch, batch.tokens, step=1, seed=0)
        loss.backward()
        grads = [p.grad.cpu() for p in model.parameters()]
        ids = greedy(model, batch.source_BS, batch.source_lengths_B, cap=8).ids
        beams = beam_search(
            model,
            batch.source_BS,
            batch.source_lengths_B,
            Decoding(beam=3, length_alpha=0.6),
            cap=8,
        ).ids
        found.append((model(batch).detach().cpu(), float(nats), grads, ids, beams))
    (wanted, nats, grads, *ids), (states, others, theirs, *other_ids) = found
    torch.testing.assert_close(states, wanted, atol=1e-4, rtol=0)
    assert others == pytest.approx(nats, rel=1e-5)
    torch.testing.assert_close(theirs, grads, atol=1e-3, rtol=1e-3)
    assert ids == other_ids
