"""What only the Transformer promises (methods.md 47, 50-58, 86, 87)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainables.transformer import (
    DecoderLayer,
    EncoderLayer,
    FeedForward,
    Transformer,
    TransformerConfig,
)
from vinedresser.errors import ConfigError
from vinedresser.model import Vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

VASWANI = TransformerConfig(
    d_model=512, d_ff=2048, num_heads=8, encoder_layers=6, decoder_layers=6, norm="post"
)
SMALL = TransformerConfig(d_model=32, d_ff=64, encoder_layers=2, decoder_layers=2, dropout=0)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_base_model():
    assert count(FeedForward(VASWANI)) - count(nn.LayerNorm(512)) == 2_099_712
    assert count(EncoderLayer(VASWANI, 0)) == 3_152_384
    assert count(DecoderLayer(VASWANI, 0)) == 4_204_032


def test_ties_share_storage_and_save_parameters():
    vocabulary, sizes = Vocabulary(100, 100, joint=True), {}
    for tie in ("none", "output", "all"):
        model = SMALL.override({"tie": tie}).build(vocabulary)
        sizes[tie] = count(model)
        assert (model.output.weight is model.target_embedding.weight) == (tie != "none")
        assert (model.source_embedding is model.target_embedding) == (tie == "all")
    assert sizes["none"] - sizes["output"] == sizes["output"] - sizes["all"] == 100 * 32


def test_all_tied_needs_a_joint_vocabulary():
    with pytest.raises(ValueError, match="joint vocabulary"):
        SMALL.override({"tie": "all"}).build(Vocabulary(9, 9))


def test_post_norm_output_is_standardised():
    torch.manual_seed(0)
    layer = EncoderLayer(SMALL.override({"norm": "post"}), 0).eval()
    out = layer(5 + 3 * torch.randn(2, 6, 32), torch.zeros(2, 1, 1, 6, dtype=torch.bool))
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    deviation = out.std(-1, correction=0)
    torch.testing.assert_close(deviation, torch.ones(2, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_feed_forward_by_hand(norm):
    torch.manual_seed(0)
    block = FeedForward(SMALL.override({"norm": norm})).eval()
    x = torch.randn(2, 5, 32)

    def inside(h):
        return block.outer(F.relu(block.inner(h)))

    def normed(h):
        return F.layer_norm(h, (32,))

    wanted = x + inside(normed(x)) if norm == "pre" else normed(x + inside(x))
    torch.testing.assert_close(block(x), wanted)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(block(x)[:, shuffled], block(x[:, shuffled]))


def test_source_keys_and_values_are_computed_once(monkeypatch):
    model = SMALL.build(Vocabulary(9, 9)).eval()
    memory = model.encode(torch.tensor([[4, 2]]), torch.tensor([2]))
    calls = []
    for layer in model.decoder:
        layer.dec_enc.key_value.register_forward_hook(lambda *_: calls.append(1))
    state = model.start(memory, 5)
    for _ in range(5):
        _, state = model.step(state, torch.tensor([4]))
    assert len(calls) == SMALL.decoder_layers


def test_head_removal_never_changes_the_head_dimension():
    config = SMALL.override({"alive_heads": {"enc_self": [[1, 0, 0, 0], [0, 0, 0, 0]]}})
    model = config.build(Vocabulary(9, 9))
    assert isinstance(model, Transformer)
    assert [layer.enc_self.head_dim for layer in model.encoder] == [8, 8]
    assert [layer.enc_self.num_heads for layer in model.encoder] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concrete_heads": ["encoder"]}, "concrete_heads"),
        ({"alive_heads": {"enc-self": [[1, 1, 1, 1]] * 2}}, "enc"),
        (
            {"concrete_heads": ["dec_enc"], "alive_heads": {"dec_enc": [[1, 1, 1, 1]] * 2}},
            "both in concrete_heads and in alive_heads",
        ),
        ({"alive_heads": {"enc_self": [[1, 1, 1, 1]]}}, "not 2 layers of 4 heads"),
        ({"alive_heads": {"enc_self": [[1, 1, 1]] * 2}}, "not 2 layers of 4 heads"),
        ({"alive_heads": {"enc_self": [[1, 1, 1, 2]] * 2}}, "alive_heads"),
        ({"num_heads": 5}, "no multiple"),
        ({"d_model": 33, "head_dim": 8}, "odd"),
        ({"dropout": 1.0}, "dropout"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.override(changes)
