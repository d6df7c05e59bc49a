import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vinedresser import batch
from vinedresser.config import Tokenizer
from vinedresser.data.tokenizers import (
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


def test_special_ids_are_the_batch_s():
    assert (PAD, BOS, EOS, UNK) == (batch.PAD, batch.BOS, batch.EOS, batch.UNK)


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
def test_any_ids_can_be_decoded(ids):
    for made in DECODERS:
        made.decode([i % made.size for i in ids])


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
