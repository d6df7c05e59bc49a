import dataclasses
import itertools
import shutil
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vinedresser.config import Batching, BatchOrder, Task, Tokenizer
from vinedresser.data.batching import pools
from vinedresser.data.batching.plan import group, plan_cells
from vinedresser.data.batching.pools import ShardPool, chunks_of
from vinedresser.data.batching.reader import Batches, dealt, load_split, stream
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.prepare import encode
from vinedresser.data.shards import ShardSet, prepare
from vinedresser.errors import DamagedError, DataError

STRATEGIES = get_args(BatchOrder)

ROWS, TOKENS = 600, 64


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> ShardSet:
    """600 rows of 2 to 21 tokens a side in 15 blocks of 40."""
    folder, random = tmp_path_factory.mktemp("blocks"), np.random.default_rng(0)
    pairs = {}
    for split, rows in (("train", ROWS), ("dev", 5)):
        sides = {}
        for side, letters in (("source", "abcd"), ("target", "wxyz")):
            lines = ["".join(random.choice([*letters], n)) for n in random.integers(1, 21, rows)]
            path = folder / f"{split}.{side}"
            path.write_text("\n".join(lines) + "\n")
            sides[side] = str(path)
        pairs[split] = Pair(**sides)
    task = Task(
        name="blocks", corpus=TextCorpus(**pairs), tokenizer=Tokenizer(kind="characters"),
        metric="cer",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 40)
        found = prepare(task, folder / "shards", executor="in_process")
    assert len(list(found.folder.glob("train-*.parquet"))) == 15
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(pools, "CHUNK_ROWS", 200)


@pytest.mark.parametrize("order", STRATEGIES)
@pytest.mark.usefixtures("small_chunks")
def test_every_epoch_holds_every_row_as_it_is(blocks, order):
    whole = load_split(blocks, "train")
    batches = Batches(blocks, Batching(max_padded_tokens=TOKENS, order=order), seed=3)
    for epoch in range(2):
        seen = []
        for i in range(batches.per_epoch):
            batch = batches[epoch * batches.per_epoch + i]
            longest = max(batch.source_BS.shape[1], batch.target_BT.shape[1])
            assert len(batch.rows_B) * longest <= TOKENS
            truth = whole.batch(batch.rows_B.numpy())
            assert (truth.source_BS == batch.source_BS).all()
            assert (truth.target_BT == batch.target_BT).all()
            seen.append(batch.rows_B.tolist())
        assert sorted(itertools.chain(*seen)) == list(range(ROWS))


