"""Reading shards: how fast batches arrive, how soon the first one does, what planning costs.

`make bench NAME=read`, on Multi30k German-English. Three parts:

1. Batches of Multi30k from its shards, an epoch from open files to tensors each time, against the
   updates of the small Transformer (3 + 3 layers, d 256, 4 heads, ff 1024, dropout 0.1, label
   smoothing 0.1) in bf16 on all cores: real target tokens a second of both, in turn, `--rounds`
   pairs.
2. The first batch of a large set: Multi30k tiled to `--pairs` (5,000,000: 10 million lines),
   prepared once, then opened, verified, planned and read in fresh processes, its files dropped
   from the page cache before. `--root FOLDER` keeps the set for the next time.
3. What planning holds: bytes a row of the large set, and of its lengths repeated up to 10^8 rows.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import figures_of

TOKENS = 4096
WARM_UP_STEPS, STEPS = 3, 8


class Trainer:
    """The small Transformer in training; keeps its weights and place from call to call."""

    def __init__(self, shards: Any) -> None:
        from vinedresser.bundle import vocabulary_of
        from vinedresser.config import Compute, Experiment
        from vinedresser.data.shards import tokenizers
        from vinedresser.objective import Objective
        from vinedresser.training.device import resolve_device
        from vinedresser.training.optimizer import build_optimizer

        model = {"kind": "transformer", "d_model": 256, "num_heads": 4, "d_ff": 1024,
                 "encoder_layers": 3, "decoder_layers": 3}  # fmt: skip
        self.experiment = Experiment.from_json(
            {
                "task": shards.task.to_json(),
                "model": model,
                "objective": {"likelihood": {"label_smoothing": 0.1}},
                "batch": {"max_padded_tokens": TOKENS},
                "steps": 1_000_000,
            }
        )
        threads = os.cpu_count() or 1
        self.device = resolve_device(Compute(device="cpu", precision="bf16", threads=threads))
        vocabulary = vocabulary_of(*tokenizers(shards), joint=True)
        self.model = self.experiment.model.build(vocabulary).train()
        self.objective = Objective(self.experiment.objective, self.model)
        self.optimizer = build_optimizer(self.objective, self.experiment.optim)
        self.steps = self._steps(shards)
        self.rate(WARM_UP_STEPS)

    def _steps(self, shards: Any) -> Iterator[Any]:
        from vinedresser.data.batching.reader import load_split, stream
        from vinedresser.training.step import training_steps

        # From memory: training shall not pay for what it is compared with.
        batches = stream(load_split(shards, "train"), self.experiment.batch, seed=1)
        return training_steps(
            self.objective, batches, self.optimizer, self.experiment, device=self.device
        )

    def rate(self, steps: int) -> float:
        """Real target tokens a second over some updates."""
        started, tokens = time.perf_counter(), 0
        for _ in range(steps):
            tokens += int(next(self.steps).tokens)
        return tokens / (time.perf_counter() - started)


def reading_rate(shards: Any, seed: int) -> float:
    """Real target tokens a second of one epoch out of the shards, planning included."""
    from vinedresser.config import Batching
    from vinedresser.data.batching.reader import Batches, stream

    batching = Batching(max_padded_tokens=TOKENS)
    count = Batches(shards, batching, seed=seed).per_epoch
    started, tokens = time.perf_counter(), 0
    batches = stream(shards, batching, seed=seed)
    for _ in range(count):
        tokens += int(next(batches).tokens)
    batches.close()
    return tokens / (time.perf_counter() - started)


def spread(values: list[float], form: str = ",.0f") -> str:
    """Median, least and most."""
    found = (statistics.median(values), min(values), max(values))
    return "{} ({} to {})".format(*(format(value, form) for value in found))


def compare(shards: Any, rounds: int) -> float:
    """Part 1; answers the median ratio."""
    trainer = Trainer(shards)
    trained, read = [], []
    for seed in range(rounds):
        trained.append(trainer.rate(STEPS))
        read.append(reading_rate(shards, seed))
    ratios = [r / t for r, t in zip(read, trained, strict=True)]
    print(f"\nreal target tokens a second, {rounds} pairs in turn, load {os.getloadavg()[0]:.1f}")
    print(f"{'training, bf16, ' + str(os.cpu_count()) + ' threads':<34}{spread(trained)}")
    print(f"{'reading, shards to tensors':<34}{spread(read)}")
    print(f"{'ratio':<34}{spread(ratios)}")
    return statistics.median(ratios)


def dropped(folder: Path) -> None:
    """Puts a folder's files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_batch(folder: Path) -> dict[str, float]:
    """In a fresh process: seconds of each part up to the first batch."""
    started = time.perf_counter()
    from vinedresser.config import Batching
    from vinedresser.data.batching.reader import Batches
    from vinedresser.data.shards import open_shards

    imported = time.perf_counter()
    shards = open_shards(folder)
    opened = time.perf_counter()
    batches = Batches(shards, Batching(max_padded_tokens=TOKENS), seed=1)
    planned = time.perf_counter()
    first = next(batches.steps())
    done = time.perf_counter()
    assert len(first.rows_B)
    return {
        "import": imported - started,
        "open": opened - imported,
        "plan": planned - opened,
        "read": done - planned,
        "first_batch": done - imported,
    }


