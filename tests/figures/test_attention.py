"""Attention maps: closed forms of the scores, labels of every kind of side, a model that learns."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.batches import pad_ids
from tests.memory_tracker import MemoryTracker
from vinedresser.batch import Batch
from vinedresser.bundle import load_bundle, save_bundle
from vinedresser.config import Experiment
from vinedresser.config.kinds import named_model
from vinedresser.config.task import Frames
from vinedresser.data.batching.reader import Split, load_split
from vinedresser.data.batching.side import Side
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.data.tokenizers.frames import Filterbank
from vinedresser.data.tokenizers.tokenizer import Symbols
from vinedresser.errors import DataError
from vinedresser.figures import attention_maps as diagnostics
from vinedresser.figures.attention import attention_figure, legible
from vinedresser.figures.attention_maps import (
    AttentionWatch,
    attention_maps,
    attention_of,
    diagonality,
    entropy,
    kind_of,
)
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.objective import target_nll
from vinedresser.special_ids import EOS

SYMBOLS = Symbols("symbols", list("abcdefgh"))
SMALL = {"d_model": 32, "d_ff": 64, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0,
         "attention_dropout": 0.0}  # fmt: skip


# --- scores --------------------------------------------------------------------------------------


def soft(seed: int, *shape: int) -> np.ndarray:
    return torch.randn(shape, generator=torch.manual_seed(seed)).mul(2).softmax(-1).numpy()


@pytest.mark.parametrize("n", [2, 3, 20])
def test_diagonality_of_the_corners(n):
    eye, uniform = np.eye(n), np.full((n, n), 1 / n)
    assert diagonality(eye) == pytest.approx(1)
    assert diagonality(eye[:, ::-1]) == pytest.approx(-1)
    assert diagonality(uniform) == pytest.approx(0, abs=1e-12)
    column = np.zeros((n, n))
    column[:, -1] = 1
    assert diagonality(column) == 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_blurred_diagonal_scores_its_share(share):
    n = 9
    mixed = share * np.eye(n) + (1 - share) / n
    assert diagonality(mixed) == pytest.approx(share)


def test_diagonality_of_rectangles_shifts_and_causal_heads():
    assert diagonality(np.repeat(np.eye(6), 3, 0)) == pytest.approx(
        math.sqrt((6**2 - 1) / (18**2 - 1)) * 18 / 6
    )
    assert diagonality(np.eye(6, 9, 2)) == pytest.approx(1)
    n = 400
    causal = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    assert diagonality(causal) == pytest.approx(math.sqrt(3 / 7), abs=0.005)


def test_diagonality_is_the_correlation_of_drawn_pairs():
    weights = soft(0, 5, 7)
    draw = np.random.default_rng(0)
    t = draw.integers(0, 5, 40_000)
    s = (draw.random(40_000)[:, None] > weights[t].cumsum(1)).sum(1)
    assert diagonality(weights) == pytest.approx(np.corrcoef(t, s)[0, 1], abs=0.02)


def test_padding_and_leading_dimensions_do_not_change_the_scores():
    weights = soft(1, 2, 3, 5, 7)
    found = diagonality(weights)
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(diagonality(weights[1, 2]))
    padded = np.concatenate([weights, np.zeros((2, 3, 5, 4))], -1)
    assert diagonality(padded) == pytest.approx(found)
    assert entropy(padded) == pytest.approx(entropy(weights))


def test_there_is_no_diagonal_of_one_position_and_none_of_nan():
    assert np.isnan(diagonality(np.ones((4, 5, 1)))).all()
    assert np.isnan(diagonality(soft(0, 1, 5)))
    assert np.isnan(diagonality(np.full((3, 3), np.nan)))


def test_entropy_in_closed_form():
    assert entropy(np.eye(4)) == 0
    assert entropy(np.full((3, 8), 1 / 8)) == pytest.approx(math.log(8))
    assert entropy(np.array([[0.5, 0.5, 0], [1, 0, 0]])) == pytest.approx(math.log(2) / 2)


# --- maps ----------------------------------------------------------------------------------------


def pair(source: str, target: str) -> Batch:
    (source_ids, source_length), (target_ids, target_length) = (
        pad_ids([[*SYMBOLS.encode(text), EOS]]) for text in (source, target)
    )
    return Batch(source_ids, source_length, target_ids, target_length, torch.zeros(1).long())


def build(name: str, features: int = 0, **changes: object) -> Seq2Seq:
    torch.manual_seed(0)
    size = SYMBOLS.size
    return named_model(name, changes).build(
        Vocabulary(0 if features else size, size, False, features)
    )


def test_maps_of_a_transformer_have_tokens_on_their_sides():
    found = attention_maps(build("transformer", **SMALL), pair("a b c", "d e"), (SYMBOLS, SYMBOLS))
    assert [(each.name, each.kind) for each in found] == [
        ("encoder.0.enc_self", "source"),
        ("decoder.0.dec_self", "output"),
        ("decoder.0.dec_enc", "cross"),
    ]
    source, output, cross = found
    assert source.rows.labels == source.columns.labels == ("a", "b", "c", "</s>")
    assert (output.rows.labels, output.columns.labels) == (("d", "e", "</s>"), ("<s>", "d", "e"))
    assert (cross.rows, cross.columns) == (output.rows, source.columns)
    assert np.triu(output.weights, 1).max() == 0
    for each in found:
        assert each.weights.shape == (4, len(each.rows.labels), len(each.columns.labels))
        np.testing.assert_allclose(each.weights.sum(-1), 1, atol=1e-5)
        assert len(each.diagonality) == len(each.entropy) == 4
        assert all(0 < value <= math.log(4) for value in each.entropy[1:])


@pytest.mark.parametrize("name", ["rnn-small", "conv-small", "listener"])
def test_other_models_attend_to_the_source(name):
    model = build(name)
    found = attention_maps(model, pair("a b c d e f g h a b", "d e f"), (SYMBOLS, SYMBOLS))
    assert found
    assert {each.kind for each in found} == {"cross"}
    assert all(each.weights.shape[1] == 4 for each in found)


def test_a_model_without_attention_has_no_maps():
    assert attention_maps(build("rnn"), pair("a", "b"), (SYMBOLS, SYMBOLS)) == []


def test_a_layer_whose_heads_are_all_pruned_has_an_empty_map():
    alive = {"dec_enc": [[0, 0, 0, 0], [0, 1, 0, 1]]}
    model = build("transformer", **{**SMALL, "decoder_layers": 2, "alive_heads": alive})
    found = {
        each.name: each for each in attention_maps(model, pair("a b c", "d e"), (SYMBOLS, SYMBOLS))
    }
    assert found["decoder.0.dec_enc"].diagonality == found["decoder.0.dec_enc"].entropy == []
    assert len(found["decoder.1.dec_enc"].diagonality) == 2
    tracker = MemoryTracker()
    assert AttentionWatch(copies(0, 8), (SYMBOLS, SYMBOLS)).look(model, tracker, 1)
    assert list(tracker.artifacts) == ["attention/decoder.1.dec_enc/step-00000001.png"]


def test_a_diverged_model_is_shown_as_it_is():
    model, tracker = build("transformer", **SMALL), MemoryTracker()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    watch = AttentionWatch(copies(0, 8), (SYMBOLS, SYMBOLS))
    assert math.isnan(watch.look(model, tracker, 1)["dev/diagonality"])
    (picture,) = tracker.artifacts.values()
    assert all("nan" not in axes.get_title() for axes in picture.axes)


def test_subsampled_positions_are_named_after_all_their_tokens():
    changes = {**SMALL, "subsampling": {"kind": "concat", "factor": 2, "layers": 2}}
    found = attention_maps(
        build("transformer", **changes), pair("a b c d e", "f"), (SYMBOLS, SYMBOLS)
    )
    assert found[0].columns.labels == ("a b c d", "e </s>")
    assert found[0].rows == found[0].columns == found[2].columns
    assert found[1].columns.labels == ("<s>", "f")


def test_frames_have_seconds():
    frames = Filterbank(Frames(kind="frames", num_mels=5, shift_ms=20))
    model = build("listener", features=5)
    said, lengths = pad_ids([[*SYMBOLS.encode("a b"), EOS]])
    batch = Batch(torch.randn(1, 36, 5), torch.tensor([36]), said, lengths, torch.zeros(1).long())
    (found,) = attention_maps(model, batch, (frames, SYMBOLS))
    # 36 frames of 20 ms, halved three times.
    assert found.columns.labels == ("0.00", "0.16", "0.32", "0.48", "0.64")
    assert found.columns.seconds == pytest.approx(0.16)
    axes = attention_figure(found).axes[0]
    assert axes.get_xlim() == pytest.approx((0, 0.8))
    assert axes.get_xlabel() == "source, s"


def test_labels_show_spaces_and_stay_short():
    letters = Symbols("characters", list("ab "))
    assert diagnostics._names(letters, letters.encode("a b")) == ("a", "␣", "b")
    assert diagnostics._names(SYMBOLS, SYMBOLS.encode("a z")) == ("a", "\u2047")
    (label,) = diagnostics._names(SimpleNamespace(pieces=lambda _: ["x" * 30]), [5])
    assert label == "x" * 13 + "…"


def test_rows_that_do_not_sum_to_one_are_our_mistake():
    diagnostics._refuse_other_sums("m", soft(0, 2, 3, 4))
    diagnostics._refuse_other_sums("m", np.full((1, 2, 2), np.nan))
    with pytest.raises(ValueError, match=r"m: attention weights of a query sum to 1 \+- 0\.1"):
        diagnostics._refuse_other_sums("m", 1.1 * soft(0, 2, 3, 4))
    both = pad_ids([[4, EOS], [5, EOS]])
    batch = Batch(*both, *both, torch.arange(2))
    with pytest.raises(ValueError, match="2 sentences"):
        attention_maps(build("rnn-small"), batch, (SYMBOLS, SYMBOLS))


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_a_figure_has_a_panel_a_head_and_a_label_a_token(heads, tmp_path: Path):
    model = build("transformer", **SMALL, num_heads=heads)
    found = attention_maps(model, pair("a b c", "d e f g"), (SYMBOLS, SYMBOLS))[2]
    picture = attention_figure(found, note="step 3")
    panels = [axes for axes in picture.axes if axes.images]
    assert len(panels) == heads
    assert [text.get_text() for text in panels[0].get_yticklabels()] == [*"defg", "</s>"]
    assert [text.get_text() for text in panels[-1].get_xticklabels()] == [*"abc", "</s>"]
    np.testing.assert_array_equal(panels[-1].images[0].get_array(), found.weights[-1])
    assert "head 0" in panels[0].get_title()
    assert picture.texts[0].get_text().endswith("step 3")
    picture.savefig(tmp_path / "a.png", dpi=100)
    assert (tmp_path / "a.png").stat().st_size > 3000


def test_every_letter_is_drawn_or_written_as_its_number():
    labels, families = legible(["a", "▁ß", "␣", "\U0010ffff", "x\ny"])
    assert labels == ["a", "▁ß", "␣", "U+10FFFF", "x U+000Ay"]
    assert families[0] == "DejaVu Sans"


def test_dollars_are_no_formulas(tmp_path: Path):
    odd = Symbols("symbols", ["$\\frac$", "a$b$", "^", "_"])
    batch = pair("a b", "c d")
    (found,) = attention_maps(build("rnn-small"), batch, (odd, odd))
    assert "$\\frac$" in found.columns.labels
    attention_figure(found).savefig(tmp_path / "a.png")


# --- a model that learns -------------------------------------------------------------------------


def copies(seed: int, rows: int) -> Split:
    """`a b c` becomes `a b c`: 3 to 9 symbols."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (rows,), generator=draw).tolist()
    texts = [
        " ".join("abcdefgh"[i] for i in torch.randint(0, 8, (n,), generator=draw).tolist())
        for n in lengths
    ]
    side = Side.of(texts, SYMBOLS)
    return Split("dev", side, side, texts, texts)


