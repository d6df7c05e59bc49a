"""What only the Transformer promises (methods.md 47, 50-58, 86, 87)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.batches import pad_ids
from trainables.transformer import (
    PRESETS,
    DecoderLayer,
    EncoderLayer,
    FeedForward,
    Transformer,
    TransformerConfig,
)
from vinedresser.batch import Batch
from vinedresser.errors import ConfigError, TrainingError
from vinedresser.model import Vocabulary
from vinedresser.nn.gates import head_gates
from vinedresser.nn.norms import BatchNorm
from vinedresser.nn.positions import sinusoids
from vinedresser.objective import target_nll
from vinedresser.objectives.likelihood import mixed_inputs
from vinedresser.pruning.heads import compact
from vinedresser.pruning.parity import certify
from vinedresser.special_ids import EOS

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


def on_meta(config: TransformerConfig, vocabulary: Vocabulary) -> Transformer:
    """A model of any size that takes no memory."""
    with torch.device("meta"):
        return config.build(vocabulary)


def test_parameter_counts_of_the_stacks_and_the_whole():
    joint = Vocabulary(37_000, 37_000, joint=True)
    post = on_meta(VASWANI.override({"tie": "all"}), joint)
    assert count(post.encoder) == 18_914_304
    assert count(post.decoder) == 25_224_192
    assert post.output.weight.numel() == 18_944_000
    with torch.device("meta"):
        theirs = count(nn.Transformer(batch_first=True))
    assert theirs == 44_140_544
    pre = on_meta(VASWANI.override({"tie": "all", "norm": "pre"}), joint)
    # torch norms after both stacks in either order, as pre-norm does here.
    assert count(pre) - 18_944_000 - 37_000 == theirs
    assert count(pre) - 37_000 == 63_084_544  # 37,000: the bias of the output layer


@pytest.mark.parametrize(
    ("preset", "size", "tie", "parameters"),
    [
        ("transformer-tiny", 8_000, "output", 2_982_208),
        ("transformer-tiny", 37_000, "all", 5_699_208),
        ("transformer-small", 8_000, "all", 7_586_624),
        ("transformer-small", 37_000, "output", 24_511_624),
        ("transformer-base", 8_000, "output", 52_340_544),
        ("transformer-base", 37_000, "all", 63_121_544),
        ("transformer-big", 8_000, "all", 184_561_472),
        ("transformer-big", 37_000, "output", 252_174_472),
    ],
)
def test_parameter_counts_of_the_presets(preset, size, tie, parameters):
    config = TransformerConfig().override({**PRESETS[preset], "tie": tie})
    assert count(on_meta(config, Vocabulary(size, size, joint=True))) == parameters


def test_ties_share_storage_and_save_parameters():
    vocabulary, sizes = Vocabulary(100, 100, joint=True), {}
    for tie in ("none", "output", "all"):
        model = SMALL.override({"tie": tie}).build(vocabulary)
        sizes[tie] = count(model)
        assert (model.output.weight is model.target_embedding.weight) == (tie != "none")
        assert (model.source_embedding.table is model.target_embedding) == (tie == "all")
    assert sizes["none"] - sizes["output"] == sizes["output"] - sizes["all"] == 100 * 32


def test_all_tied_needs_a_joint_vocabulary():
    with pytest.raises(ValueError, match="joint vocabulary"):
        SMALL.override({"tie": "all"}).build(Vocabulary(9, 9))


def test_post_norm_output_is_standardised():
    torch.manual_seed(0)
    layer = EncoderLayer(SMALL.override({"norm": "post"}), 0).eval()
    out = layer(5 + 3 * torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    deviation = out.std(-1, correction=0)
    torch.testing.assert_close(deviation, torch.ones(2, 6), atol=1e-4, rtol=0)


def copy_attention(theirs: nn.MultiheadAttention, ours) -> None:
    parts = [ours.query, ours.key_value] if ours.is_cross else [ours.query_key_value]
    theirs.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    theirs.out_proj.load_state_dict(ours.output.state_dict())


def as_torch(ours: Transformer) -> nn.Transformer:
    """torch.nn.Transformer with our weights; post-norm has no norms after the stacks here."""
    config, is_pre = ours.config, ours.config.norm == "pre"
    theirs = nn.Transformer(
        config.d_model,
        config.num_heads,
        config.encoder_layers,
        config.decoder_layers,
        config.d_ff,
        dropout=0.0,
        activation=config.activation,
        batch_first=True,
        norm_first=is_pre,
    )
    theirs.encoder.norm = copy.deepcopy(ours.encoder_norm) if is_pre else None
    theirs.decoder.norm = copy.deepcopy(ours.decoder_norm) if is_pre else None
    for layer, wanted in zip(ours.encoder, theirs.encoder.layers, strict=True):
        copy_attention(wanted.self_attn, layer.enc_self)
        norms = [layer.self_residual.norm, layer.feed_forward.residual.norm]
        copy_rest(layer, wanted, norms)
    for layer, wanted in zip(ours.decoder, theirs.decoder.layers, strict=True):
        copy_attention(wanted.self_attn, layer.dec_self)
        copy_attention(wanted.multihead_attn, layer.dec_enc)
        norms = [r.norm for r in (layer.self_residual, layer.cross_residual)]
        copy_rest(layer, wanted, [*norms, layer.feed_forward.residual.norm])
    return theirs


def copy_rest(layer, theirs, norms) -> None:
    theirs.linear1.load_state_dict(layer.feed_forward.inner.state_dict())
    theirs.linear2.load_state_dict(layer.feed_forward.outer.state_dict())
    for number, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())


def embedded(model: Transformer, ids: Tensor) -> Tensor:
    """Tokens and positions by the textbook, without the model's own method."""
    table = sinusoids(ids.shape[1], model.config.d_model)
    return model.target_embedding(ids) * model.config.d_model**0.5 + table


