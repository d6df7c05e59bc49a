"""Drawn segmentations: their probabilities, and that no process draws other ones."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter

import pytest

from vinedresser.config import Tokenizer
from vinedresser.data.tokenizers.pieces import SentencePiece
from vinedresser.data.tokenizers.resampling import Resampler
from vinedresser.data.tokenizers.tokenizer import train_tokenizer

PIECES = ["<unk>", "▁", "a", "b", "ab", "▁a", "▁ab", "bb", "<0x0A>"]
IS_PLAIN = [False, *[True] * 7, False]
DRAWS = 40_000


def drawn(kind: str, scores: list[float], row: list[int], alpha: float) -> dict[str, float]:
    """Shares of the segmentations of one row."""
    found = Resampler(kind, PIECES, scores, IS_PLAIN)(DRAWS * [row], alpha=alpha, seed=1)
    return {
        " ".join(PIECES[i] for i in ids): count / DRAWS
        for ids, count in Counter(map(tuple, found)).items()
    }


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_unigram_draws_in_proportion_to_the_power_of_alpha(alpha):
    scores = [0.0, -1.0, -2.0, -1.5, -2.2, -1.8, -3.0, -2.5, 0.0]
    text, weights = "▁abb", {}
    for cuts in itertools.product([False, True], repeat=3):
        parts = [""]
        for letter, cut in zip(text, (False, *cuts), strict=True):
            if cut:
                parts.append("")
            parts[-1] += letter
        if all(part in PIECES for part in parts):
            score = sum(scores[PIECES.index(part)] for part in parts)
            weights[" ".join(parts)] = math.exp(alpha * score)
    assert len(weights) == 6
    found = drawn("unigram", scores, [1, 2, 3, 3], alpha)
    for parts, weight in weights.items():
        # Four standard deviations of a share, at the most.
        assert found[parts] == pytest.approx(weight / sum(weights.values()), abs=2 / DRAWS**0.5)


def test_bpe_leaves_out_merges():
    """By hand: of ▁ab, ab is merged first, then ▁ with it; if ab is left out, ▁a may follow."""
    scores = [0.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0, 0.0]
    p = 0.3
    found = drawn("bpe", scores, [1, 2, 3], p)
    wanted = {
        "▁ab": (1 - p) * (1 - p) + p * (1 - p) * (1 - p),
        "▁ ab": (1 - p) * p,
        "▁a b": p * (1 - p) * p,
        "▁ a b": p * p,
    }
    assert sum(wanted.values()) == pytest.approx(1)
    for parts, share in wanted.items():
        assert found[parts] == pytest.approx(share, abs=2 / DRAWS**0.5)
    assert drawn("bpe", scores, [1, 2, 3], 0.0) == {"▁ab": 1.0}


def test_what_is_no_piece_stays_where_it_is():
    row = [5, 8, 3, 3, 6, 6]
    for kind in ("bpe", "unigram"):
        scores = [float(-i) for i in range(len(PIECES))]
        made = Resampler(kind, PIECES, scores, IS_PLAIN)
        for ids in made(50 * [row], alpha=0.5, seed=3):
            assert "".join(PIECES[i] for i in ids) == "▁a<0x0A>bb▁ab▁ab"
            assert ids.count(8) == 1


AGAIN = """
import json, sys
from pathlib import Path
from vinedresser.data.tokenizers.tokenizer import load_tokenizer
made = load_tokenizer(Path(sys.argv[1]), "joint")
print(json.dumps(made.resample(json.loads(sys.argv[2]), alpha=0.3, seed=7)))
"""


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_another_process_draws_the_same(tmp_path, kind):
    """SentencePiece 0.2.3 does not, whatever its seed."""
    texts = [f"der {a}{b} über {b}{a} größe" for a in "abcdef" for b in "ghijkl"]
    made = train_tokenizer(Tokenizer(kind=kind, vocab_size=60, shrink=True), texts)
    assert isinstance(made, SentencePiece)
    made.save(tmp_path, "joint")
    rows = made.encode_many(texts)
    here = made.resample(rows, alpha=0.3, seed=7)
    assert here != rows
    assert [made.decode(row) for row in here] == [made.decode(row) for row in rows]
    words = [sys.executable, "-c", AGAIN, str(tmp_path), json.dumps(rows)]
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == here