@pytest.fixture(scope="module")
def learnt(one_thread: None) -> tuple[dict[str, float], dict[str, float], MemoryTracker]:
    """Diagonality before and after a model has learnt to copy."""
    train, dev, tracker = copies(0, 32 * 150), copies(1, 40), MemoryTracker()
    watch = AttentionWatch(dev, (SYMBOLS, SYMBOLS))
    model = build("rnn-small", width=48, encoder_units=24, dropout=0.0)
    before = dict(watch.look(model, tracker, 0))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(150):
        batch = train.batch(np.arange(32 * step, 32 * (step + 1)))
        loss = target_nll(model, model(batch), batch, label_smoothing=0.0)
        optimizer.zero_grad()
        (loss.total / batch.tokens).backward()
        optimizer.step()
    return before, dict(watch.look(model, tracker, 150)), tracker


def test_diagonality_rises_when_a_monotone_task_is_learnt(learnt):
    before, after, tracker = learnt
    assert abs(before["dev/diagonality"]) < 0.3
    assert after["dev/diagonality"] > 0.85
    assert set(tracker.artifacts) == {
        "attention/attend/step-00000000.png", "attention/attend/step-00000150.png"
    }  # fmt: skip


def test_a_reversing_model_is_watched_on_real_shards(reversal: ShardSet):
    dev = load_split(reversal, "dev")
    watch = AttentionWatch(dev, tokenizers(reversal))
    model = named_model("transformer", SMALL).build(
        Vocabulary(reversal.source_size, reversal.target_size)
    )
    found = watch.diagonality(model)
    assert list(found) == ["decoder.0.dec_enc"]
    assert len(found["decoder.0.dec_enc"]) == 4
    # Each sentence alone gives what the batch gives.
    rows = np.unique(np.linspace(0, len(dev) - 1, 32).astype(int))
    alone = []
    for row in rows:
        weights = model.attention(dev.batch(np.array([row])))["decoder.0.dec_enc"]
        alone.append(diagonality(weights[0].numpy()))
    np.testing.assert_allclose(found["decoder.0.dec_enc"], np.mean(alone, 0), atol=1e-5)


