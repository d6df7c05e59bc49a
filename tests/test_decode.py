"""Greedy and beam search against loops and enumerations that need no cleverness."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.batches import pad_ids
from tests.trainables.variants import FORMS
from trainables.transformer import TransformerConfig
from vinedresser.batch import Batch, is_real
from vinedresser.config import Decoding, ModelConfig
from vinedresser.config.kinds import ZOO, kind_class
from vinedresser.decode import (
    beam_search,
    decode,
    forced,
    greedy,
    length_limits,
    length_penalty,
)
from vinedresser.errors import ConfigError
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
    found = beam_search(model, *pad_ids(SOURCES), Decoding(beam=1, length_alpha=alpha), cap=9)
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
    found = beam_search(
        model, *pad_ids(SOURCES), Decoding(beam=V ** (limit - 1), length_alpha=alpha), cap=limit
    )
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
        wide = beam_search(model, *pad_ids(SOURCES), Decoding(beam=216, length_alpha=0.6), cap=4)
        differ += wide.ids != greedy(model, *pad_ids(SOURCES), cap=4).ids
    assert differ


@pytest.mark.parametrize("seed", range(4))
def test_log_probability_is_that_of_teacher_forcing(seed):
    model = toy(seed)
    found = beam_search(model, *pad_ids(SOURCES), Decoding(beam=3, length_alpha=0.6), cap=40)
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
    "beam": lambda model, *given: beam_search(
        model, *given, Decoding(beam=3, length_alpha=0.6), cap=12
    ),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(4))
def test_outputs_depend_on_the_source_alone(search, seed):
    searched, model = SEARCHES[search], toy(seed)
    alone = [searched(model, *pad_ids([source])).ids[0] for source in SOURCES]
    together = searched(model, *pad_ids(SOURCES)).ids
    assert together == alone
    crowd = [SOURCES[i] for i in (2, 0, 0, 3, 1, 2, 1)]
    assert searched(model, *pad_ids(crowd)).ids == [alone[i] for i in (2, 0, 0, 3, 1, 2, 1)]


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
    found = beam_search(
        Scripted(table), *pad_ids([[4, EOS]]), Decoding(beam=3, length_alpha=0.0), cap=20
    )
    assert found.ids == [word]
    assert math.exp(-found.nll[0]) == pytest.approx(0.9**5, rel=1e-3)


def test_beam_search_recovers_from_a_bad_first_choice():
    table = {(): {4: 0.55, 5: 0.45}, (4,): {EOS: 0.3, 4: 0.2, 5: 0.2}, (5,): {EOS: 0.99}}
    model, source = Scripted(table), pad_ids([[4, EOS]])
    assert greedy(model, *source, cap=5).ids == [[4]]
    assert beam_search(model, *source, Decoding(beam=2, length_alpha=0.0), cap=5).ids == [[5]]


def test_ids_are_what_was_said_even_padding():
    model, source = Scripted({(): {PAD: 0.9}, (PAD,): {5: 0.9}}), pad_ids([[4, EOS]])
    wanted = [[PAD, 5]]
    assert greedy(model, *source, cap=5).ids == wanted
    assert beam_search(model, *source, Decoding(beam=1, length_alpha=0.6), cap=5).ids == wanted


def test_a_beam_wider_than_the_vocabulary():
    found = beam_search(toy(0), *pad_ids(SOURCES), Decoding(beam=4 * V, length_alpha=0.6), cap=3)
    assert all(len(ids) <= 3 for ids in found.ids)
    assert all(math.isfinite(nats) for nats in found.nll)


def test_every_prefix_is_tried():
    assert len(enumerated(toy(0), [4, EOS], 3)) == 1 + 5 + 25 * V
    assert len(set(itertools.chain(*enumerated(toy(0), [4, EOS], 2)))) == V


WIDE = V**3


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_an_exhaustive_beam_are_the_best_of_all_outputs(seed):
    model = toy(seed, sharpness=1.0)
    settings = Decoding(beam=WIDE, length_alpha=0.6, min_length=2)
    found = beam_search(model, *pad_ids(SOURCES), settings, cap=4, nbest=7)
    for source, hypotheses in zip(SOURCES, found.hypotheses, strict=True):
        scores = {
            ids: value / length_penalty(len(ids), 0.6)
            for ids, value in enumerated(model, source, 4).items()
            if EOS not in ids[:2]
        }
        wanted = sorted(scores, key=scores.__getitem__, reverse=True)[:7]
        assert [h.ids for h in hypotheses] == [[i for i in ids if i != EOS] for ids in wanted]
        assert [h.score for h in hypotheses] == pytest.approx(
            [scores[ids] for ids in wanted], abs=1e-4
        )


KINDS = {
    "greedy": {},
    "beam": {"beam": 3},
    "spread": {"beam": 3, "beam_spread": 2.0},
    "sample": {"sample": True, "seed": 5},
    "bounded": {"min_length": 3, "max_length": 7},
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_forced_decoding(kind):
    model = toy(2)
    with torch.no_grad():
        model.output.bias[PAD] = -1e4  # a target cannot hold it
    found = decode(model, *pad_ids(SOURCES), Decoding(**KINDS[kind]), cap=20)
    limits = length_limits(torch.tensor([len(s) for s in SOURCES]), 20).tolist()
    if kind == "bounded":
        limits = [7] * 4
    # An output that reached its limit has no end; with it, the forced score would have one more.
    spoken = [
        ids if len(ids) == limit else [*ids, EOS]
        for ids, limit in zip(found.ids, limits, strict=True)
    ]
    batch = Batch(*pad_ids(SOURCES), *pad_ids(spoken), torch.arange(4))
    with torch.no_grad():
        assert forced(model, batch).tolist() == pytest.approx(found.nll, abs=1e-3)


# Tied, an untrained Transformer repeats its last token.
SMALL = [
    (name, "untied" if "untied" in forms else next(iter(forms))) for name, forms in FORMS.items()
]


@pytest.mark.parametrize(("module", "form"), SMALL)
def test_batches_order_and_padding_change_nothing(module, form):
    torch.manual_seed(1)
    config = kind_class(ZOO, module, ModelConfig)().override(FORMS[module][form])
    model = config.build(Vocabulary(11, 11, joint=True)).eval()
    with torch.no_grad():  # choices that depend on the source
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
        model.output.bias[EOS] -= 1
    draw = random.Random(3)
    rows = [[*draw.choices(range(4, 11), k=draw.randint(0, 11)), EOS] for _ in range(64)]
    order = draw.sample(range(64), 64)
    mixed = [rows[i] for i in order]

    def outputs(rows: list[list[int]], size: int, kind: str, more: int = 0) -> list[list[int]]:
        found = []
        for first in range(0, len(rows), size):
            source_BS, lengths_B = pad_ids(rows[first : first + size])
            source_BS = torch.nn.functional.pad(source_BS, (0, more), value=PAD)
            found += decode(model, source_BS, lengths_B, Decoding(**KINDS[kind]), cap=8).ids
        return found

    for kind in ("greedy", "beam", "sample"):
        whole = outputs(rows, 64, kind)
        assert outputs(rows, 7, kind) == whole
        assert outputs(rows[:16], 1, kind) == whole[:16]
        assert outputs(mixed, 64, kind, more=5) == [whole[i] for i in order]
        assert len({tuple(ids) for ids in whole}) > 2


def test_lengths_are_bounded_on_both_sides():
    model = toy(0)
    with torch.no_grad():
        model.output.bias[EOS] = 40
    for settings in ({}, {"beam": 3}, {"sample": True}):
        least = decode(model, *pad_ids(SOURCES), Decoding(min_length=6, **settings), cap=9)
        assert min(len(ids) for ids in least.ids) >= 6
        free = decode(model, *pad_ids(SOURCES), Decoding(**settings), cap=9)
        assert min(len(ids) for ids in free.ids) < 6
        short = decode(model, *pad_ids(SOURCES), Decoding(max_length=2, **settings), cap=9)
        assert max(len(ids) for ids in short.ids) <= 2
    with torch.no_grad():
        model.output.bias[EOS] = -1e4
    longer = decode(model, *pad_ids(SOURCES), Decoding(max_length=30), cap=40)
    assert [len(ids) for ids in longer.ids] == [30] * 4


def test_a_hypothesis_far_below_the_best_is_dropped():
    # The best output begins with a token that is ln(0.8 / 0.2) = 1.386 nats below the other.
    table = {(): {4: 0.8, 5: 0.2}, (4,): dict.fromkeys((BOS, 3, 4, 5, EOS), 0.2), (5,): {EOS: 0.99}}
    model, source = Scripted(table), pad_ids([[4, EOS]])
    for spread, first in ((None, 5), (1.4, 5), (1.3, 4)):
        settings = Decoding(beam=2, length_alpha=0, beam_spread=spread)
        assert beam_search(model, *source, settings, cap=5).ids[0][0] == first


def shares(settings: dict[str, object], draws: int = 1500) -> dict[int, float]:
    """Share of each first token among many draws from (4: 0.5, 5: 0.3, 3: 0.2)."""
    model = Scripted({(): {4: 0.5, 5: 0.3, 3: 0.2}})
    decoding = Decoding(sample=True, **settings)
    [found] = decode(model, *pad_ids([[4, EOS]]), decoding, cap=1, nbest=draws).hypotheses
    counts = Counter(tuple(each.ids) for each in found)
    return {ids[0]: n / draws for ids, n in counts.items()}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {4: 0.5, 5: 0.3, 3: 0.2}),
        ({"top_k": 2}, {4: 0.625, 5: 0.375}),
        ({"top_k": 1}, {4: 1.0}),
        ({"top_p": 0.7}, {4: 0.625, 5: 0.375}),
        ({"top_p": 0.4}, {4: 1.0}),
        # Squares of the probabilities, normalised.
        ({"temperature": 0.5}, {4: 0.25 / 0.38, 5: 0.09 / 0.38, 3: 0.04 / 0.38}),
    ],
)
def test_draws_follow_the_distribution(settings, wanted):
    found = shares(settings)
    assert found.keys() == wanted.keys()
    for token, share in wanted.items():
        assert found[token] == pytest.approx(share, abs=4 * math.sqrt(share / 1500))


def test_draws_are_a_function_of_the_seed_and_the_sentence():
    model = toy(3)
    sources = pad_ids([*SOURCES, SOURCES[0]])
    first, again, other = (
        decode(model, *sources, Decoding(sample=True, seed=seed), cap=12, nbest=3).hypotheses
        for seed in (7, 7, 8)
    )
    assert first == again != other
    assert first[0] == first[4]
    assert len({tuple(each.ids) for each in first[0]}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": True, "beam": 4}, "sample: no search, but beam is 4"),
        ({"beam_spread": 3.0}, "beam_spread: no effect without beams"),
        ({"top_k": 4}, "top_k: no effect on a search"),
        ({"beam": 2, "temperature": 0.5}, "temperature: no effect on a search"),
        ({"seed": 1}, "seed: no effect on a search"),
        ({"min_length": 5, "max_length": 4}, "min_length is 5, over max_length, which is 4"),
    ],
)
def test_options_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decoding.from_json(settings)


def test_the_signature_names_what_changes_an_output():
    assert Decoding().signature == "search:greedy"
    assert Decoding(max_padded_tokens=99).signature == "search:greedy"
    changes = [
        {"beam": 4}, {"beam": 4, "length_alpha": 1.0}, {"beam": 4, "beam_spread": 3.0},
        {"min_length": 2}, {"max_length": 9}, {"sample": True}, {"sample": True, "seed": 1},
        {"sample": True, "temperature": 0.5}, {"sample": True, "top_k": 5},
        {"sample": True, "top_p": 0.9}, {},
    ]  # fmt: skip
    assert len({Decoding(**each).signature for each in changes}) == len(changes)
    assert Decoding(beam=4, beam_spread=3).signature == "beam:4|alpha:0.6|spread:3"
