import json
import math
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest
import sacrebleu

from vinedresser.errors import DataError
from vinedresser.metrics import (
    METRICS,
    is_better,
    is_lower_better,
    measure,
    sentence_scores,
    worst,
)

HYPOTHESES = ["the cat sat on a mat", "hello there world", "one two three four five"]
REFERENCES = ["the cat sat on the mat", "hello world", "one two three four five"]
ALL = tuple(METRICS)


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_points_equal_sacrebleu(name):
    wanted = getattr(sacrebleu, f"corpus_{name}")(HYPOTHESES, [REFERENCES]).score
    found = measure(name, HYPOTHESES, REFERENCES)
    assert found.value == pytest.approx(wanted)
    assert 0 < found.value < 100
    assert f"version:{sacrebleu.__version__}" in found.signature


def test_bleu_signature_says_how():
    signature = measure("bleu", HYPOTHESES, REFERENCES).signature
    assert signature.startswith("bleu|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")


@pytest.mark.parametrize(
    ("name", "rate"), [("per", jiwer.wer), ("wer", jiwer.wer), ("cer", jiwer.cer)]
)
def test_edit_rates_equal_jiwer_in_percent(name, rate):
    found = measure(name, HYPOTHESES, REFERENCES)
    assert found.value == pytest.approx(100 * rate(REFERENCES, HYPOTHESES))
    assert name in found.signature
    assert "jiwer:" in found.signature


def test_edit_rates_by_hand():
    # One substitution and one insertion over 6 + 2 + 5 words.
    assert measure("wer", HYPOTHESES, REFERENCES).value == pytest.approx(100 * 2 / 13)
    assert measure("per", ["AH B"], ["AH B K"]).value == pytest.approx(100 / 3)
    assert measure("cer", ["abd"], ["abc"]).value == pytest.approx(100 / 3)


def test_an_edit_rate_may_exceed_100():
    assert measure("per", ["A B C D"], ["X"]).value == 400


def test_corpus_rates_weigh_by_length_not_by_sentence():
    found = measure("per", ["A", "A A A A A A A A A"], ["B", "A A A A A A A A A"])
    assert found.value == pytest.approx(10)


@pytest.mark.parametrize("name", ALL)
def test_nothing_said_is_scored_as_bad(name):
    said_nothing = measure(name, [""] * 3, REFERENCES).value
    assert said_nothing == (100 if is_lower_better(name) else 0)


@pytest.mark.parametrize("name", ALL)
def test_identical_is_perfect(name):
    value = measure(name, REFERENCES, REFERENCES).value
    assert value == pytest.approx(0 if is_lower_better(name) else 100)


@pytest.mark.parametrize("name", ALL)
def test_direction(name):
    good = measure(name, HYPOTHESES, REFERENCES).value
    bad = measure(name, HYPOTHESES[::-1], REFERENCES).value
    assert is_better(name, good, bad)
    assert not is_better(name, bad, good)
    assert not is_better(name, good, good)
    assert not is_better(name, float("nan"), good)
    assert is_better(name, bad, worst(name))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("hypotheses", "references"), [(["a", "b"], ["a"]), (["a"], ["a", "b"]), ([], [])]
)
def test_lengths_must_match_and_be_something(name, hypotheses, references):
    with pytest.raises(DataError, match=f"{len(hypotheses)} hypotheses for {len(references)}"):
        measure(name, hypotheses, references)


def test_the_sequence_error_rate_counts_sentences_in_percent():
    found = measure("ser", HYPOTHESES, REFERENCES)
    assert found.value == pytest.approx(200 / 3)
    assert found.signature == "ser|nrefs:1|unit:sentences"


def test_wer_of_symbols_counts_them_as_words():
    """Two words, one of whose four phones is wrong: the field's WER of pronunciations is `ser`."""
    said, meant = ["AH B", "K AE"], ["AH B", "K AH"]
    assert measure("wer", said, meant).value == measure("per", said, meant).value == 25
    assert measure("ser", said, meant).value == 50


@pytest.mark.parametrize("name", ALL)
def test_sentence_scores(name):
    scores = sentence_scores(name, HYPOTHESES, REFERENCES)
    perfect = sentence_scores(name, REFERENCES, REFERENCES)
    assert perfect == pytest.approx([0 if is_lower_better(name) else 100] * 3)
    assert is_better(name, scores[2], scores[0])
    assert scores[2] == pytest.approx(perfect[2])