def test_nothing_is_said_of_a_model_that_does_not_attend():
    tracker = MemoryTracker()
    watch = AttentionWatch(copies(0, 8), (SYMBOLS, SYMBOLS))
    assert watch.look(build("rnn"), tracker, 1) == {}
    assert not tracker.artifacts


def test_one_sentence_is_enough_where_sentences_are_long():
    dev = copies(0, 40)
    long = Side.of(["a " * 60] * 40, SYMBOLS)
    assert len(AttentionWatch(dev, (SYMBOLS, SYMBOLS))._batch.rows_B) == 32
    watch = AttentionWatch(Split("dev", long, dev.target, [], []), (SYMBOLS, SYMBOLS))
    assert len(watch._batch.rows_B) == 1


# --- a bundle ------------------------------------------------------------------------------------


@pytest.fixture
def bundle(reversal: ShardSet, tmp_path: Path):
    def make(name: str = "transformer", **changes: object):
        model = named_model(name, changes or SMALL)
        experiment = Experiment(task=reversal.task, model=model)
        torch.manual_seed(0)
        weights = model.build(Vocabulary(reversal.source_size, reversal.target_size)).state_dict()
        folder = save_bundle(
            tmp_path / "bundle", experiment=experiment, weights=weights,
            tokenizers=tokenizers(reversal), scores={},
        )  # fmt: skip
        return load_bundle(folder)

    return make