def planned_alone(folder: Path, longer: Path, rows: int) -> dict[str, float]:
    """In a fresh process: seconds and memory of planning a table of lengths."""
    import dataclasses
    import tracemalloc

    import pyarrow as pa

    from vinedresser.config import Batching
    from vinedresser.data.batching.reader import Batches
    from vinedresser.data.shards import open_shards

    shards = open_shards(folder)
    shards = dataclasses.replace(shards, folder=longer, counts={"train": rows})
    started = time.perf_counter()
    batches = Batches(shards, Batching(max_padded_tokens=TOKENS), seed=1)
    seconds = time.perf_counter() - started
    # Again for the memory: NumPy's own and Arrow's, at their highest, and what stays.
    tracemalloc.start()
    again = Batches(shards, Batching(max_padded_tokens=TOKENS), seed=1)
    held, peak = tracemalloc.get_traced_memory()
    assert again.per_epoch == batches.per_epoch
    arrow = pa.default_memory_pool().max_memory()
    return {"plan": seconds, "peak": peak + arrow, "held": held, "batches": batches.per_epoch}


def alone(*words: object) -> dict[str, float]:
    """One of this file's parts in a process of its own."""
    return figures_of([sys.executable, __file__, *map(str, words)])


def open_large(folder: Path, rows: int, rounds: int) -> float:
    """Part 2; answers the median seconds to the first batch from a cold cache."""
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    median = 0.0
    print(f"\nfirst batch of {rows:,} pairs ({size:,.0f} MB), {rounds} fresh processes")
    for kind in ("warm cache", "cold cache"):
        found = []
        for _ in range(rounds):
            if kind == "cold cache":
                dropped(folder)
            found.append(alone("--first", folder))
        median = statistics.median(one["first_batch"] for one in found)
        for part, words in (
            ("import", "imports, torch among them"),
            ("open", "open: SHA-256 of every byte"),
            ("plan", "plan the epoch"),
            ("read", "read the first batch"),
            ("first_batch", "open + plan + read"),
        ):
            seconds = spread([one[part] for one in found], ".2f")
            print(f"  {kind + ', ' + words:<42}{seconds} s")
    return median


def plan_longer(folder: Path, rows: int) -> None:
    """Part 3: planning of the set, and of its lengths repeated up to 10^8 rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "lengths.parquet")
    table = table.filter(pc.equal(table["split"].cast("string"), "train"))
    blocks = table["block"].to_numpy().max() + 1
    many = max(1, 100_000_000 // rows)
    with tempfile.TemporaryDirectory() as device:
        with pq.ParquetWriter(Path(device) / "lengths.parquet", table.schema) as writer:
            column = table.schema.get_field_index("block")
            for times in range(many):
                shifted = pc.add(table["block"], int(times * blocks)).cast("int32")
                writer.write_table(table.set_column(column, "block", shifted))
        print(f"\n{len(table):,} cells of blocks, {len(table) / rows:.3f} a row")
        found = alone("--plan", folder, "--longer", device, "--rows", many * rows)
    for times, one in (
        (1, alone("--plan", folder, "--longer", folder, "--rows", rows)),
        (many, found),
    ):
        print(
            f"planning {times * rows:,} rows: {one['batches']:,.0f} batches, {one['plan']:.2f} s; "
            f"memory {one['peak'] / (times * rows):.2f} bytes a row at its highest, "
            f"{one['held'] / (times * rows):.2f} held"
        )


def main() -> None:
    """Prints the three parts, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", type=Path)
    for hidden in ("--first", "--plan", "--longer"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.first:
        print(json.dumps(first_batch(given.first)))
    elif given.plan:
        print(json.dumps(planned_alone(given.plan, given.longer, given.rows)))
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """All three parts."""
    from benchmarks.corpora.multi30k import multi30k, tiled
    from vinedresser.data.shards import prepare

    task = multi30k()
    with tempfile.TemporaryDirectory() as scratch:
        root = given.root or Path(scratch)
        shards = prepare(task, root, executor="in_process")
        ratio = compare(shards, given.rounds)
        started = time.perf_counter()
        many = tiled(task, Path(scratch) / "tiled", given.pairs)
        large = prepare(many, root, executor="in_process")
        seconds = time.perf_counter() - started
        print(f"\nprepared {large.counts['train']:,} of {given.pairs:,} pairs in {seconds:.0f} s")
        first = open_large(large.folder, large.counts["train"], given.rounds)
        plan_longer(large.folder, large.counts["train"])
    print(json.dumps({"read_vs_train": round(ratio, 1), "first_batch_seconds": round(first, 3)}))


if __name__ == "__main__":
    main()
