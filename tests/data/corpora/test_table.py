"""Tables: TSV, JSON lines and Parquet, whole and damaged."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vinedresser.config import Task, Tokenizer
from vinedresser.data.corpora import row as row_module
from vinedresser.data.corpora.corpus import read
from vinedresser.data.corpora.kinds.table import TableCorpus
from vinedresser.data.corpora.row import RowCounts
from vinedresser.data.shards import prepare, tokenizers
from vinedresser.errors import DataError
from vinedresser.workspace.commit import verify

PAIRS = [(f"w{i} ä", f"x{i % 7} y") for i in range(30)]


def task_of(source="src", target="tgt", **files) -> Task:
    return Task(
        name="table",
        corpus=TableCorpus(kind="table", source=source, target=target, **files),
        tokenizer=Tokenizer(kind="characters"),
        metric="cer",
    )


def write(folder, kind, pairs, name):
    path = folder / f"{name}.{kind}"
    rows = [{"id": i, "tgt": t, "src": s} for i, (s, t) in enumerate(pairs)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=11)
    elif kind.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    else:
        lines = ["id\ttgt\tsrc", *(f"{row['id']}\t{row['tgt']}\t{row['src']}" for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "jsonl.gz", "parquet"])
def test_every_form_gives_the_same_rows_and_shards(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(row_module, "BLOCK_ROWS", 8)
    found = {}
    for each in ("tsv", kind):
        files = {s: write(tmp_path, each, PAIRS[a:b], s) for s, a, b in (
            ("train", 0, 20), ("dev", 20, 25), ("test", 25, 30))}  # fmt: skip
        task = task_of(**files)
        rows = [(row.source, row.target) for row in read(task, "train")]
        assert rows == PAIRS[:20]
        shards = prepare(task, tmp_path / each, executor="in_process")
        assert shards.counts == {"train": 20, "dev": 5, "test": 5}
        found[each] = {
            name: digest
            for name, digest in verify(shards.folder).files.items()
            if name.startswith(("dev", "test", "joint"))
        }
        assert not list(shards.folder.glob(".*"))
    assert found[kind] == found["tsv"]


def test_numbered_columns_mean_no_header(tmp_path):
    (tmp_path / "a.tsv").write_text("w1\tp h\nw2\tp x\n")
    task = task_of(1, 2, train=str(tmp_path / "a.tsv"), dev=str(tmp_path / "a.tsv"))
    assert [(row.source, row.line) for row in read(task, "train")] == [("w1", 1), ("w2", 2)]
    task = task_of(2, 1, train=str(tmp_path / "a.tsv"), dev=str(tmp_path / "a.tsv"))
    assert [row.source for row in read(task, "train")] == ["p h", "p x"]


def test_files_follow_each_other_and_nulls_are_empty(tmp_path):
    for name, rows in (("a", [("1", "x"), (None, "y")]), ("b", [("3", "z")])):
        table = pa.table({"src": [s for s, _ in rows], "tgt": [t for _, t in rows]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    account = RowCounts()
    task = task_of(train=str(tmp_path / "?.parquet"), dev=str(tmp_path / "b.parquet"))
    rows = list(read(task, "train", counts=account))
    assert [(row.source, row.line) for row in rows] == [("1", 1), ("3", 3)]
    assert account.dropped == {"empty": 1}


@pytest.mark.fault("D18", "D19")
@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.tsv", "src\ttgt\na\tb\nc\n", "a.tsv:3:2: 1 columns; expected 2, tab-separated"),
        ("a.tsv", "src\ttgt\na\tb\tc\n", "a.tsv:2:4: 3 columns; expected 2"),
        ("a.tsv", "src\tother\na\tb\n", "a.tsv:1:1: no column 'tgt'; expected a header line"),
        ("a.tsv", "src\ttgt\n", "a.tsv: a header and no row"),
        ("a.tsv", "src\ttgt\na\tb\n\n", "a.tsv:3:1: 1 columns"),
        ("a.jsonl", '{"src": "a", "tgt": "b"}\n{"src": "a"\n', "a.jsonl:2:12: not JSON"),
        ("a.jsonl", '{"src": "a", "tgd": "b"}\n', "a.jsonl:1:1: no key 'tgt', found 'src', 'tgd'"),
        ("a.jsonl", '["a", "b"]\n', "a.jsonl:1:1: list; expected an object with the keys 'src'"),
        ("a.jsonl", '{"src": 3, "tgt": "b"}\n', "a.jsonl:1:1: 'src' is int; expected text"),
        (
            "a.jsonl",
            '{"src": "a", "tgt": "b\\ud800"}\n',
            "a.jsonl:1:23: 'tgt', character 2: U+D800 is half a character",
        ),
        ("a.jsonl", '{"src": "a", "tgt": "b\\u0000"}\n', "a.jsonl:1:1: 'tgt' holds NUL"),
        ("a.parquet", "PAR1 and no more", "a.parquet: not a whole Parquet file"),
        ("a.tsv", "", "a.tsv: empty file"),
    ],
)
def test_d18_d19_malformed_rows_are_named(tmp_path, name, text, part):
    (tmp_path / name).write_text(text)
    task = task_of(train=str(tmp_path / name), dev=str(tmp_path / name))
    with pytest.raises(DataError) as caught:
        prepare(task, tmp_path / "out")
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_parquet_without_the_columns_or_of_numbers(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"src": ["a"], "tgt": [1]}), path)
    task = task_of(train=str(path), dev=str(path))
    with pytest.raises(DataError, match="column 'tgt' is int64; expected text"):
        list(read(task, "train"))
    with pytest.raises(DataError, match="no column 'zzz'; expected one of 'src', 'tgt'"):
        list(read(task_of("zzz", train=str(path), dev=str(path)), "train"))


def test_sigmorphon_as_it_is(shared_data, tmp_path):
    folder = shared_data / "sigmorphon2021"
    files = {split: str(folder / f"ita_{split}.tsv") for split in ("train", "dev", "test")}
    task = Task(
        name="ita",
        corpus=TableCorpus(kind="table", source=1, target=2, **files),
        source_tokenizer=Tokenizer(kind="characters"),
        target_tokenizer=Tokenizer(kind="symbols"),
        metric="per",
    )
    shards = prepare(task, tmp_path)
    assert shards.counts == {"train": 800, "dev": 100, "test": 100}
    rows = list(read(task, "test"))
    assert rows[0].target.split()
    _, target = tokenizers(shards)
    assert target.decode(target.encode(rows[0].target)) == rows[0].target


def message(path, source="src", target="tgt") -> str:
    with pytest.raises(DataError) as caught:
        prepare(task_of(source, target, train=str(path), dev=str(path)), path.parent / "out")
    assert not list((path.parent / "out").glob("**/*"))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_numbers_of_too_many_digits_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src": "a", "tgt": "b"}\n{"src": "a", "tgt": "b", "n": ' + "9" * 5000 + "}\n")
    assert "a.jsonl:2:1: a number of too many digits" in message(path)


def test_parquet_text_that_is_none_is_named_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(row_module, "BLOCK_ROWS", 3)
    path = tmp_path / "a.parquet"
    offsets = np.array([0, 1, 1, 2, 3, 6], dtype=np.int32)
    parts = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"abcd\xff\xfe")]
    damaged = pa.Array.from_buffers(pa.string(), 5, parts)
    pq.write_table(pa.table({"src": ["x"] * 5, "tgt": damaged}), path)
    assert "a.parquet: row 5, column 'tgt', byte 2: invalid UTF-8 byte 0xff" in message(path)
    pq.write_table(pa.table({"src": ["x", "a\0b"], "tgt": ["x", "y"]}), path)
    assert "a.parquet: row 2, column 'src': holds NUL" in message(path)


def test_no_mutated_parquet_ends_in_a_traceback(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"src": [s for s, _ in PAIRS], "tgt": [t for _, t in PAIRS]})
    pq.write_table(table, path, write_page_checksum=True)
    good = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for index in range(120):
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        task = task_of(train=str(path), dev=str(path))
        try:
            rows = [(row.source, row.target) for row in read(task, "train")]
        except DataError:
            refused += 1
        else:  # in statistics that nobody reads
            assert rows == PAIRS, index
    assert refused > 60


def test_one_column_may_be_both_sides(tmp_path):
    path = write(tmp_path, "parquet", PAIRS, "all")
    rows = list(read(task_of("src", "src", train=path, dev=path), "train"))
    assert [(row.source, row.target) for row in rows] == [(s, s) for s, _ in PAIRS]


def test_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["src", "src", "tgt"]), path)
    assert "a.parquet: several columns 'src'" in message(path)
    path = tmp_path / "a.tsv"
    path.write_text("src\tsrc\ttgt\na\tb\tc\n")
    assert "a.tsv:1:1: several columns 'src'" in message(path)
