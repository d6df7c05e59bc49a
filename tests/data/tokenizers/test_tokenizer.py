import threading
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vinedresser.config import Tokenizer
from vinedresser.data.tokenizers import pieces
from vinedresser.data.tokenizers.flat import flattened
from vinedresser.data.tokenizers.tokenizer import (
    BOS,
    EOS,
    PAD,
    UNK,
    load_tokenizer,
    train_tokenizer,
)
from vinedresser.errors import DataError

TEXTS = [f"ein kleiner hund {i} läuft über die wiese {i * 7}" for i in range(200)]
KINDS = ("bpe", "unigram", "characters", "symbols")


def trained(kind: str, size: int = 60):
    return train_tokenizer(Tokenizer(kind=kind, vocab_size=size), TEXTS)


DECODERS = [trained("bpe"), trained("characters")]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_reload(kind, tmp_path):
    made = trained(kind)
    made.save(tmp_path, "t")
    loaded = load_tokenizer(tmp_path, "t")
    assert (loaded.digest, loaded.size) == (made.digest, made.size)
    for text in TEXTS[:5]:
        ids = loaded.encode(text)
        assert ids == made.encode(text)
        assert min(ids) >= 3
        assert loaded.decode([1, *ids, 2, 0, 0]) == text
    assert loaded.encode_many(TEXTS) == [loaded.encode(text) for text in TEXTS]
    assert trained(kind).digest == made.digest


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_wanted_vocabulary_is_reached(kind):
    assert trained(kind).size == 60


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_and_composed(kind):
    made = trained(kind)
    assert 3 in made.encode("ein ☃")
    assert made.encode(unicodedata.normalize("NFD", "läuft über")) == made.encode("läuft über")


@pytest.mark.parametrize("kind", KINDS)
def test_each_id_has_a_piece_that_can_be_read(kind):
    made = trained(kind)
    ids = made.encode("ein kleiner hund")
    pieces = made.pieces([BOS, *ids, EOS])
    assert (pieces[0], pieces[-1]) == ("<s>", "</s>")
    assert len(pieces) == len(ids) + 2
    glue = " " if kind == "symbols" else ""
    assert glue.join(pieces[1:-1]).replace("\u2581", " ").strip() == "ein kleiner hund"
    assert len(set(made.pieces(range(made.size)))) == made.size


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_characters_round_trip(text):
    text = unicodedata.normalize("NFC", text)
    made = train_tokenizer(Tokenizer(kind="characters"), [text, "a"])
    assert made.decode(made.encode(text)) == text


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)))
def test_symbols_round_trip(symbols):
    text = " ".join(unicodedata.normalize("NFC", " ".join(symbols)).split())
    made = train_tokenizer(Tokenizer(kind="symbols"), [text, "a"])
    assert made.decode(made.encode(text)) == text


@given(st.lists(st.integers(0, 59)))
def test_any_ids_decode_to_their_pieces(ids):
    """A decoder's output may be any ids: their text is that of their pieces, specials left out."""
    for made in DECODERS:
        known = [i % made.size for i in ids]
        text = made.decode(known)
        assert text == made.decode([i for i in known if i not in (PAD, BOS, EOS)])
        pieces = [piece for i, piece in zip(known, made.pieces(known), strict=True) if i > UNK]
        if UNK not in known:
            joined = "".join(pieces).replace("\u2581", " ")
            assert text.replace(" ", "") == joined.replace(" ", "")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_refusals_are_in_our_words(kind):
    def refusal(size, texts):
        with pytest.raises(DataError) as caught:
            train_tokenizer(Tokenizer(kind=kind, vocab_size=size), texts)
        found = str(caught.value)
        assert "INTERNAL" not in found
        assert ".cc" not in found
        return found

    assert "gives at most" in refusal(8000, ["ein hund", "zwei katzen"])
    assert "set vocab_size=" in refusal(8, TEXTS)
    assert "no training line of 1 to 4192 bytes" in refusal(100, ["x" * 5000])
    assert "0 texts" in refusal(100, [])
    assert "0 texts" in refusal(100, [" ", ""])


def test_lone_surrogate_is_named():
    with pytest.raises(DataError, match=r"text 1, character 2: U\+D800"):
        trained("bpe").encode("a\ud800")


def test_damaged_files(tmp_path):
    with pytest.raises(DataError, match=r"t.json: no such file"):
        load_tokenizer(tmp_path, "t")
    trained("bpe").save(tmp_path, "t")
    (tmp_path / "t.model").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"t.model: not a tokenizer"):
        load_tokenizer(tmp_path, "t")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match=r"t.json: not a tokenizer"):
        load_tokenizer(tmp_path, "t")


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
LIKE_TEXTS = st.text("hund eiläwxX\u2581\u3000\xa0\u0308\t\0⁇ﬁ日")
IDENTITY = {"normalization": "identity", "byte_fallback": True}


def small(kind, **options):
    return train_tokenizer(Tokenizer(kind=kind, **options), TEXTS)


LOSSLESS = [small(kind, vocab_size=300, **IDENTITY) for kind in ("bpe", "unigram")]


