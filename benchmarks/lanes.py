"""Reading and tracking of many processes: what 100 ranks, 100 opens and 100 openers cost.

`make bench NAME=lanes`, some minutes. Ranks are simulated one after the other, each with its own
reader; opens and openers are 100 forks of one process. The last line is JSON:

- decoded_over_set_100_ranks, cpu_ms_per_batch_100_ranks: one epoch of 100 lanes, by all ranks;
  `before` is that of 3 of the 100 ranks with one lane;
- padding_efficiency_by_rows: share of real tokens by the rows of a chunk: of one lane, of many
  lanes with enough data, and of lanes with less;
- hashed_over_set_100_opens; lock_hold_seconds, the longest; unchanged_seconds of `open_corpus` of
  text files of `--gigabytes` that were inspected before.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vinedresser.config import Batching, Task, Tokenizer
from vinedresser.data.batching import pools
from vinedresser.data.batching.plan import group, plan_cells
from vinedresser.data.batching.reader import Batches
from vinedresser.data.corpora import row
from vinedresser.data.corpora.corpus import open_corpus
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.shards import ShardSet, open_shards, prepare
from vinedresser.tracking import initialise, store, store_for
from vinedresser.workspace import commit, lease

RANKS, TOKENS, ROWS = 100, 4096, 200_000


def corpus_of(folder: Path, rows: int) -> Task:
    """Pairs of 1 to 60 symbols, of lengths as sentences have them; both sides agree in length."""
    draw, pairs = np.random.default_rng(0), {}
    for split, count in (("train", rows), ("dev", 50)):
        lengths = np.clip(draw.lognormal(2.6, 0.5, count), 1, 58).astype(int)
        paths = {}
        for side in ("source", "target"):
            other = np.clip(lengths + draw.integers(-2, 3, count), 1, 60)
            letters = draw.integers(97, 123, int(other.sum()), dtype=np.uint8).tobytes().decode()
            ends = np.cumsum(other)
            path = folder / f"{split}.{side}"
            starts = zip(ends - other, ends, strict=True)
            path.write_text("\n".join(letters[a:b] for a, b in starts) + "\n")
            paths[side] = str(path)
        pairs[split] = Pair(**paths)
    corpus = TextCorpus(train=pairs["train"], dev=pairs["dev"])
    return Task(name="many", corpus=corpus, tokenizer=Tokenizer(kind="characters"), metric="cer")


def padding_efficiency(rows: int) -> float:
    """Share of real tokens in the batches of a chunk of some rows, of lengths as those above."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(2.6, 0.5, rows), 1, 58).astype(int)
    sides = [np.clip(lengths + draw.integers(-2, 3, rows), 1, 60) + 1 for _ in range(2)]
    cells = group(*sides, bucket_width=8).histogram
    return plan_cells(cells, tokens=TOKENS).padding_efficiency(cells).both


def read_by_ranks(shards: ShardSet, lanes: int, ranks: range) -> dict[str, float]:
    """An epoch as some of 100 ranks read it: bytes of row groups over those of the set, and CPU."""
    sizes, row_group, decoded = dict[tuple[str, int], int](), pools._row_group, [0]
    total = 0
    import pyarrow.parquet as pq

    for path in sorted(shards.folder.glob("train-*.parquet")):
        metadata = pq.ParquetFile(path).metadata
        for index in range(metadata.num_row_groups):
            sizes[path.name, index] = metadata.row_group(index).total_byte_size
            total += sizes[path.name, index]

    def counted(path: Path, index: int, *rest: Any) -> Any:
        decoded[0] += sizes[path.name, index]
        return row_group(path, index, *rest)

    pools._row_group = counted
    batches = cpu = 0.0
    for rank in ranks:
        reader = Batches(shards, Batching(max_padded_tokens=TOKENS, lanes=lanes), seed=1)
        count = reader.per_epoch // RANKS
        begun = time.process_time()
        for _ in itertools.islice(reader.steps(rank=rank, of=RANKS), count):
            batches += 1
        cpu += time.process_time() - begun
    pools._row_group = row_group
    over = decoded[0] / total / len(ranks) * RANKS
    return {"decoded_over_set": over, "cpu_ms_per_batch": 1000 * cpu / batches}


