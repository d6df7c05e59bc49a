"""What only the convolutional model promises (methods.md 60; Gehring et al. 2017)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.batches import pad_ids
from tests.trainables.variants import CONV
from trainables.conv import Attention, ConvConfig, DecoderLayer, EncoderLayer, Source
from vinedresser.batch import Batch, is_real
from vinedresser.errors import ConfigError
from vinedresser.model import Memory, Vocabulary
from vinedresser.objective import target_nll
from vinedresser.special_ids import EOS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

SMALL = ConvConfig(d_model=32, encoder_layers=2, decoder_layers=3, dropout=0)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def a_source(*, rows: int = 2, S: int = 6, d: int = 32) -> Source:
    mask_BS = is_real(torch.tensor([S, 2])[:rows], S)
    return Source.of(Memory(torch.randn(rows, S, 2 * d), mask_BS))


def test_parameter_counts_of_a_layer():
    config, d = ConvConfig(), 256
    gated = 3 * d * 2 * d + 2 * d + 2 * d  # directions, gains, biases
    assert count(EncoderLayer(config)) == gated == 394_240
    assert count(DecoderLayer(config)) == gated + 2 * (d * d + 2 * d) == 526_336
    plain = config.override({"weight_norm": False})
    assert count(EncoderLayer(config)) - count(EncoderLayer(plain)) == 2 * d
    model = config.build(Vocabulary(0, 10, features=5))
    assert count(model.encoder) + count(model.decoder) == 6 * (394_240 + 526_336) == 5_523_456


@torch.no_grad()
def test_encoder_layer_by_hand():
    torch.manual_seed(0)
    layer, x_BSD = EncoderLayer(SMALL), torch.randn(1, 5, 32)
    weight = layer.convolution.weight().view(64, 3, 32).transpose(1, 2)
    both = F.conv1d(x_BSD.transpose(1, 2), weight, padding=1).transpose(1, 2)
    wanted = (x_BSD + both[..., :32] * torch.sigmoid(both[..., 32:])) / math.sqrt(2)
    found = layer(x_BSD, torch.ones(1, 5, 1, dtype=torch.bool))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_attention_by_a_naive_loop():
    torch.manual_seed(0)
    attend, h, g = Attention(SMALL), torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    source, lengths = a_source(), [6, 2]
    found = attend(h, g, source)
    for b, m in enumerate(lengths):
        for t in range(4):
            query = (attend.query(h[b, t]) + g[b, t]) * math.sqrt(0.5)
            scores = torch.stack([query @ source.keys_BSD[b, s] for s in range(m)])
            mean = (scores.softmax(0)[:, None] * source.values_BSD[b, :m]).sum(0)
            wanted = attend.output(mean * math.sqrt(m))
            torch.testing.assert_close(found[b, t], wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_values_are_keys_plus_embeddings():
    model = SMALL.build(Vocabulary(20, 20)).eval()
    ids = torch.tensor([[5, 6, 7, EOS]])
    memory = model.encode(ids, torch.tensor([4]))
    keys, values = memory.states_BSD.chunk(2, -1)
    embedded = model.source_positions(model.source_embedding(ids, torch.tensor([4])))
    torch.testing.assert_close(values, (keys + embedded) * math.sqrt(0.5), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_decoder_layer_sees_its_window_and_nothing_else():
    torch.manual_seed(0)
    layer = DecoderLayer(SMALL.override({"kernel": 4}))
    x, g, source = torch.randn(2, 9, 32), torch.randn(2, 9, 32), a_source()
    before = layer(x, g, source)
    for t in range(9):
        changed = x.clone()
        changed[:, t] += 1
        moved = (layer(changed, g, source) - before).abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [t <= i < t + 4 for i in range(9)]


def test_every_decoder_layer_attends():
    model = SMALL.build(Vocabulary(20, 20))
    batch = Batch(
        *pad_ids([[5, 6, EOS], [7, EOS]]), *pad_ids([[4, EOS], [5, EOS]]), torch.arange(2)
    )
    found = model.attention(batch)
    assert list(found) == [f"decoder.{i}.attention" for i in range(3)]
    for weights_BHTS in found.values():
        assert weights_BHTS.shape == (2, 1, 2, 3)
        torch.testing.assert_close(weights_BHTS.sum(-1), torch.ones(2, 1, 2))
        assert not weights_BHTS[1, :, :, 2].any()


def test_the_encoder_gets_the_mean_of_the_layers_gradients(monkeypatch):
    model = SMALL.build(Vocabulary(20, 20))
    batch = Batch(*pad_ids([[5, 6, EOS]]), *pad_ids([[4, EOS]]), torch.arange(1))

    def gradient() -> torch.Tensor:
        model.zero_grad()
        target_nll(model, model(batch), batch).total.backward()
        return model.encoder[-1].convolution.bias.grad.clone()

    scaled = gradient()
    monkeypatch.setattr("trainables.conv.scale_gradient", lambda x, _: x)
    torch.testing.assert_close(scaled, gradient() / 3)


@torch.no_grad()
def test_a_fresh_layer_keeps_the_variance():
    torch.manual_seed(0)
    layer = EncoderLayer(SMALL.override({"d_model": 256}))
    x_BSD = torch.randn(4, 50, 256)
    gated = F.glu(layer.convolution(torch.randn(200, 768)))
    # Var(a sigmoid(b)) >= Var(a) / 4 for a, b of variance 4; sigmoid's spread makes it larger.
    assert 1.0 < float(gated.var()) < 2.0
    found = layer(x_BSD, torch.ones(4, 50, 1, dtype=torch.bool))
    assert 0.9 < float(found.var()) < 1.6


@pytest.mark.parametrize("kind", ["none", "conv", "pool", "concat"])
def test_frames_of_any_length(kind):
    torch.manual_seed(0)
    config = SMALL.override({"subsampling": {"kind": kind}})
    model = config.build(Vocabulary(0, 12, features=9)).eval()
    frames, lengths = torch.randn(3, 101, 9), torch.tensor([101, 100, 1])
    memory = model.encode(frames, lengths)
    wanted = [101, 100, 1] if kind == "none" else [26, 25, 1]
    assert memory.is_real_BS.sum(1).tolist() == wanted
    inputs = torch.tensor([[1, 4, 5]] * 3)
    states = model.decode(memory, inputs)
    for i, length in enumerate(lengths.tolist()):
        alone = model.encode(frames[i : i + 1, :length], lengths[i : i + 1])
        found = model.decode(alone, inputs[:1])
        torch.testing.assert_close(found[0], states[i], atol=1e-5, rtol=0)


def test_variants_have_every_subsampling():
    kinds = {SMALL.override(changes).subsampling.kind for changes in CONV.values()}
    assert kinds == {"none", "conv", "pool", "concat"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernal": 3}, "did you mean kernel"),
        ({"kernel": 0}, "kernel"),
        ({"encoder_layer": 3}, "did you mean encoder_layers"),
        ({"subsampling.kind": "stride"}, "subsampling"),
        ({"dropout": 1.0}, "dropout"),
        ({"tie": "all"}, "tie"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.override(changes)
