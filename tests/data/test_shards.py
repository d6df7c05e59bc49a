import contextlib
import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from vinedresser.config import Cleaning, Tokenizer
from vinedresser.data.batching.plan import group, plan_cells
from vinedresser.data.batching.reader import load_split
from vinedresser.data.corpora import row as row_module
from vinedresser.data.corpora.corpus import open_corpus, read
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.prepare import execute
from vinedresser.data.prepare.clean import PrepareJob, clean_block
from vinedresser.data.shards import open_shards, prepare, tokenizers
from vinedresser.errors import DamagedError, DataError, MachineError
from vinedresser.workspace.commit import verify


def test_every_row_is_out_or_counted(text_task, tmp_path, logged):
    long = b"word " * 100
    source = b"a b\n\nc\n" + long + b"\n" + b"x" * 1_000_000 + b"\nd\n"
    task = text_task(train_source=source, train_target=b"1\n2\n3\n4\n5\n6\n", dev_source=long * 4)
    (tmp_path / "dev.source").write_bytes((long + b"\n") * 4)
    shards = prepare(task, tmp_path / "out")
    assert shards.meta["account"]["train"] == {
        "rows_in": 6,
        "rows_out": 3,
        "dropped": {"empty": 1, "too_long": 2},
        "first_lines": {"empty": [2], "too_long": [4, 5]},
    }
    assert shards.counts == {"train": 3, "dev": 4, "test": 4}
    assert "of 6 rows dropped 1 empty (lines 2 ...)" in logged.messages[-1]
    assert load_split(shards, "dev").source_lengths.max() > 256


def test_shards_hold_what_the_corpus_says(text_task, tmp_path):
    task = text_task()
    shards = prepare(task, tmp_path / "out")
    source, target = tokenizers(shards)
    assert source is target
    assert shards.source_size == shards.target_size == source.size
    for name in shards.counts:
        split, rows = load_split(shards, name), list(read(task, name))
        assert len(split) == len(rows) == shards.counts[name]
        for i, row in enumerate(rows):
            ids = split.source.values[split.source.offsets[i] : split.source.offsets[i + 1]]
            assert ids.tolist() == [*source.encode(row.source), 2]
            ids = split.target.values[split.target.offsets[i] : split.target.offsets[i + 1]]
            assert ids.tolist() == [*target.encode(row.target), 2]
        if name != "train":
            assert split.sources == [row.source for row in rows]
            assert split.references == [row.target for row in rows]
            lines = "".join(row.target + "\n" for row in rows).encode()
            assert shards.reference_digest(name) == hashlib.sha256(lines).hexdigest()