@given(ANY_TEXT)
@example(" a  b ")
@example("\t\n\x00\ufeff\x7f")
@example("e\u0301 ﬁ 日本 😀")
def test_identity_with_bytes_gives_every_text_back(text):
    for made in LOSSLESS:
        if "\u2581" not in text:
            assert made.decode(made.encode(text)) == text
        assert UNK not in made.encode(text)


def test_what_the_sign_for_a_space_becomes():
    assert LOSSLESS[0].decode(LOSSLESS[0].encode("a\u2581b")) == "a b"


FLAT = [small("bpe", vocab_size=60), small("unigram", vocab_size=60), small("characters")]
FLAT += [*LOSSLESS, small("symbols"), small("bpe", vocab_size=60, lowercase=True)]


@given(st.lists(ANY_TEXT | LIKE_TEXTS | st.sampled_from(TEXTS), max_size=8))
def test_flat_is_encode_many_with_ends(texts):
    for made in FLAT:
        for repeated in (texts, texts * 9):  # enough repeats for words to be looked up
            values, lengths = made.flat(repeated)
            expected = flattened(made.encode_many(repeated))
            assert values.tolist() == expected.values.tolist()
            assert lengths.tolist() == expected.lengths.tolist()
            assert (values[np.cumsum(lengths) - 1] == EOS).all()


def test_flat_forgets_when_it_knows_too_many_words(monkeypatch):
    monkeypatch.setattr(pieces, "_MAX_WORDS", 30)
    made = trained("bpe")
    for start in range(0, 200, 20):
        texts = TEXTS[start : start + 20] * 3
        assert (
            made.flat(texts).values.tolist() == flattened(made.encode_many(texts)).values.tolist()
        )
        assert len(made._words._places) <= 31 + len(set(" ".join(texts).split()))


def test_flat_of_real_text(shared_data):
    lines = (shared_data / "multi30k/train.de").read_text().splitlines()[:4000]
    for kind in ("bpe", "unigram"):
        made = train_tokenizer(Tokenizer(kind=kind, vocab_size=2000), lines[:2000])
        expected = flattened(made.encode_many(lines))
        for _ in range(2):
            found = made.flat(lines)
            assert np.array_equal(found.values, expected.values)
            assert np.array_equal(found.lengths, expected.lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_lower_case(kind, tmp_path):
    made = train_tokenizer(Tokenizer(kind=kind, vocab_size=60, lowercase=True), TEXTS)
    made.save(tmp_path, "t")
    loaded = load_tokenizer(tmp_path, "t")
    text = "EIN Hund LÄUFT"
    assert loaded.encode(text) == made.encode(text) == made.encode("ein hund läuft")
    assert loaded.decode(loaded.encode(text)) == "ein hund läuft"
    assert loaded.folds_case
    assert made.digest == loaded.digest != trained(kind).digest
    assert not trained(kind).folds_case
    assert UNK in trained(kind).encode(text)


def test_folding_normalisation_folds_case():
    assert small("bpe", vocab_size=60, normalization="nmt_nfkc_cf").folds_case


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_shrink_takes_the_largest_vocabulary_there_is(kind):
    with pytest.raises(
        DataError, match=r"gives at most (\d+) pieces\. Fix: .*shrink=true"
    ) as caught:
        train_tokenizer(Tokenizer(kind=kind), TEXTS)
    made = train_tokenizer(Tokenizer(kind=kind, shrink=True), TEXTS)
    assert f"at most {made.size} pieces" in str(caught.value)
    assert made.decode(made.encode(TEXTS[0])) == TEXTS[0]
    assert train_tokenizer(Tokenizer(kind=kind, shrink=True, vocab_size=60), TEXTS).size == 60


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_resampling(kind):
    made = trained(kind, 100)
    rows = made.encode_many([*TEXTS, "ein ☃", ""])
    drawn = made.resample(rows, alpha=0.3, seed=7)
    assert [made.decode(row) for row in drawn] == [made.decode(row) for row in rows]
    assert drawn[-2:] == rows[-2:]  # a text that is lost, and an empty one
    assert sum(map(len, drawn)) > sum(map(len, rows))
    assert drawn == made.resample(rows, alpha=0.3, seed=7)
    assert drawn != made.resample(rows, alpha=0.3, seed=8)
    made.resample(rows[:3], alpha=0.5, seed=1)
    elsewhere = []

    def draw():
        elsewhere.append(made.resample(rows, alpha=0.3, seed=7))

    thread = threading.Thread(target=draw)
    thread.start()
    made.resample(rows, alpha=0.3, seed=9)
    thread.join()
    assert elsewhere == [drawn]


@given(st.lists(st.sampled_from(["a", "b", "ü", "C"]), max_size=9), st.booleans())
def test_symbols_and_characters_promise(parts, lowercase):
    for kind, join in (("symbols", " "), ("characters", "")):
        made = train_tokenizer(Tokenizer(kind=kind, lowercase=lowercase), ["a b ü C c"])
        text = join.join(parts)
        assert made.decode(made.encode(text)) == (text.lower() if lowercase else text)
