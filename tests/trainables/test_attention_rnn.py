"""What only the attention RNN promises (methods.md 26, 29, 40-46)."""

import pytest
import torch
from torch import Tensor

from tests.batches import pad_ids
from tests.trainables.variants import ATTENTION_RNN
from trainables.attention_rnn import PRESETS, AttentionRnn, AttentionRnnConfig
from vinedresser.batch import Batch
from vinedresser.config import Decoding
from vinedresser.decode import beam_search
from vinedresser.errors import ConfigError
from vinedresser.model import Vocabulary
from vinedresser.nn.record import recording
from vinedresser.special_ids import EOS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = AttentionRnnConfig(width=12, encoder_units=6, dropout=0)
SOURCE = [[4, 5, 6, 7, EOS], [8, EOS], [9, 4, 4, EOS]]
TARGET = [[6, 5, EOS], [7, 8, 9, 4, 5, 6, EOS], [10, EOS]]
ORDERS = {
    "luong": {},
    "feeding": {"input_feeding": True},
    "bahdanau": {"order": "bahdanau"},
}


def build(seed: int = 0, **changes: object) -> AttentionRnn:
    torch.manual_seed(seed)
    return SMALL.override(changes).build(Vocabulary(13, 11)).eval()


def batch_of(source: list[list[int]], target: list[list[int]]) -> Batch:
    return Batch(*pad_ids(source), *pad_ids(target), torch.arange(len(source)))


BATCH = batch_of(SOURCE, TARGET)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def by_hand(model: AttentionRnn, batch: Batch) -> Tensor:
    """Attentional states (B, T, D) of one LSTM layer with score `general`, as the papers say it.

    Every product is taken where the formula has it: autograd's own gradients, no shortcut.
    """
    config, memory = model.config, model.encode(batch.source_BS, batch.source_lengths_B)
    states, real = memory.states_BSD, memory.is_real_BS
    half, last = states.shape[-1] // 2, real.sum(1) - 1
    ends = torch.cat([states[torch.arange(len(last)), last, :half], states[:, 0, half:]], -1)
    h, c = torch.tanh(model.bridge(ends)).chunk(2, -1)
    W, U, b, inner = model.decoder[0].parameters()
    embedded = model.target_embedding(batch.inputs_BT) * model.scale
    a, found = torch.zeros_like(h), []

    def attend(query: Tensor) -> Tensor:
        scores = torch.einsum("bd,bsd->bs", query, states @ model.attend.score.key.weight.t())
        weights = scores.masked_fill(~real, -torch.inf).softmax(-1)
        return torch.einsum("bs,bsm->bm", weights, states)

    for t in range(embedded.shape[1]):
        read = [embedded[:, t]]
        if config.order == "bahdanau":
            context = attend(h)
            read.append(context)
        elif config.input_feeding:
            read.append(a)
        i, f, g, o = (torch.cat(read, -1) @ W.t() + b + h @ U.t() + inner).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if config.order == "luong":
            context = attend(h)
        a = torch.tanh(model.from_state(h) + model.from_context(context))
        found.append(a)
    return torch.stack(found, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_states_and_gradients_equal_the_papers_formulas(order):
    model = build(**ORDERS[order]).double()
    weights = torch.arange(1.0, 1 + 3 * 7 * 12, dtype=torch.float64).view(3, 7, 12).sin()
    found, wanted = model(BATCH), by_hand(model, BATCH)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    parameters = [p for name, p in model.named_parameters() if "output" not in name]
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), parameters),
        torch.autograd.grad((wanted * weights).sum(), parameters),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
        assert other.any()


