"""Cleaning: what is compared how, what is dropped, and that nothing goes uncounted."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vinedresser.config import Cleaning, Task, Tokenizer
from vinedresser.data.batching.reader import load_split
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.corpora.row import Pairs, RowCounts
from vinedresser.data.prepare.clean import clean, fold_all, folded
from vinedresser.data.prepare.hashing import count_repeats, find_repeats, hash_pairs, save_hashes
from vinedresser.data.shards import prepare
from vinedresser.errors import DataError

# Every character that UTF-8 can hold and a line can hold; NUL is refused as no text.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\n\x00")
TEXTS = st.text(CHARACTERS | st.sampled_from(" \t\x0b\x85\u2028\xa0\r\ufeffäÄß"), max_size=12)


@given(st.lists(st.text(CHARACTERS | st.sampled_from(" \n\t\x85\xa0ǅßİ"), max_size=9)))
def test_folding_many_is_folding_each(texts):
    assert fold_all(texts) == [folded(text) for text in texts]


def test_folding_looks_through_case_width_and_spacing():
    assert folded(" Ａ  STRASSE\xa0x ") == folded("a straße x") == "a strasse x"
    assert folded("a b") != folded("ab")


def write_task(folder: Path, train, **changes) -> Task:
    pairs = {}
    for split, rows in (("train", train), ("dev", [("dev a", "b")]), ("test", [("test a", "b")])):
        sides = {}
        for side, at in (("source", 0), ("target", 1)):
            path = folder / f"{split}.{side}"
            path.write_bytes("".join(row[at] + "\n" for row in rows).encode())
            sides[side] = str(path)
        pairs[split] = Pair(**sides)
    fields = {
        "tokenizer": Tokenizer(kind="characters"),
        "max_source_length": 9,
        "max_target_length": 9,
        **changes,
    }
    return Task(name="toy", corpus=TextCorpus(**pairs), metric="cer", **fields)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=25),
    st.builds(
        Cleaning,
        max_ratio=st.sampled_from([0, 2.0]),
        dedup=st.booleans(),
        control_characters=st.sampled_from(["keep", "drop"]),
        leakage=st.sampled_from(["allow", "drop"]),
        max_drop_ratio=st.just(1.0),
    ),
    st.integers(1, 30),
)
def test_rows_in_are_rows_out_and_itemised_drops(tmp_path_factory, rows, cleaning, block_rows):
    folder = tmp_path_factory.mktemp("any")
    rows = [*rows, ("kept", "kept")]
    task = write_task(folder, rows, cleaning=cleaning)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", block_rows)
        shards = prepare(task, folder / "out", executor="in_process")
    account = shards.meta["account"]["train"]
    assert account["rows_in"] == len(rows)
    assert account["rows_in"] == account["rows_out"] + sum(account["dropped"].values())
    split = load_split(shards, "train")
    assert len(split) == account["rows_out"] == shards.counts["train"]
    known = {"empty", "too_long", "ratio", "duplicate", "control_characters", "leaked"}
    assert set(account["dropped"]) <= known
    for reason, lines in account["first_lines"].items():
        assert len(lines) == min(10, account["dropped"][reason])
        assert lines == sorted(lines)
        assert all(1 <= line <= len(rows) for line in lines)


@pytest.mark.fault("D13")
def test_repeats_are_counted_and_dropped_keeping_the_first(tmp_path):
    rows = [(f"s{i}", f"t{i}") for i in range(20)]
    rows += [rows[3], ("s3", "other"), rows[3], rows[7], ("t4", "s4")]
    shards = prepare(write_task(tmp_path, rows), tmp_path / "a")
    assert shards.meta["overlap"]["train_repeats"] == 3
    assert shards.counts["train"] == 25
    task = write_task(tmp_path, rows, cleaning=Cleaning(dedup=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 6)
        shards = prepare(task, tmp_path / "b")
    account = shards.meta["account"]["train"]
    assert account["dropped"] == {"duplicate": 3}
    assert account["first_lines"] == {"duplicate": [21, 23, 24]}
    assert shards.meta["overlap"]["train_repeats"] == 0


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 5))
def test_repeats_over_files_against_brute_force(tmp_path_factory, values, files):
    folder = tmp_path_factory.mktemp("hashes")
    texts = [str(value) for value in values]
    hashes, lines = hash_pairs(texts, texts), np.arange(1, len(texts) + 1)
    paths = []
    for index, part in enumerate(np.array_split(np.arange(len(texts)), files)):
        paths.append(folder / f"{index}.npy")
        save_hashes(paths[-1], hashes[part], lines[part])
    later = [i + 1 for i, value in enumerate(values) if value in values[:i]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vinedresser.data.prepare.hashing._AT_A_TIME", 7)
        assert count_repeats(paths) == len(later)
        found = [line for _, some in find_repeats(paths) for line in some.tolist()]
    assert sorted(found) == later


def test_pairs_are_not_confused_by_their_order():
    one, other = hash_pairs(["a", "b"], ["b", "a"])
    assert one != other


@pytest.mark.parametrize("rule", ["keep", "drop"])
def test_control_characters_are_counted_and_dropped_on_request(tmp_path, rule):
    rows = [("a\x07", "b"), ("c\td", "e"), ("f", "g\x85"), ("h", "«i»"), ("j", "k"), ("l", "m")]
    task = write_task(tmp_path, rows, cleaning=Cleaning(control_characters=rule))
    shards = prepare(task, tmp_path / "out")
    assert shards.counts["train"] == (6 if rule == "keep" else 4)
    note = "train: 2 rows hold control characters, first lines 1, 3"
    assert any(text.startswith(note) for text in shards.meta["notes"])
    expected = {} if rule == "keep" else {"control_characters": 2}
    assert shards.meta["account"]["train"]["dropped"] == expected


def test_a_ratio_limit_drops_from_train_alone(tmp_path):
    rows = [("aaaaaaa", "b"), ("aaa", "bbb"), ("aa", "bbb"), ("a", "b")]
    task = write_task(tmp_path, rows, cleaning=Cleaning(max_ratio=2))
    shards = prepare(task, tmp_path / "out")
    assert shards.meta["account"]["train"]["dropped"] == {"ratio": 1}
    assert shards.counts["dev"] == 1  # "dev a" and "b" are 6 and 2 tokens


@pytest.mark.fault("D03")
def test_too_much_lost_is_refused(tmp_path):
    rows = [("a" * 20, "b")] * 6 + [("c", "d")] * 4
    with pytest.raises(
        DataError, match=r"6 of 10 pairs dropped.*max_drop_ratio=0.5.*lines"
    ) as error:
        prepare(write_task(tmp_path, rows), tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []
    task = write_task(tmp_path, rows, cleaning=Cleaning(max_drop_ratio=0.6))
    assert prepare(task, tmp_path / "out").counts["train"] == 4


def test_leaked_rows(tmp_path):
    rows = [(f"s{i}", f"t{i}") for i in range(20)]
    rows[4], rows[9], rows[11] = ("TEST  a", "B"), ("test a", "other"), ("dev a", "b")
    with pytest.raises(DataError) as error:
        prepare(write_task(tmp_path, rows), tmp_path / "out")
    assert "1 train rows are in test, source and target; train lines 5." in str(error.value)
    for rule, dropped in (("drop", {"leaked": 3}), ("allow", {})):
        task = write_task(tmp_path, rows, cleaning=Cleaning(leakage=rule))
        shards = prepare(task, tmp_path / "out")
        assert shards.meta["account"]["train"]["dropped"] == dropped
        found = shards.meta["overlap"]
        assert found["test"] == {
            "pairs": 1, "sources": 2, "pair_lines": [5], "train_lines": [5, 10],
        }  # fmt: skip
        assert found["dev"]["pair_lines"] == [12]


@pytest.mark.fault("D02")
def test_strict_alignment_refuses_what_is_a_warning_else(tmp_path):
    counts = np.random.default_rng(0).integers(1, 9, 300)
    rows = [("a" * int(n), "b" * int(m)) for n, m in zip(counts, np.roll(counts, 1), strict=True)]
    rows = [(f"{source}", target) for source, target in rows]
    shards = prepare(write_task(tmp_path, rows), tmp_path / "out")
    assert any("shifted against each other" in note for note in shards.meta["notes"])
    task = write_task(tmp_path, rows, cleaning=Cleaning(strict_alignment=True))
    with pytest.raises(DataError, match=r"shifted against each other.*strict_alignment=false"):
        prepare(task, tmp_path / "out")


def test_dev_and_test_keep_all_but_empty_rows():
    task = Task.from_json(
        {
            "name": "t", "metric": "bleu", "tokenizer": {"kind": "characters"},
            "corpus": {split: {"source": "a", "target": "b"} for split in ("train", "dev")},
            "cleaning": {"control_characters": "drop"}, "max_source_length": 1,
        },
        where="test",
    )  # fmt: skip
    pairs = Pairs(["a\x07" * 999, " "], ["b", "c"], np.array([1, 2]))
    for split, left in (("dev", 1), ("test", 1), ("train", 0)):
        account = RowCounts(rows_in=2)
        assert len(clean(pairs, split, task, account)[0]) == left == account.rows_out


def test_a_side_of_which_no_token_is_left_is_empty(tmp_path):
    rows = [*((f"a{i} b", f"c d{i}") for i in range(9)), ("\u200b", "a b"), ("a b", "\ufeff\u200b")]
    pieces = Tokenizer(kind="bpe", vocab_size=30, shrink=True)
    shards = prepare(write_task(tmp_path, rows, tokenizer=pieces), tmp_path / "out")
    account = shards.meta["account"]["train"]
    assert account["dropped"] == {"empty": 2}
    assert account["first_lines"] == {"empty": [10, 11]}
    split = load_split(shards, "train")
    assert min(split.source_lengths.min(), split.target_lengths.min()) > 1


def test_what_dev_and_test_share_is_told(tmp_path):
    task = write_task(tmp_path, [("a", "b")] * 3)
    assert not [n for n in prepare(task, tmp_path / "out").meta["notes"] if "are in dev" in n]
    (tmp_path / "test.source").write_text("Dev  A\ndev a\nx\n")
    (tmp_path / "test.target").write_text("c\nB\nb\n")
    notes = prepare(task, tmp_path / "out").meta["notes"]
    assert "test: warning: 1 sources are in dev, 1 of them with their target" in notes