@pytest.mark.usefixtures("small_chunks")
def test_batches_stay_in_their_chunk_and_chunks_take_turns(blocks):
    batches = Batches(blocks, Batching(max_padded_tokens=TOKENS), seed=3)
    turns = set()
    for epoch in range(6):
        of = [
            {int(row) // 200 for row in batches.rows(epoch * batches.per_epoch + i)}
            for i in range(batches.per_epoch)
        ]
        assert all(len(chunk) == 1 for chunk in of)
        turn = [chunk for chunk, _ in itertools.groupby(chunk.pop() for chunk in of)]
        assert sorted(turn) == [0, 1, 2]
        turns.add(tuple(turn))
    assert len(turns) > 1


@pytest.mark.usefixtures("small_chunks")
def test_ranks_share_an_epoch_and_any_step_can_be_resumed(blocks):
    def rows(batches, count):
        return [batch.rows_B.tolist() for batch in itertools.islice(batches, count)]

    batching = Batching(max_padded_tokens=TOKENS)
    per_epoch = Batches(blocks, batching, seed=1).per_epoch
    alone = rows(stream(blocks, batching, seed=1), 2 * per_epoch)
    by_rank = [rows(stream(blocks, batching, seed=1, rank=r, of=3), per_epoch) for r in range(3)]
    together = [step for group in zip(*by_rank, strict=True) for step in group]
    assert together[: 2 * per_epoch] == alone
    for at in (1, per_epoch - 1, per_epoch, per_epoch + 5):
        assert rows(stream(blocks, batching, seed=1, at=at), 4) == alone[at : at + 4]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_lanes_give_the_same_batches_on_any_number_of_workers(blocks, workers, monkeypatch):
    """A worker reads its own lanes' row groups only; every lane holds its rows once per epoch."""
    read = Counter[tuple[str, int]]()
    row_group = pools._row_group
    monkeypatch.setattr(
        pools, "_row_group",
        lambda path, index, *rest: (
            read.update([(path.name, index)]), row_group(path, index, *rest)
        )[1],
    )  # fmt: skip
    batching = Batching(max_padded_tokens=TOKENS, lanes=5)
    batches = Batches(blocks, batching, seed=4)
    count, groups = batches.per_epoch * 2, Counter[tuple[str, int]]()
    expected = [batches.rows(i).tolist() for i in range(count)]
    by_rank = []
    for rank in range(workers):
        own = Batches(blocks, batching, seed=4).steps(rank=rank, of=workers)
        read.clear()
        by_rank.append([batch.rows_B.tolist() for batch in itertools.islice(own, count // workers)])
        groups.update(read.keys())
    found = [rows for step in zip(*by_rank, strict=True) for rows in step]
    assert found == expected[: len(found)]
    if not 5 % workers:  # no two workers read the same row group
        assert max(groups.values()) == 1
    for lane in range(5):
        size = len(batches._lanes[lane])
        own = [expected[i] for i in range(lane, 5 * size, 5)]
        rows = list(itertools.chain(*own))
        assert len(rows) == len(set(rows))
        assert {row // 40 for row in rows} == {
            row // 40 for rows in expected[lane::5] for row in rows
        }
    resumed = Batches(blocks, batching, seed=4).steps(rank=0, of=workers, at=7)
    assert next(resumed).rows_B.tolist() == expected[7 * workers]


def test_more_lanes_than_blocks_are_refused(blocks):
    with pytest.raises(DataError, match=r"too few for 16 lanes.*lower batch\.lanes"):
        Batches(blocks, Batching(max_padded_tokens=TOKENS, lanes=16), seed=1)


def test_lanes_are_dealt_equal_numbers_of_batches():
    sizes = np.array([9, 1, 1, 5, 5, 4, 4, 1])
    assert [sum(sizes[chunks]) for chunks in dealt(sizes, 3)] == [10, 10, 10]
    assert [chunks.tolist() for chunks in dealt(sizes, 1)] == [list(range(8))]


def test_one_window_is_planned_as_the_split_in_memory(blocks):
    whole = load_split(blocks, "train")
    pool = ShardPool(blocks, "train")
    assert len(pool) == 1
    lengths = whole.source_lengths, whole.target_lengths
    cells = group(*lengths, bucket_width=blocks.task.bucket_width).histogram
    for column in ("source", "target", "counts"):
        expected, found = getattr(cells, column), getattr(pool.histogram(0), column)
        assert found.tolist() == expected.tolist()
    in_memory = Batches(whole, Batching(max_padded_tokens=TOKENS), seed=0)
    assert (
        Batches(blocks, Batching(max_padded_tokens=TOKENS), seed=0).per_epoch == in_memory.per_epoch
    )


def test_chunks_are_equal_parts():
    for rows in ([30] * 35, [0, 100, 0, 0, 7, 3], [250], [1], [0], [99, 1], [99, 2]):
        rows_of_block = np.array(rows)
        of = chunks_of(rows_of_block, 100)
        assert (np.diff(of) >= 0).all()
        sums = np.bincount(of, weights=rows_of_block)
        assert sums.max() <= 100 + max(rows)
        if len(rows) > 30:
            assert sums.max() - sums.min() <= 2 * max(rows)


@pytest.mark.usefixtures("small_chunks")
def test_a_batch_reads_the_row_groups_it_needs_and_no_more(blocks, monkeypatch):
    read = []
    plain = pools._row_group
    monkeypatch.setattr(
        pools,
        "_row_group",
        lambda path, i, *rest: read.append((path, i)) or plain(path, i, *rest),
    )
    batches = Batches(blocks, Batching(max_padded_tokens=TOKENS), seed=3)
    assert read == []
    batch = batches[0]
    # 5 shards a chunk; a batch of neighbours in length is in one bucket of 5 lengths, or two.
    width = blocks.task.bucket_width
    longest = np.maximum(batch.source_lengths_B.numpy(), batch.target_lengths_B.numpy())
    buckets = set(((longest - 1) // width).tolist())
    assert 0 < len(read) <= 5 * len(buckets) < 5 * 5
    for i in range(batches.per_epoch):
        batches[i]
    assert (
        len(read)
        == len(set(read))
        == sum(
            pq.ParquetFile(path).num_row_groups for path in blocks.folder.glob("train-*.parquet")
        )
    )


def copy_of(shards: ShardSet, folder: Path) -> ShardSet:
    shutil.copytree(shards.folder, folder)
    return dataclasses.replace(shards, folder=folder)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", ["absent", "truncated", "flipped", "swapped"])
def test_a_damaged_shard_is_named_by_the_stream(blocks, tmp_path, damage):
    copied = copy_of(blocks, tmp_path / "copy")
    path = copied.folder / "train-00007.parquet"
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-30])
    elif damage == "flipped":
        # In the pages: every byte of the first quarter.
        path.write_bytes(
            bytes(b ^ 1 for b in content[: len(content) // 4]) + content[len(content) // 4 :]
        )
    else:
        path.write_bytes((copied.folder / "train-00003.parquet").read_bytes())
    steps = stream(copied, Batching(max_padded_tokens=TOKENS), seed=0)
    name = (
        "copy: the shards' lengths|train-00007.parquet: " if damage == "swapped" else "train-00007"
    )
    with pytest.raises(DamagedError, match=name):
        list(
            itertools.islice(
                steps, Batches(copied, Batching(max_padded_tokens=TOKENS), seed=0).per_epoch
            )
        )
    assert not [t for t in threading.enumerate() if t.name == "vinedresser-prefetch"]


def test_a_damaged_histogram_is_named(blocks, tmp_path):
    copied = copy_of(blocks, tmp_path / "copy")
    path = copied.folder / "lengths.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(
        DamagedError, match=r"lengths.parquet: 59\d train rows, but 600 in the manifest"
    ):
        stream(copied, Batching(max_padded_tokens=TOKENS), seed=0)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=r"lengths.parquet: unreadable"):
        stream(copied, Batching(max_padded_tokens=TOKENS), seed=0)
    with pytest.raises(DataError, match="no test split; it has train, dev"):
        ShardPool(blocks, "test")


@pytest.mark.usefixtures("small_chunks")
def test_no_file_stays_open(blocks):
    def opened():
        found = [f.path for f in psutil.Process().open_files() if str(blocks.folder) in f.path]
        # Its shared lock keeps `gc` from the folder until the process ends.
        return [path for path in found if not path.endswith("/manifest.json")]

    steps = stream(blocks, Batching(max_padded_tokens=TOKENS), seed=0)
    for _ in itertools.islice(steps, 30):
        pass
    steps.close()
    assert opened() == []


def test_ten_million_rows_are_planned_in_little_memory(blocks, tmp_path):
    # 500 blocks of 20,000 rows in 1,600 cells, as Multi30k has them: 0.08 cells a row.
    rows = []
    for block in range(500):
        source, target = np.divmod(np.arange(1600), 40)
        rows.append(
            pa.table(
                {
                    "split": pa.array(["train"] * 1600).dictionary_encode(),
                    "block": np.full(1600, block, np.int32),
                    "source": (source + 1).astype(np.int32),
                    "target": (target + 1).astype(np.int32),
                    "count": np.full(1600, 12 + block % 2, np.int64),
                }
            )
        )
    table = pa.concat_tables(rows)
    pq.write_table(table, tmp_path / "lengths.parquet", row_group_size=100_000)
    total = int(table["count"].to_numpy().sum())
    synthetic = dataclasses.replace(blocks, folder=tmp_path, counts={"train": total})
    del table, rows
    assert total == 10_000_000
    tracemalloc.start()
    try:
        batches = Batches(synthetic, Batching(max_padded_tokens=4096), seed=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    pool = ShardPool(synthetic, "train")
    assert len(pool) == 10
    assert sum(len(plan_cells(pool.histogram(w), tokens=4096)) for w in range(10)) == (
        batches.per_epoch
    )
    # One chunk's entries are held at a time, 1.2 bytes a row at this size; 0.1 at ten times it.
    assert peak < 2 * total


@pytest.mark.usefixtures("small_chunks")
def test_frames_are_read_as_they_were_written(blocks, tmp_path):
    random = np.random.default_rng(1)
    frames = [random.normal(size=(n, 3)).astype(np.float16) for n in random.integers(1, 30, 90)]
    phones = [[*random.integers(4, 9, n).tolist(), 2] for n in random.integers(1, 8, 90)]
    lengths = np.array([(len(f), len(p)) for f, p in zip(frames, phones, strict=True)])
    width = blocks.task.bucket_width
    cells = []
    for block in range(3):
        rows = np.arange(30 * block, 30 * (block + 1))
        rows = rows[np.argsort((lengths[rows].max(1) - 1) // width, kind="stable")]
        buckets = (lengths[rows].max(1) - 1) // width
        columns = {
            "row": rows,
            "bucket": buckets.astype(np.int32),
            "source": pa.array([frames[i].ravel() for i in rows], pa.list_(pa.float16())),
            "target": pa.array([phones[i] for i in rows], pa.list_(pa.uint16())),
        }
        table = pa.table(columns)
        with pq.ParquetWriter(tmp_path / f"train-{block:05d}.parquet", table.schema) as writer:
            for bucket in np.unique(buckets):
                writer.write_table(table.filter(pa.array(buckets == bucket)))
        found, counts = np.unique(lengths[rows], axis=0, return_counts=True)
        cells += [
            ("train", block, int(s), int(t), int(n))
            for (s, t), n in zip(found, counts, strict=True)
        ]
    columns = dict(zip(encode.LENGTHS.names, map(list, zip(*cells, strict=True)), strict=True))
    pq.write_table(pa.table(columns, schema=encode.LENGTHS), tmp_path / encode.LENGTHS_FILE)
    made = dataclasses.replace(blocks, folder=tmp_path, counts={"train": 90}, features=3)
    batches, seen = Batches(made, Batching(max_padded_tokens=100), seed=0), []
    for i in range(batches.per_epoch):
        batch = batches[i]
        assert len(batch.rows_B) * max(batch.source_BS.shape[1], batch.target_BT.shape[1]) <= 100
        for k, row in enumerate(batch.rows_B.tolist()):
            size, tokens = int(batch.source_lengths_B[k]), int(batch.target_lengths_B[k])
            assert (batch.source_BS[k, :size].numpy() == frames[row]).all()
            assert (batch.source_BS[k, size:] == 0).all()
            assert batch.target_BT[k, :tokens].tolist() == phones[row]
            seen.append(row)
    assert sorted(seen) == list(range(90))


def test_no_mutated_file_is_read_as_good_data(blocks, tmp_path):
    # `open_shards` compares digests before; this is what a file that changes afterwards meets.
    copied = copy_of(blocks, tmp_path / "copy")
    random = np.random.default_rng(5)

    def read():
        batches = Batches(copied, Batching(max_padded_tokens=TOKENS), seed=0)
        found = (batches[i] for i in range(batches.per_epoch))
        return [(b.rows_B.tolist(), b.source_BS.tolist(), b.target_BT.tolist()) for b in found]

    good, refused = read(), list[str]()
    paths = [copied.folder / "train-00004.parquet", copied.folder / "lengths.parquet"]
    for turn in range(60):
        path = paths[turn % 2]
        content = path.read_bytes()
        at, damaged = int(random.integers(len(content))), bytearray(content)
        if turn % 3 == 0:
            damaged[at] ^= 1 << int(random.integers(8))
        elif turn % 3 == 1:
            damaged[at : at + 16] = random.bytes(len(damaged[at : at + 16]))
        else:
            del damaged[at:]
        path.write_bytes(damaged)
        try:
            assert read() == good
        except DamagedError as error:
            refused.append(str(error))
        path.write_bytes(content)
    assert len(refused) > 30
    assert all(str(copied.folder) in line for line in refused)
