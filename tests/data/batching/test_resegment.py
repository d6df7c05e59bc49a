import itertools
import random

import numpy as np
import pytest

from vinedresser.config import Batching, Task, Tokenizer
from vinedresser.data.batching.reader import Batches, load_split, stream
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.shards import prepare, tokenizers
from vinedresser.errors import DataError
from vinedresser.special_ids import EOS, PAD

TOKENS = 120


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def shards(request, tmp_path_factory):
    """Two hundred lines of a small language, joint pieces; some letters are rare."""
    folder, draw = tmp_path_factory.mktemp(request.param), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(40)]
    pairs = {}
    for split, count in (("train", 200), ("dev", 5)):
        for side in ("source", "target"):
            lines = (" ".join(draw.choices(words, k=draw.randint(1, 8))) for _ in range(count))
            (folder / f"{split}.{side}").write_text("\n".join(lines) + "\n")
        source, target = (str(folder / f"{split}.{side}") for side in ("source", "target"))
        pairs[split] = Pair(source=source, target=target)
    task = Task(
        name="pieces",
        corpus=TextCorpus(**pairs),
        tokenizer=Tokenizer(kind=request.param, vocab_size=40),
        metric="bleu",
        max_source_length=45,
        max_target_length=45,
    )
    return prepare(task, folder / "shards", executor="in_process")


def an_epoch(shards, alpha, seed=1):
    batches = Batches(shards, Batching(max_padded_tokens=TOKENS, subword_alpha=alpha), seed=seed)
    return [batches[i] for i in range(batches.per_epoch)]


def rows_of(batch):
    for side, lengths in (
        (batch.source_BS, batch.source_lengths_B),
        (batch.target_BT, batch.target_lengths_B),
    ):
        for ids, length in zip(side.tolist(), lengths.tolist(), strict=True):
            assert ids[length - 1] == EOS
            assert set(ids[length:]) <= {PAD}
            yield ids[: length - 1]


def alpha_of(shards):
    """What changes most rows: more drops more merges of BPE, less flattens unigram."""
    return {"bpe": 0.3, "unigram": 0.05}[shards.task.tokenizer.kind]


@pytest.mark.parametrize("alpha", [None, 0.1, 0.9])
def test_the_text_stays_and_the_budget_holds(shards, alpha):
    tokenizer, _ = tokenizers(shards)
    whole, seen, changed = load_split(shards, "train"), [], 0
    for batch in an_epoch(shards, alpha or alpha_of(shards)):
        longest = max(batch.source_BS.shape[1], batch.target_BT.shape[1])
        assert len(batch.rows_B) * longest <= TOKENS
        assert longest <= 45
        plain = whole.batch(batch.rows_B.numpy())
        for drawn, row in zip(rows_of(batch), rows_of(plain), strict=True):
            assert tokenizer.decode(drawn) == tokenizer.decode(row)
            changed += drawn != row
        seen += batch.rows_B.tolist()
    assert sorted(seen) == list(range(200))
    assert alpha or changed > 120


def test_a_batch_is_drawn_anew_each_epoch_and_the_same_for_a_seed(shards):
    def content(batches):
        return {
            r: row for b in batches for r, row in zip(b.rows_B.tolist(), rows_of(b), strict=False)
        }

    alpha = alpha_of(shards)
    batching = Batching(max_padded_tokens=TOKENS, subword_alpha=alpha)
    first = [b.source_BS.tolist() for b in an_epoch(shards, alpha)]
    assert [b.source_BS.tolist() for b in an_epoch(shards, alpha)] == first
    count = len(first)
    read_ahead = itertools.islice(stream(shards, batching, seed=1), 2 * count)
    twice = list(read_ahead)
    assert [b.source_BS.tolist() for b in twice[:count]] == first
    resumed = next(stream(shards, batching, seed=1, at=count + 3))
    assert (resumed.source_BS == twice[count + 3].source_BS).all()
    one, other = content(twice[:count]), content(twice[count:])
    assert np.mean([one[row] != other[row] for row in one]) > 0.5


def test_room_is_left_for_nearly_all_rows(shards):
    # A row that becomes shorter or longer was drawn anew; few are sent back.
    def sizes(alpha):
        return {
            row: (s, t)
            for b in an_epoch(shards, alpha)
            for row, s, t in zip(
                b.rows_B.tolist(), b.source_lengths_B.tolist(), b.target_lengths_B.tolist(),
                strict=True,
            )
        }  # fmt: skip

    plain, drawn = sizes(0), sizes(alpha_of(shards))
    assert np.mean([drawn[row] != plain[row] for row in plain]) > 0.5
    assert len(an_epoch(shards, alpha_of(shards))) > 1.1 * len(an_epoch(shards, 0))


def test_sides_without_pieces_are_refused(reversal):
    with pytest.raises(DataError, match="no side of reversal has a bpe or unigram"):
        stream(reversal, Batching(subword_alpha=0.1), seed=0)


def test_rows_with_unknown_symbols_stay(shards):
    tokenizer, _ = tokenizers(shards)
    row = tokenizer.encode("abc \u4e00 abc")
    assert tokenizer.resample([row], alpha=0.9, seed=1) == [row]
    assert tokenizer.resample([], alpha=0.9, seed=1) == []