def test_attend_to_a_given_and_to_its_own_output(bundle):
    model = bundle()
    found = attention_of(model, "a b c", "f e")
    assert (found.target, found.is_forced) == ("f e", True)
    assert found.maps[2].rows.labels == ("f", "e", "</s>")
    module, head, value = found.best()
    assert module == "decoder.0.dec_enc"
    assert value == max(found.maps[2].diagonality) == found.maps[2].diagonality[head]
    own = attention_of(model, "a b c")
    assert own.is_forced is False
    assert own.target == model.translate(["a b c"])[0]
    *said, end = own.maps[2].rows.labels
    assert end == "</s>"
    assert [label for label in said if label != "<s>"] == own.target.split()


def test_heads_inside_the_encoder_are_told_from_those_of_the_decoder(bundle):
    model = bundle().model
    names = list(model.attention(pair("a", "b")))
    assert [kind_of(model, name) for name in names] == ["source", "output", "cross"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("",), "line 1: nothing to read"),
        (("a " * 30,), "line 1: 31 tokens"),
        (("a", "b " * 20), "target: 20 tokens; expected at most 19"),
    ],
)
def test_sentences_that_are_refused(bundle, words, told):
    with pytest.raises(DataError, match=told):
        attention_of(bundle(), *words)


def test_a_model_without_attention_is_named(bundle):
    with pytest.raises(DataError, match=r"trainables\.rnn has no attention.*Fix"):
        attention_of(bundle("rnn", width=16), "a b")
