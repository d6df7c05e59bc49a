"""Preparation in one direction: every row is read and cleaned once, every file hashed once."""

import dataclasses
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vinedresser.config import Task, Tokenizer
from vinedresser.data import shards as shards_module
from vinedresser.data.corpora import row
from vinedresser.data.corpora.kinds import table, text
from vinedresser.data.prepare import clean as clean_module
from vinedresser.data.shards import open_shards, prepare
from vinedresser.errors import DamagedError, DataError


@pytest.fixture
def rows(monkeypatch):
    """Counts of (what, split, line) of rows that are read and cleaned."""
    counts, clean = Counter(), clean_module.clean

    def counting(load):
        def counted(self, row_counts):
            pairs = load(self, row_counts)
            counts.update(("read", self.split, line) for line in pairs.lines.tolist())
            return pairs

        return counted

    def counted_clean(pairs, split, *rest):
        counts.update(("cleaned", split, line) for line in pairs.lines.tolist())
        return clean(pairs, split, *rest)

    for kind in (row.Block, text.TextBlock):
        monkeypatch.setattr(kind, "load", counting(kind.load))
    for kind in (table.TableBlock, row.EntryBlock):
        assert kind.load is row.Block.load
    monkeypatch.setattr(clean_module, "clean", counted_clean)
    return counts


def task_of(kind, text_task, lexicon_task, folder: Path) -> Task:
    if kind == "lexicon":
        words = "".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)} A{i % 3} B\n" for i in range(60))
        return lexicon_task(words)
    if kind == "speech":
        soundfile = pytest.importorskip("soundfile")
        pytest.importorskip("kaldi_native_fbank")
        for split, first in (("train", 0), ("dev", 30)):
            lines = []
            for index in range(first, first + 25):
                times = np.arange(2000) / 8000
                soundfile.write(folder / f"{index}.wav", np.sin(times * 500 * (index + 1)), 8000)
                lines.append(json.dumps({"audio": f"{index}.wav", "text": f"a{index} b"}) + "\n")
            (folder / f"{split}.jsonl").write_text("".join(lines))
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "dev")}
        plain = {
            "name": "toy", "metric": "per", "target_tokenizer": {"kind": "symbols"},
            "source_tokenizer": {"kind": "frames", "sample_rate": 8000},
            "corpus": {"kind": "speech", **files},
        }  # fmt: skip
        return Task.from_json(plain)
    task = text_task(Tokenizer(kind="bpe", vocab_size=40))
    if kind == "text":
        return task
    for split in ("train", "dev"):
        sides = ((folder / f"{split}.{side}").read_text() for side in ("source", "target"))
        pairs = zip(*(side.splitlines() for side in sides), strict=True)
        (folder / f"{split}.tsv").write_text("".join("\t".join(pair) + "\n" for pair in pairs))
    files = {split: str(folder / f"{split}.tsv") for split in ("train", "dev")}
    columns = {"source": 1, "target": 2}
    return Task.from_json({**task.to_json(), "corpus": {"kind": "table", **files, **columns}})


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("kind", ["text", "table", "lexicon", "speech"])
def test_rows_are_read_and_cleaned_once(
    kind, dedup, text_task, lexicon_task, tmp_path, monkeypatch, rows, hashed_files
):
    monkeypatch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 9)
    task = task_of(kind, text_task, lexicon_task, tmp_path).override({"cleaning.dedup": dedup})
    shards = prepare(task, tmp_path / "out", executor="in_process")
    counts = shards.meta["account"]
    for split in counts:
        lines = [key[2] for key in rows if key[:2] == ("read", split)]
        assert len(lines) == len([key for key in rows if key[:2] == ("cleaned", split)])
        assert len(lines) == counts[split]["rows_in"]
    assert set(rows.values()) == {1}
    # Each file of the set once, while it is written; recordings once, for the set's address.
    names = {path.name for path in shards.folder.iterdir()} - {"manifest.json"}
    assert {path.name for path in hashed_files if path.suffix != ".wav"} == names
    assert set(hashed_files.values()) == {1}

    rows.clear()
    hashed_files.clear()
    assert prepare(task, tmp_path / "out", executor="in_process") == shards
    assert not rows
    in_set = {path: n for path, n in hashed_files.items() if path.parent == shards.folder.resolve()}
    assert {path.name for path in in_set} == names
    assert set(in_set.values()) == {1}

    # A repair reads what the damaged shards depend on.
    path = shards.folder / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-3])
    assert prepare(task, tmp_path / "out", executor="in_process") == shards
    assert set(rows.values()) == {1}
    read = {key[1:] for key in rows if key[0] == "read"}
    is_parallel = kind in ("text", "table")
    train = {line for split, line in read if split == "train"}
    assert len(train) == (counts["train"]["rows_in"] if is_parallel and dedup else 9)
    assert any(split == "dev" for split, _ in read) == is_parallel


def test_a_shard_set_is_a_value_that_travels(reversal):
    assert pickle.loads(pickle.dumps(reversal)) == reversal


def test_a_worker_verifies_once_per_node_and_content(
    text_task, tmp_path, monkeypatch, hashed_files
):
    shards = prepare(text_task(), tmp_path / "out")
    monkeypatch.setattr(shards_module.tempfile, "gettempdir", lambda: str(tmp_path))
    files = len(list(shards.folder.iterdir())) - 1
    for expected in (files, 0, 0):
        hashed_files.clear()
        assert open_shards(shards.folder, digest=shards.digest) == shards
        assert hashed_files.total() == expected
    hashed_files.clear()
    assert open_shards(shards.folder) == shards  # a command's own look
    assert hashed_files.total() == files
    with pytest.raises(DataError, match=r"holds shards of digest .*, expected 0000"):
        open_shards(shards.folder, digest="0000")
    path = shards.folder / "train-00000.parquet"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="train-00000"):
        open_shards(shards.folder, digest=shards.digest)


def test_a_worker_reads_a_copy_on_its_node_that_is_made_again_when_damaged(
    text_task, tmp_path, monkeypatch
):
    shards = prepare(text_task(), tmp_path / "out")
    monkeypatch.setattr(shards_module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("VINEDRESSER_CACHE", str(tmp_path / "disk"))
    copy = tmp_path / "disk" / "shards" / shards.folder.name
    for _ in range(2):
        opened = open_shards(shards.folder, digest=shards.digest)
        assert opened == dataclasses.replace(shards, folder=copy)
        damaged = copy / "train-00000.parquet"
        damaged.write_bytes(damaged.read_bytes()[:-9])
    assert open_shards(shards.folder) == shards  # a command reads the workspace
