"""What only the RNN without attention promises (methods.md 39, 46)."""

import itertools
import random

import pytest
import torch
from torch import nn

from tests.batches import pad_ids
from trainables.rnn import Rnn, RnnConfig
from vinedresser.batch import Batch
from vinedresser.config import Decoding
from vinedresser.decode import beam_search, greedy
from vinedresser.model import Memory, Vocabulary
from vinedresser.objective import target_nll
from vinedresser.special_ids import EOS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = RnnConfig(width=12, encoder_units=12, dropout=0)
SOURCE = [[4, 5, 6, 7, EOS], [8, EOS], [9, 4, 4, EOS]]
TARGET = [[6, 5, EOS], [7, 8, 9, 4, 5, 6, EOS], [10, EOS]]


def build(**changes: object) -> Rnn:
    torch.manual_seed(0)
    return SMALL.override(changes).build(Vocabulary(13, 11)).eval()


def batch_of(source: list[list[int]], target: list[list[int]]) -> Batch:
    return Batch(*pad_ids(source), *pad_ids(target), torch.arange(len(source)))


BATCH = batch_of(SOURCE, TARGET)


def encoded(model: Rnn) -> Memory:
    return model.encode(BATCH.source_BS, BATCH.source_lengths_B)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_decoder_starts_from_the_encoders_last_state(cell):
    model = build(cell=cell, encoder_layers=2, decoder_layers=2)
    assert not model.config.has_bridge
    peer = (nn.LSTM if cell == "lstm" else nn.GRU)(12, 12, num_layers=2, batch_first=True)
    ours = [p for layer in model.encoder for p in layer.ahead.parameters()]
    with torch.no_grad():
        for target, source in zip(peer.parameters(), ours, strict=True):
            target.copy_(source)
    layers = model.start(encoded(model), 9).layers
    for i, ids in enumerate(SOURCE):  # alone and without padding
        x_1SD = model.source_embedding.table(torch.tensor([ids])) * model.scale
        last = peer(x_1SD)[1]
        parts = last if cell == "lstm" else (last,)
        for number, layer in enumerate(layers):
            for found, wanted in zip(layer, parts, strict=True):
                torch.testing.assert_close(found[i], wanted[number, 0])


@pytest.mark.parametrize("changes", [{}, {"bidirectional": True, "encoder_units": 5}], ids=str)
def test_the_source_is_seen_through_one_vector_only(changes):
    model = build(**changes)
    units = model.encoder[0].width
    seen = []
    model.encoder[0].register_forward_hook(lambda *_: seen.append(1))
    memory = encoded(model)
    assert memory.states_BSD.shape == (3, 1, 2 * units)  # h and c, whatever the length
    assert memory.is_real_BS.all()
    vectors = memory.states_BSD.detach().requires_grad_()
    loss = model.decode(Memory(vectors, memory.is_real_BS), BATCH.inputs_BT).square().sum()
    loss.backward()
    # The encoder gets no gradient but through u, and every part of u gets some.
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.source_embedding.table.weight.grad is None
    assert (vectors.grad != 0).all()
    # Another source with the same u says the same.
    other = Memory(memory.states_BSD[[0, 0, 0]], memory.is_real_BS)
    same = model.decode(other, BATCH.inputs_BT[[1, 1, 1]])
    assert torch.equal(same[0], same[2])


def test_u_reads_every_word():
    model = build()
    embedded = []
    model.source_embedding.register_forward_hook(
        lambda _module, _inputs, out: embedded.append(out) or out.retain_grad()
    )
    u_B1U = encoded(model).states_BSD
    u_B1U.square().sum().backward()
    sizes = embedded[0].grad.abs().amax(-1)
    assert ((sizes > 0) == (BATCH.source_BS != 0)).all()


def test_a_bridge_stands_only_where_sizes_differ():
    assert not hasattr(build(), "bridge")
    assert build(decoder_layers=2).bridge.weight.shape == (4 * 12, 2 * 12)
    two_way = build(bidirectional=True, encoder_units=6)
    assert not hasattr(two_way, "bridge")
    assert build(bidirectional=True, cell="gru").bridge.weight.shape == (12, 24)


def test_reverse_source_reads_from_the_end():
    plain, reverse = build(), build(reverse_source=True)
    reverse.load_state_dict(plain.state_dict())
    turned, lengths = pad_ids([ids[::-1] for ids in SOURCE])
    wanted = plain.encode(turned, lengths).states_BSD
    torch.testing.assert_close(encoded(reverse).states_BSD, wanted)
    assert (encoded(plain).states_BSD - wanted).abs().max() > 1e-3


def test_an_lstm_has_four_thirds_of_the_recurrent_parameters_of_a_gru():
    sizes = [
        count(model.encoder) + count(model.decoder)
        for model in (build(cell=cell, decoder_layers=2) for cell in ("lstm", "gru"))
    ]
    assert 3 * sizes[0] == 4 * sizes[1]


def test_dropout_in_training_only():
    model = build(dropout=0.3)
    quiet = model(BATCH)
    assert torch.equal(model(BATCH), quiet)
    model.train()
    assert (model(BATCH) == 0).float().mean() > 0.2
    assert not torch.equal(model(BATCH), model(BATCH))


def test_nothing_attends_and_a_source_is_encoded_once():
    model, calls = build(), []
    assert model.attention(BATCH) == {}
    model.source_embedding.register_forward_hook(lambda *_: calls.append(1))
    beam_search(
        model, BATCH.source_BS, BATCH.source_lengths_B, Decoding(beam=3, length_alpha=1), cap=20
    )
    assert calls == [1]


def wrong_reversals(lengths: tuple[int, int], steps: int) -> int:
    """Of 100 unseen words of these lengths, how many a model trained on such ones gets wrong."""
    torch.manual_seed(0)
    model = SMALL.override({"width": 64, "encoder_units": 64}).build(Vocabulary(14, 14))

    def words(count: int, seed: int) -> Batch:
        draw = random.Random(seed)
        rows = [draw.choices(range(4, 14), k=draw.randint(*lengths)) for _ in range(count)]
        return batch_of([[*row, EOS] for row in rows], [[*row[::-1], EOS] for row in rows])

    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 30, 2 * (1 - s / steps), 1)
    )
    for batch in itertools.islice((words(64, seed) for seed in itertools.count(1)), steps):
        optimizer.zero_grad()
        target_nll(model, model(batch), batch).mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    unseen = words(100, 0)
    found = greedy(model, unseen.source_BS, unseen.source_lengths_B, cap=60).ids
    gold = [row[: row.index(EOS)] for row in unseen.target_BT.tolist()]
    return sum(one != other for one, other in zip(found, gold, strict=True))


@pytest.mark.slow
def test_learns_to_reverse_short_words_but_not_long_ones():
    # u has 128 numbers; a word of 24 of 10 symbols has 80 bits, each to be read out of u when
    # it is due. With attention 300 updates left 8 of 200 such words wrong, without 200.
    assert wrong_reversals((2, 4), steps=400) == 0
    assert wrong_reversals((20, 24), steps=150) > 90