# torch says that norm_first keeps it from its own inference path.
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equals_torch_with_the_same_weights(norm, activation):
    torch.manual_seed(0)
    changes = {"norm": norm, "activation": activation, "tie": "all", "attention_dropout": 0}
    model = SMALL.override(changes).build(Vocabulary(11, 11, joint=True))
    for name, parameter in model.named_parameters():  # biases and norms as after training
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    theirs = as_torch(model).train()  # in eval mode torch takes another, fused way
    source_BS, lengths_B = pad_ids([[4, 5, 6, 7, EOS], [8, EOS], [9, 4, 4, EOS]])
    inputs_BT = torch.tensor([[1, 6, 5, 0], [1, 7, 8, 9], [1, 10, 0, 0]])
    padding_BS, padding_BT = source_BS == 0, inputs_BT == 0
    memory = model.encode(source_BS, lengths_B)
    states = model.decode(memory, inputs_BT)
    wanted = theirs(
        embedded(model, source_BS),
        embedded(model, inputs_BT),
        tgt_mask=torch.ones(4, 4, dtype=torch.bool).triu(1),
        src_key_padding_mask=padding_BS,
        tgt_key_padding_mask=padding_BT,
        memory_key_padding_mask=padding_BS,
    )
    real = ~padding_BT
    torch.testing.assert_close(states[real], wanted[real], atol=1e-5, rtol=0)
    found, expected = (
        torch.autograd.grad(out[real].square().sum(), model.target_embedding.weight)[0]
        for out in (states, wanted)
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradient_reaches_the_first_of_twelve_layers(norm):
    """Methods.md 59: residual connections carry it."""
    torch.manual_seed(0)
    deep = SMALL.override({"norm": norm, "encoder_layers": 12, "decoder_layers": 12})
    model = deep.build(Vocabulary(11, 11))
    batch = batch_of()
    target_nll(model, model(batch), batch).mean.backward()
    for stack in (model.encoder, model.decoder):
        norms = [
            float(nn.utils.get_total_norm([p.grad for p in layer.parameters()])) for layer in stack
        ]
        assert norms[0] > 1e-3 * norms[-1] > 0


def batch_of() -> Batch:
    source = pad_ids([[4, 5, 6, 7, EOS], [8, EOS], [9, 4, 4, EOS]])
    target = pad_ids([[6, 5, EOS], [7, 8, 9, 4, 5, 6, EOS], [10, EOS]])
    return Batch(*source, *target, torch.arange(3))


class TestEmbeddings:
    def by_hand(self, changes):
        model = SMALL.override({"encoder_layers": 1, **changes}).build(Vocabulary(11, 11)).eval()
        seen = []
        model.encoder[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model.encode(torch.tensor([[4, 5, 2]]), torch.tensor([3]))
        return model, model.source_embedding.table.weight[[4, 5, 2]], seen[0][0]

    def test_scaled_by_the_root_of_the_width(self):
        _, table, found = self.by_hand({})
        torch.testing.assert_close(found, table * 32**0.5 + sinusoids(3, 32))
        _, table, found = self.by_hand({"rescale_emb": False, "positions": "none"})
        assert torch.equal(found, table)

    def test_bias_of_the_source(self):
        torch.manual_seed(0)
        model, *_ = self.by_hand({"inp_emb_bias": True, "positions": "none"})
        assert model.source_bias.tolist() == [0.0] * 32
        plain = model.encode(torch.tensor([[4, 2]]), torch.tensor([2])).states_BSD
        nn.init.normal_(model.source_bias)
        assert not torch.equal(
            model.encode(torch.tensor([[4, 2]]), torch.tensor([2])).states_BSD, plain
        )
        assert count(model) - count(self.by_hand({"positions": "none"})[0]) == 32

    def test_positions_are_told_apart(self):
        """Without positions the encoder is blind to order (methods.md 57)."""
        ids, other = torch.tensor([[4, 5, 6, 2]]), torch.tensor([[5, 4, 6, 2]])
        for kind in ("sinusoidal", "learned", "one_hot", "none"):
            torch.manual_seed(0)
            model = SMALL.override({"positions": kind}).build(Vocabulary(11, 11)).eval()
            last = [model.encode(s, torch.tensor([4])).states_BSD[0, -1] for s in (ids, other)]
            assert torch.allclose(*last, atol=1e-6) == (kind == "none")


class TestFrames:
    VOCABULARY = Vocabulary(0, 11, features=5)

    @pytest.mark.parametrize("kind", ["none", "conv", "pool", "concat"])
    def test_frames_through_a_front_end(self, kind):
        torch.manual_seed(0)
        config = SMALL.override({"subsampling": {"kind": kind}})
        model = config.build(self.VOCABULARY).eval()
        frames, lengths = torch.randn(2, 13, 5), torch.tensor([13, 6])
        memory = model.encode(frames, lengths)
        wanted = [13, 6] if kind == "none" else [4, 2]
        assert memory.is_real_BS.sum(1).tolist() == wanted
        alone = model.encode(frames[1:, :6], lengths[1:])
        real = memory.is_real_BS[1]
        torch.testing.assert_close(
            memory.states_BSD[1, real], alone.states_BSD[0], atol=1e-6, rtol=0
        )
        found = model.output.log_probs(model.decode(memory, torch.tensor([[1, 4], [1, 5]])))
        assert found.shape == (2, 2, 11)

    def test_all_tied_is_refused(self):
        with pytest.raises(ValueError, match="no table to tie"):
            SMALL.override({"tie": "all"}).build(Vocabulary(0, 11, joint=True, features=5))


class TestBatchNorm:
    CONFIG = SMALL.override({"norm_kind": "batch", "attention_dropout": 0})

    def test_one_sentence_is_refused_in_training_only(self):
        model = self.CONFIG.build(Vocabulary(11, 11))
        one = Batch(*pad_ids([[4, EOS]]), *pad_ids([[5, EOS]]), torch.arange(1))
        with pytest.raises(TrainingError, match="one sentence"):
            model(one)
        assert model.eval()(one).isfinite().all()

    def test_padding_has_no_part_in_the_statistics(self):
        """Longer padding moves nothing, in training either."""
        torch.manual_seed(0)
        model, batch = self.CONFIG.build(Vocabulary(11, 11)), batch_of()
        wider = Batch(
            F.pad(batch.source_BS, (0, 4)),
            batch.source_lengths_B,
            F.pad(batch.target_BT, (0, 4)),
            batch.target_lengths_B,
            batch.rows_B,
        )
        other, real = copy.deepcopy(model), batch.is_real_BT
        states = model(batch)
        torch.testing.assert_close(other(wider)[:, :7][real], states[real], atol=1e-5, rtol=0)
        for name, statistic in model.named_buffers():
            torch.testing.assert_close(dict(other.named_buffers())[name], statistic)
        assert sum(isinstance(m, BatchNorm) for m in model.modules()) == 2 * 2 + 2 * 3 + 2

    def test_scheduled_sampling_may_feed_ends_and_padding(self):
        torch.manual_seed(0)
        model, batch = self.CONFIG.build(Vocabulary(11, 11)), batch_of()
        memory = model.encode(batch.source_BS, batch.source_lengths_B)
        inputs = mixed_inputs(model, memory, batch, teacher_forcing_ratio=0.0)
        inputs[:, 1] = EOS
        loss = target_nll(model, model.decode(memory, inputs), batch)
        assert loss.mean.isfinite()


@pytest.mark.parametrize("values", ["low_rank", "none"])
def test_reduced_values_are_pruned_as_full_ones_are(values):
    torch.manual_seed(0)
    config = SMALL.override(
        {"values": values, "concrete_heads": ["enc_self", "dec_self", "dec_enc"]}
    )
    vocabulary = Vocabulary(11, 11)
    model = config.build(vocabulary).eval()
    for gate in head_gates(model):
        gate.log_alpha.data = torch.randn(4) * 4
    gates = torch.cat([g.deterministic() for g in head_gates(model)])
    assert ((gates > 0) & (gates < 1)).any()
    assert (gates == 0).any()
    smaller_config, smaller = compact(model, config, vocabulary)
    parity = certify(model, smaller, iter([batch_of()]), cap=10)
    assert parity.max_abs < 1e-5
    assert parity.is_same_output
    assert count(smaller) < count(model)
    # As the configuration alone builds it.
    rebuilt = smaller_config.build(vocabulary).eval()
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt(batch_of()), smaller(batch_of()))


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
        ({"values": "none", "num_heads": 5, "head_dim": 8}, "no multiple"),
        ({"value_rank": 4}, "value_rank is of values: low_rank, values is full"),
        ({"values": "low_rank", "value_rank": 33}, "over d_model 32"),
        ({"norm_kind": "group"}, "norm_kind"),
        ({"activation": "tanh"}, "activation"),
        ({"positions": "constant"}, "positions"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.override(changes)


def test_one_table_for_two_vocabularies_is_a_users_mistake():
    with pytest.raises(ConfigError, match="model: tie: all needs a joint vocabulary"):
        VASWANI.override({"tie": "all"}).instantiate(Vocabulary(5, 6))
