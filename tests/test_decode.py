"""Greedy and beam search against loops and enumerations that need no cleverness."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.batches import pad_ids
from trainables.transformer import TransformerConfig
from vinedresser.batch import Batch, is_real
from vinedresser.decode import beam_search, greedy, length_limits, length_penalty
from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.nn.output import Output
from vinedresser.objective import target_nll
from vinedresser.special_ids import BOS, EOS, PAD

pytestmark = pytest.mark.usefixtures("one_thread")

V = 6
SOURCES = [[4, 5, EOS], [5, EOS], [4, 4, 5, 5, 4, 5, EOS], [EOS]]


def toy(seed: int, *, sharpness: float = 4.0) -> Seq2Seq:
    """A random model whose choices are clear and depend on the source."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1, tie="none"
    )
    model = config.build(Vocabulary(V, V)).eval()
    with torch.no_grad():
        model.output.weight *= sharpness
        model.output.bias.normal_()
    return model


@torch.no_grad()
def log_p(model: Seq2Seq, source: list[int], prefixes: list[list[int]]) -> Tensor:
    """(prefixes, V) log-probabilities after each prefix, all of one length, without a cache."""
    source_BS = torch.tensor([source] * len(prefixes))
    memory = model.encode(source_BS, torch.full((len(prefixes),), len(source)))
    inputs_BT = torch.tensor([[BOS, *prefix] for prefix in prefixes])
    return model.output.log_probs(model.decode(memory, inputs_BT)[:, -1])


def plain_greedy(model: Seq2Seq, source: list[int], limit: int) -> tuple[list[int], float]:
    ids: list[int] = []
    nats = 0.0
    while len(ids) < limit:
        best, token = log_p(model, source, [ids])[0].max(-1)
        nats -= float(best)
        if token == EOS:
            break
        ids.append(int(token))
    return ids, nats


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_the_argmax_loop_without_a_cache(seed):
    model = toy(seed)
    found = greedy(model, *pad_ids(SOURCES), cap=9)
    for source, ids, nats in zip(SOURCES, found.ids, found.nll, strict=True):
        wanted, wanted_nats = plain_greedy(model, source, min(9, 2 * len(source) + 10))
        assert ids == wanted
        assert nats == pytest.approx(wanted_nats, abs=1e-4)


def test_some_toy_outputs_end_and_some_reach_the_limit():
    lengths = [len(ids) for s in range(6) for ids in greedy(toy(s), *pad_ids(SOURCES), cap=9).ids]
    assert 9 in lengths
    assert min(lengths) < 9


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_a_beam_of_one_is_greedy(seed, alpha):
    model = toy(seed)
    wanted = greedy(model, *pad_ids(SOURCES), cap=9)
    found = beam_search(model, *pad_ids(SOURCES), beam=1, alpha=alpha, cap=9)
    assert found.ids == wanted.ids
    assert found.nll == pytest.approx(wanted.nll, abs=1e-4)


def enumerated(model: Seq2Seq, source: list[int], limit: int) -> dict[tuple[int, ...], float]:
    """Every output of up to `limit` tokens -> its log p; EOS is the last token where it ends."""
    result, alive = {}, {(): 0.0}
    for length in range(1, limit + 1):
        rows = log_p(model, source, [list(ids) for ids in alive])
        longer = {}
        for (ids, so_far), row in zip(alive.items(), rows.tolist(), strict=True):
            for token, value in enumerate(row):
                is_done = token == EOS or length == limit
                (result if is_done else longer)[(*ids, token)] = so_far + value
        alive = longer
    return result


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_an_exhaustive_beam_is_the_best_of_all_outputs(seed, alpha):
    model, limit = toy(seed, sharpness=1.0), 4
    found = beam_search(model, *pad_ids(SOURCES), beam=V ** (limit - 1), alpha=alpha, cap=limit)
    for i, source in enumerate(SOURCES):
        scores = {
            ids: value / ((5 + len(ids)) / 6) ** alpha
            for ids, value in enumerated(model, source, limit).items()
        }
        assert math.isclose(
            sum(map(math.exp, enumerated(model, source, limit).values())), 1, rel_tol=1e-4
        )
        best = max(scores, key=scores.__getitem__)
        assert found.ids[i] == [token for token in best if token != EOS]
        penalty = length_penalty(len(best), alpha)
        assert -found.nll[i] / penalty == pytest.approx(scores[best], abs=1e-4)


def test_the_exhaustive_test_can_tell_search_from_greed():
    differ = 0
    for seed in range(5):
        model = toy(seed, sharpness=1.0)
        wide = beam_search(model, *pad_ids(SOURCES), beam=216, alpha=0.6, cap=4)
        differ += wide.ids != greedy(model, *pad_ids(SOURCES), cap=4).ids
    assert differ


@pytest.mark.parametrize("seed", range(4))
def test_log_probability_is_that_of_teacher_forcing(seed):
    model = toy(seed)
    found = beam_search(model, *pad_ids(SOURCES), beam=3, alpha=0.6, cap=40)
    for source, ids, nats in zip(SOURCES, found.ids, found.nll, strict=True):
        limit = 2 * len(source) + 10
        said = ids if len(ids) == limit else [*ids, EOS]
        prefixes = [said[:t] for t in range(len(said))]
        total = sum(
            float(log_p(model, source, [p])[0, t]) for p, t in zip(prefixes, said, strict=True)
        )
        assert nats == pytest.approx(-total, abs=1e-4)