def test_sentence_scores_by_hand():
    assert sentence_scores("wer", HYPOTHESES, REFERENCES) == pytest.approx([100 / 6, 50, 0])
    assert sentence_scores("ser", HYPOTHESES, REFERENCES) == [100, 100, 0]
    wanted = sacrebleu.sentence_bleu(HYPOTHESES[0], [REFERENCES[0]]).score
    assert sentence_scores("bleu", HYPOTHESES, REFERENCES)[0] == pytest.approx(wanted)
    folded = sentence_scores("ser", ["a"], ["A"], folds_case=True)
    assert (folded, sentence_scores("ser", ["a"], ["A"])) == ([0], [100])


@pytest.mark.parametrize("metric", ALL)
def test_folded_case_is_in_the_signature_and_in_the_score(metric):
    hypotheses, references = ["the cat sat on a mat"], ["The Cat sat on a MAT"]
    plain = measure(metric, hypotheses, references)
    folded = measure(metric, hypotheses, references, folds_case=True)
    assert "case:lc" in folded.signature
    assert folded.value == pytest.approx(measure(metric, hypotheses, hypotheses).value)
    if metric not in ("ter", "rouge1", "rouge2", "rougel"):  # these never look at case
        assert "case:lc" not in plain.signature
        assert is_better(metric, folded.value, plain.value)


def test_sequence_errors_without_case():
    assert measure("ser", ["a b"], ["A b"]).value == 100
    assert measure("ser", ["a b", "c"], ["A b", "D"], folds_case=True).value == 50


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(("hypothesis", "reference"), [("a b", ""), ("", "a b"), ("", "")])
def test_an_empty_side_has_a_value(metric, hypothesis, reference):
    value = measure(metric, ["x y z w", hypothesis], ["x y z w", reference]).value
    assert 0 <= value <= 200
    alone = sentence_scores(metric, [hypothesis], [reference])[0]
    if hypothesis != reference:
        assert alone == 0 or is_lower_better(metric)
        assert is_better(metric, sentence_scores(metric, ["a b"], ["a b"])[0], alone)
    else:
        assert math.isfinite(alone)


def test_exact_is_the_share_without_an_error():
    found = measure("exact", HYPOTHESES, REFERENCES)
    assert found.value == pytest.approx(100 / 3)
    assert found.signature == "exact|nrefs:1|unit:sentences"


def test_rouge_by_hand():
    said, meant = ["the cat sat"], ["the cat sat on it"]
    # 3 of 3 and 3 of 5 words; 2 of 2 and 2 of 4 pairs of words.
    assert measure("rouge1", said, meant).value == pytest.approx(100 * 2 * 3 / 8)
    assert measure("rouge2", said, meant).value == pytest.approx(100 * 2 * 2 / 6)
    assert measure("rougel", ["sat the cat"], ["the cat sat"]).value == pytest.approx(200 / 3)
    assert "version:" in measure("rougel", said, meant).signature


def run_tool(name, *words):
    tool = Path(sys.executable).with_name(name)
    done = subprocess.run([tool, *words], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_the_command_lines_of_the_libraries_give_the_same_values(tmp_path):
    for name, lines in (("said", HYPOTHESES), ("meant", REFERENCES)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    said, meant = str(tmp_path / "said"), str(tmp_path / "meant")
    found = run_tool(
        "sacrebleu", meant, "-i", said, "-m", "bleu", "chrf", "ter", "-f", "json", "-w", "4"
    )
    for entry in json.loads(found):
        name = {"BLEU": "bleu", "chrF2": "chrf", "TER": "ter"}[entry["name"]]
        measured = measure(name, HYPOTHESES, REFERENCES)
        assert measured.value == pytest.approx(entry["score"], abs=1e-4)
        assert measured.signature == f"{name}|{entry['signature']}"
    for metric, flags in (("wer", []), ("cer", ["--cer"])):
        rate = float(run_tool("jiwer", "-r", meant, "-h", said, *flags))
        assert 100 * rate == pytest.approx(measure(metric, HYPOTHESES, REFERENCES).value)