def test_one_row_group_a_bucket_in_order(text_task, tmp_path):
    shards = prepare(text_task(), tmp_path / "out")
    file = pq.ParquetFile(shards.folder / "train-00000.parquet")
    table = file.read()
    assert file.num_row_groups == len(set(table["bucket"].to_pylist()))
    keys = list(zip(table["bucket"].to_pylist(), table["row"].to_pylist(), strict=True))
    assert keys == sorted(keys)
    sides = (table[side].to_pylist() for side in ("source", "target"))
    lengths = np.array([max(map(len, pair)) for pair in zip(*sides, strict=True)])
    assert ((lengths - 1) // 5 == table["bucket"].to_numpy()).all()


def test_many_blocks_give_the_same_split(text_task, tmp_path, monkeypatch):
    task = text_task()
    whole = load_split(prepare(task, tmp_path / "a"), "train")
    monkeypatch.setattr(row_module, "BLOCK_ROWS", 7)
    parts = prepare(task, tmp_path / "b")
    assert len(parts.meta["shards"]["train"]) == 6
    split = load_split(parts, "train")
    np.testing.assert_array_equal(split.source.values, whole.source.values)
    np.testing.assert_array_equal(split.target.offsets, whole.target.offsets)


@pytest.mark.fault("D22")
def test_prepared_twice_is_a_no_op(text_task, tmp_path, logged):
    task = text_task()
    first = prepare(task, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(task, tmp_path / "out")
    assert logged.messages[-1:] == [f"prepare: {first.folder.name} unchanged"]
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.fault("D22")
def test_content_decides_and_paths_do_not(text_task, tmp_path):
    task = text_task()
    first = prepare(task, tmp_path / "out")
    moved = {}
    for split in ("train", "dev", "test"):
        for side in ("source", "target"):
            (tmp_path / f"{split}.{side}").rename(tmp_path / f"moved.{split}.{side}")
        names = (str(tmp_path / f"moved.{split}.{side}") for side in ("source", "target"))
        moved[split] = Pair(**dict(zip(("source", "target"), names, strict=True)))
    task = task.model_copy(update={"corpus": TextCorpus(**moved)})
    assert prepare(task, tmp_path / "out").folder == first.folder
    (tmp_path / "moved.dev.source").write_bytes(b"other\n" * 4)
    assert prepare(task, tmp_path / "out").folder != first.folder


@pytest.mark.fault("S08")
@pytest.mark.parametrize("damage", ["flip", "delete", "extra"])
def test_damage_is_found_and_rebuilt(text_task, tmp_path, damage, logged):
    task = text_task()
    shards = prepare(task, tmp_path / "out")
    digest, path = verify(shards.folder).digest, shards.folder / "train-00000.parquet"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "delete":
        path.unlink()
    else:
        path.with_name("train-00001.parquet").write_bytes(path.read_bytes())
    with pytest.raises(DamagedError, match="train-0000"):
        open_shards(shards.folder)
    rebuilt = prepare(task, tmp_path / "out")
    wanted = "building again" if damage == "extra" else "damaged train-00000.parquet written anew"
    assert wanted in logged.text
    assert rebuilt.folder == shards.folder
    assert verify(rebuilt.folder).digest == digest


def test_overlap_with_test_is_told(text_task, tmp_path, logged):
    task = text_task()
    task = task.model_copy(update={"cleaning": Cleaning(leakage="allow")})
    for side in ("source", "target"):
        path = tmp_path / f"train.{side}"
        lines = (tmp_path / f"test.{side}").read_bytes().split(b"\n")[:3]
        path.write_bytes(path.read_bytes() + b"\n".join(lines) + b"\n")
    shards = prepare(task, tmp_path / "out")
    lines = [41, 42, 43]
    found = {"pairs": 3, "sources": 3, "train_lines": lines, "pair_lines": lines}
    assert shards.meta["overlap"]["test"] == found
    assert any("3 rows have a source of test, 3 of them" in line for line in logged.messages)


@pytest.mark.fault("D02")
def test_shifted_sides_are_told_and_true_ones_are_not(text_task, tmp_path):
    random = np.random.default_rng(0)
    counts = random.integers(1, 40, 300)
    source = [b"a" * count for count in counts]
    for shift, warned in ((0, False), (1, True)):
        target = [b"b" * int(count) for count in np.roll(counts, shift)]
        files = {"train_source": b"\n".join(source), "train_target": b"\n".join(target)}
        notes = prepare(text_task(**files), tmp_path / "out").meta["notes"]
        assert any("shifted" in note for note in notes) == warned


@pytest.mark.fault("D16")
def test_nothing_left_says_why(text_task, tmp_path):
    task = text_task().model_copy(update={"max_source_length": 1})
    with pytest.raises(DataError, match="train: 0 of 40 pairs left: 40 too_long"):
        prepare(task, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    task = text_task(dev_source=b"\n\n\n\n")
    with pytest.raises(DataError, match="dev: 0 of 4 pairs left: 4 empty"):
        prepare(task, tmp_path / "out")


def test_one_pair_is_enough(text_task, tmp_path):
    one = {f"{split}_{side}": b"a\n" for split in ("train", "dev") for side in ("source", "target")}
    assert prepare(text_task(**one), tmp_path / "out").counts["train"] == 1


def test_other_tokenizers_are_refused(text_task, tmp_path):
    task = text_task()
    shards = prepare(task, tmp_path / "out")
    assert open_shards(shards.folder, task=task) == shards
    other = task.model_copy(update={"tokenizer": Tokenizer(kind="symbols")})
    with pytest.raises(DataError, match=r"tokenized with .*characters.*expected .*symbols"):
        open_shards(shards.folder, task=other)


def test_lexicon_has_two_vocabularies(lexicon_task, tmp_path):
    words = "".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)} A{i % 3} B\n" for i in range(60))
    shards = prepare(lexicon_task(words), tmp_path / "out")
    source, target = tokenizers(shards)
    assert not shards.is_joint
    assert (shards.source_size, shards.target_size) == (source.size, target.size) == (30, 6)
    assert shards.meta["overlap"] == {}


def test_damaged_shard_is_named_at_loading(text_task, tmp_path):
    shards = prepare(text_task(), tmp_path / "out")
    path = shards.folder / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedError, match=r"train-00000.parquet: unreadable"):
        load_split(shards, "train")