def forked(count: int, work: Callable[[], float]) -> list[float]:
    """What each of some forks of this process returns."""
    pipes = []
    for _ in range(count):
        read, write = os.pipe()
        if not os.fork():
            os.write(write, f"{work()}".encode())
            os._exit(0)
        os.close(write)
        pipes.append(read)
    results = [float(os.read(pipe, 100)) for pipe in pipes]
    for _ in pipes:
        os.wait()
    return results


def hashed_by_opens(shards: ShardSet) -> float:
    """Bytes that 100 processes hash together to open a set, over its size."""
    hashed, file_digest = [0], commit.file_digest

    def counted(path: Path) -> str:
        hashed[0] += path.stat().st_size
        return file_digest(path)

    def work() -> float:
        commit.file_digest = counted
        open_shards(shards.folder, digest=shards.digest)
        return hashed[0]

    size = sum(path.stat().st_size for path in shards.folder.iterdir())
    return sum(forked(RANKS, work)) / size


def lock_holds(folder: Path) -> dict[str, float]:
    """Longest time that one of 100 openers of a database holds a lease that others wait for."""
    taken, release = dict[str, float](), lease.Lease.release
    held, take = [0.0], lease.Lease.take

    def timed_take(self: Any, **options: bool) -> bool:
        taken[str(self.path)] = time.monotonic()
        return take(self, **options)

    def timed_release(self: Any) -> None:
        release(self)
        held[0] = max(held[0], time.monotonic() - taken[str(self.path)])

    lease.Lease.take, lease.Lease.release = timed_take, timed_release  # type: ignore[method-assign]
    where = store_for(folder, "many")

    def work() -> float:
        held[0] = 0.0
        initialise(where)
        return held[0]

    store.open_client(where)  # of the first command: it makes the database
    creation = held[0]
    begun = time.monotonic()
    longest = max(forked(RANKS, work))
    seconds = time.monotonic() - begun
    return {"creation": creation, "longest": longest, "all_seconds": seconds}


def unchanged(folder: Path, gigabytes: float) -> dict[str, float]:
    """Seconds of the first and of the second inspection of large text files."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    line = ("word " * 12 + "end\n") * 16_000
    paths = {}
    for side in ("source", "target"):
        path = folder / f"big.{side}"
        with path.open("w") as out:
            for _ in range(int(gigabytes * 1e9 / 2 / len(line))):
                out.write(line)
        os.utime(path, (0, 0))
        paths[side] = str(path)
    small = Pair(source=str(folder / "dev.source"), target=str(folder / "dev.target"))
    corpus = TextCorpus(train=Pair(**paths), dev=small)
    task = Task(name="big", corpus=corpus, tokenizer=Tokenizer(kind="characters"), metric="cer")
    time.sleep(11)  # what has just changed is not remembered
    found = {}
    for name in ("first", "second"):
        begun = time.monotonic()
        open_corpus(task)
        found[name] = time.monotonic() - begun
    return found


def main() -> None:
    """Measure, print, and write the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=10.0)
    gigabytes = parser.parse_args().gigabytes
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lanes-") as temporary:
        folder = Path(temporary)
        task = corpus_of(folder, ROWS)
        sizes = (pools.CHUNK_ROWS, pools.CHUNK_ROWS // pools.LANE_CHUNKS, 100_000, 20_000)
        figures["padding_efficiency_by_rows"] = {rows: padding_efficiency(rows) for rows in sizes}
        print(figures, flush=True)
        row.BLOCK_ROWS = ROWS // RANKS
        shards = prepare(task, folder / "small", executor="in_process")
        before = read_by_ranks(shards, 1, range(0, RANKS, 34))
        after = read_by_ranks(shards, RANKS, range(RANKS))
        figures["before"] = before
        figures["decoded_over_set_100_ranks"] = after["decoded_over_set"]
        figures["cpu_ms_per_batch_100_ranks"] = after["cpu_ms_per_batch"]
        print(figures, flush=True)
        figures["hashed_over_set_100_opens"] = hashed_by_opens(shards)
        holds = lock_holds(folder / "store")
        figures |= {"lock_hold_seconds": holds["longest"], "locks": holds}
        print(figures, flush=True)
        figures["unchanged_seconds"] = {"gigabytes": gigabytes, **unchanged(folder, gigabytes)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