def test_input_feeding_adds_a_states_width_of_weights_and_changes_the_states():
    plain, feeding = build(), build(input_feeding=True)
    assert count(feeding) - count(plain) == 4 * 12 * 12
    kept = {k: v for k, v in feeding.state_dict().items() if "weight_ih" not in k}
    plain.load_state_dict(kept, strict=False)
    found, without = feeding(BATCH), plain(BATCH)
    with torch.no_grad():  # nothing is fed before the first step
        plain.decoder[0].rnn.weight_ih_l0.copy_(feeding.decoder[0].rnn.weight_ih_l0[:, :12])
        plain.encoder.load_state_dict(feeding.encoder.state_dict())
        without = plain(BATCH)
    torch.testing.assert_close(found[:, 0], without[:, 0])
    assert (found[:, 1] - without[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("form", ATTENTION_RNN)
@torch.no_grad()
def test_attention_is_reported_whole_and_step_by_step(form):
    torch.manual_seed(0)
    model = AttentionRnnConfig().override(ATTENTION_RNN[form]).build(Vocabulary(13, 11))
    weights = model.attention(BATCH)
    assert list(weights) == ["attend"]
    model.eval()
    memory = model.encode(BATCH.source_BS, BATCH.source_lengths_B)
    positions = model.config.subsampling.reduced(model.config.subsampling.reduced(torch.tensor(5)))
    assert weights["attend"].shape == (3, 1, 7, positions)
    torch.testing.assert_close(weights["attend"].sum(-1), torch.ones(3, 1, 7))
    hidden_BHTS = ~memory.is_real_BS[:, None, None].expand_as(weights["attend"])
    assert hidden_BHTS.any() or positions == 1
    assert (weights["attend"][hidden_BHTS] == 0).all()
    state = model.start(memory, 7)
    with recording() as found:
        for t in range(7):
            _, state = model.step(state, BATCH.inputs_BT[:, t])
    stepwise = torch.cat([weights_BHTS for _, weights_BHTS in found], 2)
    torch.testing.assert_close(stepwise, weights["attend"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_dropout_in_training_only(order):
    model = build(dropout=0.3, **ORDERS[order])
    quiet = model(BATCH)
    assert torch.equal(model(BATCH), quiet)
    model.train()
    assert (model(BATCH) == 0).float().mean() > 0.2  # of what the output layer reads
    one, other = model(BATCH), model(BATCH)
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(BATCH), quiet)


@pytest.mark.parametrize("order", ORDERS)
def test_beam_search_encodes_a_source_once(order):
    model, calls = build(**ORDERS[order]), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.attend.score.key.register_forward_hook(lambda *_: calls.append(2))
    beam_search(
        model, BATCH.source_BS, BATCH.source_lengths_B, Decoding(beam=3, length_alpha=1), cap=20
    )
    assert calls == [1, 2]


def test_an_lstm_has_four_thirds_of_the_recurrent_parameters_of_a_gru():
    for changes in ({}, {"input_feeding": True}, {"order": "bahdanau", "decoder_layers": 2}):
        sizes = {}
        for cell in ("lstm", "gru"):
            model = build(cell=cell, **changes)
            sizes[cell] = count(model.decoder) + count(model.encoder)
        assert 3 * sizes["lstm"] == 4 * sizes["gru"]


def test_tie_shares_the_target_embedding():
    tied, untied = build(), build(tie="none")
    assert tied.output.weight is tied.target_embedding.weight
    assert count(untied) - count(tied) == 11 * 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "dot", "encoder_units": 7}, r"score dot .* have 12, encoder states 14.*Fix: "),
        ({"score": "cosine", "bidirectional": False}, r"12, encoder states 6 .*Fix: "),
        ({"order": "bahdanau", "input_feeding": True}, r"order bahdanau feeds .*Fix: "),
        ({"subsampling.kind": "pool"}, r"2 reductions need more than 1 encoder layers.*Fix: "),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        SMALL.override(changes)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("frames", [1, 7, 64, 65])
@torch.no_grad()
def test_the_listener_reads_frames_and_leaves_an_eighth(frames):
    config = AttentionRnnConfig().override(PRESETS["listener"])
    small = config.override({"width": 16, "encoder_units": 8})
    torch.manual_seed(0)
    model = small.build(Vocabulary(0, 11, features=5)).eval()
    lengths = torch.tensor([frames, max(1, frames - 3)])
    memory = model.encode(torch.randn(2, frames, 5), lengths)
    assert memory.states_BSD.shape[:2] == (2, -(-frames // 8))
    assert memory.is_real_BS.sum(1).tolist() == [-(-n // 8) for n in lengths.tolist()]
    assert model.decode(memory, torch.ones(2, 3, dtype=torch.int64)).shape == (2, 3, 16)


def test_presets_are_configurations():
    assert AttentionRnnConfig().override(PRESETS["rnn-small"]).input_feeding
    listener = AttentionRnnConfig().override(PRESETS["listener"])
    assert listener.subsampling.reductions == 3