def test_multi30k_wastes_little(multi30k, tmp_path):
    shards = prepare(multi30k, tmp_path)
    assert shards.counts == {"train": 29_000, "dev": 1_014, "test": 1_000}
    split = load_split(shards, "train")
    lengths = (split.source_lengths, split.target_lengths)
    cells = group(*lengths).histogram
    assert plan_cells(cells, tokens=4096).padding_efficiency(cells).both >= 0.965
    assert shards.meta["padding_efficiency"]["both"] >= 0.965
    assert not any("shifted" in note for note in shards.meta["notes"])
    source, target = tokenizers(shards)
    test = load_split(shards, "test")
    ids = test.target.values[test.target.offsets[0] : test.target.offsets[1]]
    assert target.decode(ids.tolist()) == test.references[0]
    assert source.size == 8000


def test_ray_is_used_only_where_it_pays(monkeypatch):
    connections = []

    @contextlib.contextmanager
    def connect():
        connections.append("open")
        yield
        connections.append("closed")

    def choice(rows, name="auto", connect=None):
        with execute.block_runner(name, rows, connect) as run:
            return "ray" if run is execute.with_ray else "here"

    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert choice(10**9) == "here"
    assert choice(10**9, "ray") == "ray"
    assert choice(execute.RAY_START_ROWS - 1, connect=connect) == "here"
    assert choice(10**9, "in_process", connect=connect) == "here"
    assert connections == []
    assert choice(execute.RAY_START_ROWS, connect=connect) == "ray"
    assert connections == ["open", "closed"]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert choice(execute.RAY_ROWS - 1) == "here"
    assert choice(execute.RAY_ROWS) == "ray"


@pytest.mark.ray
def test_ray_writes_the_same_bytes(text_task, tmp_path, monkeypatch, local_ray):
    # Blocks are cut in this process, so that workers need no patch.
    monkeypatch.setattr(row_module, "BLOCK_ROWS", 8)
    task = text_task(Tokenizer(kind="bpe", vocab_size=40))
    by_ray = prepare(task, tmp_path / "ray", executor="ray")
    in_process = prepare(task, tmp_path / "plain", executor="in_process")
    assert len(by_ray.meta["shards"]["train"]) == 5
    assert verify(by_ray.folder).digest == verify(in_process.folder).digest


@pytest.mark.ray
def test_an_error_in_a_ray_task_is_the_one_of_this_process(text_task, tmp_path, local_ray):
    task = text_task()
    (block,) = open_corpus(task).blocks("dev")
    job = PrepareJob(task, *[str(tmp_path / "gone")] * 3, is_parallel=False)
    with pytest.raises(MachineError, match=r"gone: Ray could not .*No such file") as caught:
        list(execute.with_ray(clean_block, [block], job))
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "dev.source").write_bytes(b"one line\n")
    for run in (execute.with_ray, execute.in_process):
        with pytest.raises(DataError, match=r"dev.source: changed while") as caught:
            list(run(clean_block, [block], job))
        assert caught.value.exit_code == 2