def test_summed_log_probabilities_are_the_likelihood():
    model = toy(1)
    with torch.no_grad():
        model.output.bias[EOS] += 3
    found = greedy(model, *pad_ids(SOURCES), cap=60)
    ended = [i for i, s in enumerate(SOURCES) if len(found.ids[i]) < 2 * len(s) + 10]
    assert ended
    rows = [[*found.ids[i], EOS] for i in ended]
    sources = pad_ids([SOURCES[i] for i in ended])
    batch = Batch(*sources, *pad_ids(rows), torch.arange(len(ended)))
    total = float(target_nll(model, model(batch), batch).total.detach())
    assert total == pytest.approx(sum(found.nll[i] for i in ended), abs=1e-3)


SEARCHES = {
    "greedy": lambda model, *given: greedy(model, *given, cap=12),
    "beam": lambda model, *given: beam_search(model, *given, beam=3, alpha=0.6, cap=12),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(4))
def test_outputs_depend_on_the_source_alone(search, seed):
    decode, model = SEARCHES[search], toy(seed)
    alone = [decode(model, *pad_ids([source])).ids[0] for source in SOURCES]
    together = decode(model, *pad_ids(SOURCES)).ids
    assert together == alone
    crowd = [SOURCES[i] for i in (2, 0, 0, 3, 1, 2, 1)]
    assert decode(model, *pad_ids(crowd)).ids == [alone[i] for i in (2, 0, 0, 3, 1, 2, 1)]


@pytest.mark.parametrize("search", SEARCHES)
def test_limits_hold_and_the_source_is_encoded_once(search, monkeypatch):
    model = toy(0)
    with torch.no_grad():
        model.output.bias[EOS] = -1e4  # never ends by itself
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *given: calls.append(1) or encode(*given))
    assert [len(ids) for ids in SEARCHES[search](model, *pad_ids(SOURCES)).ids] == [12] * 4
    assert calls == [1]
    sources = pad_ids([[EOS], [4] * 4 + [EOS]])
    assert [len(ids) for ids in greedy(model, *sources, cap=15).ids] == [12, 15]


def test_limits_by_hand():
    assert length_limits(torch.tensor([1, 5, 200]), 100).tolist() == [12, 20, 100]


def test_length_penalty_by_hand():
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 1.0) == 2
    assert length_penalty(19, 0.5) == 2
    assert length_penalty(50, 0.0) == 1


class Spoken(Output):
    """Its states are the scores of the next token."""

    def log_probs(self, states: Tensor) -> Tensor:
        return states.log_softmax(-1)


class Scripted(Seq2Seq):
    """Speaks by a table: prefix -> probabilities of the next token; elsewhere it ends."""

    def __init__(self, table: dict[tuple[int, ...], dict[int, float]]) -> None:
        super().__init__()
        self.table, self.output = table, Spoken()

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        return Memory(source_BS[..., None].float(), is_real(source_lengths_B, source_BS.shape[1]))

    def start(self, memory: Memory, max_length: int) -> list[tuple[int, ...]]:
        return [() for _ in memory.states_BSD]

    def step(self, state, tokens_B):
        state = [(*ids, token) for ids, token in zip(state, tokens_B.tolist(), strict=True)]
        rows = torch.full((len(state), V), 1e-6)
        for row, ids in zip(rows, state, strict=True):
            for token, p in self.table.get(ids[1:], {EOS: 1.0}).items():
                row[token] = p
        return rows.log(), state

    def select(self, state, rows):
        return [state[i] for i in rows.tolist()]


def test_short_unlikely_endings_do_not_crowd_out_the_open_output():
    # At every step the end is among the best three, yet the long output is 0.9**5 likely.
    word = [4, 5, 4, 5, 4]
    table = {tuple(word[:t]): {token: 0.9, EOS: 0.1} for t, token in enumerate(word)}
    found = beam_search(Scripted(table), *pad_ids([[4, EOS]]), beam=3, alpha=0.0, cap=20)
    assert found.ids == [word]
    assert math.exp(-found.nll[0]) == pytest.approx(0.9**5, rel=1e-3)


def test_beam_search_recovers_from_a_bad_first_choice():
    table = {(): {4: 0.55, 5: 0.45}, (4,): {EOS: 0.3, 4: 0.2, 5: 0.2}, (5,): {EOS: 0.99}}
    model, source = Scripted(table), pad_ids([[4, EOS]])
    assert greedy(model, *source, cap=5).ids == [[4]]
    assert beam_search(model, *source, beam=2, alpha=0.0, cap=5).ids == [[5]]


def test_ids_are_what_was_said_even_padding():
    model, source = Scripted({(): {PAD: 0.9}, (PAD,): {5: 0.9}}), pad_ids([[4, EOS]])
    wanted = [[PAD, 5]]
    assert greedy(model, *source, cap=5).ids == wanted
    assert beam_search(model, *source, beam=1, alpha=0.6, cap=5).ids == wanted


def test_a_beam_wider_than_the_vocabulary():
    found = beam_search(toy(0), *pad_ids(SOURCES), beam=4 * V, alpha=0.6, cap=3)
    assert all(len(ids) <= 3 for ids in found.ids)
    assert all(math.isfinite(nats) for nats in found.nll)


def test_every_prefix_is_tried():
    assert len(enumerated(toy(0), [4, EOS], 3)) == 1 + 5 + 25 * V
    assert len(set(itertools.chain(*enumerated(toy(0), [4, EOS], 2)))) == V
