"""Preparation: raw pairs -> SentencePiece ids -> verified shards, against plain pyarrow streaming.

`make bench NAME=prepare`, twelve minutes on two cores. The corpus is Multi30k, repeated. Every
measurement is a process of its own; the baseline reads lines, encodes 20,000 at a time with
sentencepiece and writes one Parquet file: no checks, no account, no digests, no second side file.
Both learn their pieces from the same number of rows (100,000). Rates are marginal: lines of both
sides between the small and the large size, per processor second of the process and its children,
so that start-up and learning fall out. Peak memory is that of the whole process tree, unique to
it, everything included.

`ARGS="--large 5000000 --modes in_process ray"` is the run over ten million lines.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import figures_of

TRAINING_ROWS = 100_000
BLOCK = 20_000


def tile(folder: Path, pairs: int) -> None:
    """Writes a corpus of so many pairs: PAIRS.de and .en, and its task as PAIRS.json."""
    from benchmarks.corpora.multi30k import multi30k, tiled

    task = tiled(multi30k(test="test_2016_flickr"), folder, pairs)
    settings = {"kind": os.environ.get("KIND", "bpe"), "training_rows": TRAINING_ROWS}
    task = task.override({f"tokenizer.{name}": value for name, value in settings.items()})
    (folder / f"{pairs}.json").write_text(json.dumps(task.to_json()))


class Meter:
    """Processor seconds and peak unique memory of this process and everything below it."""

    def __init__(self, *, memory: bool) -> None:
        import psutil

        self._psutil, self._me = psutil, psutil.Process()
        self._seen: dict[int, float] = {}
        self.peak, self._stop = 0, threading.Event()
        self._measures_memory = memory
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._begun, self._wall = self._processor(), time.perf_counter()
        self._thread.start()

    def _family(self) -> Iterator[Any]:
        yield self._me
        with contextlib.suppress(self._psutil.Error):
            yield from self._me.children(recursive=True)

    def _processor(self) -> float:
        """Of the living and of those that ended since the last look."""
        for process in self._family():
            with contextlib.suppress(self._psutil.Error):
                times = process.cpu_times()
                self._seen[process.pid] = times.user + times.system
        return sum(self._seen.values())

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._processor()
            if not self._measures_memory:
                continue
            total = 0
            for process in self._family():
                with contextlib.suppress(self._psutil.Error):
                    total += process.memory_full_info().uss
            self.peak = max(self.peak, total)

    def close(self) -> dict[str, float]:
        """What was measured."""
        self._stop.set()
        self._thread.join()
        cpu, wall = self._processor() - self._begun, time.perf_counter() - self._wall
        return {"cpu": cpu, "wall": wall, "peak_mb": self.peak / 2**20}


def plain(folder: Path, pairs: int, out: Path, *, memory: bool) -> dict[str, float]:
    """The baseline, as fast as it is simple."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import sentencepiece

    sides = (folder / f"{pairs}.de", folder / f"{pairs}.en")
    meter = Meter(memory=memory)
    stride = -(-pairs // TRAINING_ROWS)
    model = io.BytesIO()
    with sides[0].open() as source, sides[1].open() as target:
        rows = itertools.islice(zip(source, target, strict=True), 0, None, stride)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.rstrip("\n") for row in rows for line in row),
            model_writer=model,
            model_type="bpe",
            vocab_size=8000,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    schema = pa.schema([("source", pa.list_(pa.uint16())), ("target", pa.list_(pa.uint16()))])
    with (
        sides[0].open() as source,
        sides[1].open() as target,
        pq.ParquetWriter(out / "0.parquet", schema, compression="zstd") as writer,
    ):
        while True:
            columns = []
            for file in (source, target):
                lines = [line.rstrip("\n") for line in itertools.islice(file, BLOCK)]
                ids = pieces.encode(lines, num_threads=1)
                offsets = np.zeros(len(ids) + 1, np.int32)
                np.cumsum([len(row) for row in ids], out=offsets[1:])
                flat = np.fromiter(itertools.chain.from_iterable(ids), np.uint16, offsets[-1])
                columns.append(pa.ListArray.from_arrays(offsets, flat))
            if not len(columns[0]):
                break
            writer.write_table(pa.table(columns, schema=schema))
    return meter.close()


def ours(folder: Path, pairs: int, out: Path, mode: str, *, memory: bool) -> dict[str, float]:
    """`prepare`, in process or through a Ray of its own."""
    from vinedresser.config import Task
    from vinedresser.data.shards import prepare

    task = Task.from_json(json.loads((folder / f"{pairs}.json").read_text()))
    if mode == "in_process":
        meter = Meter(memory=memory)
        prepare(task, out, executor="in_process")
        return meter.close()
    from vinedresser.cluster.connect import connect

    meter = Meter(memory=memory)
    begun = time.perf_counter()
    with connect():
        started = time.perf_counter() - begun
        prepare(task, out, executor="ray")
        figures = meter.close()
    return {**figures, "ray_start_seconds": started}


def work(mode: str, folder: Path, pairs: int, *, memory: bool) -> None:
    """One measurement; the last line printed is JSON."""
    out = Path(tempfile.mkdtemp(dir=folder))
    try:
        run = plain if mode == "plain" else ours
        extra = () if mode == "plain" else (mode,)
        print(json.dumps(run(folder, pairs, out, *extra, memory=memory)))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def measure(mode: str, folder: Path, pairs: int, *, memory: bool) -> dict[str, float]:
    """`work` in a process of its own, on one thread."""
    words = (__file__, "--worker", mode, folder, pairs, int(memory))
    figures = figures_of([sys.executable, *map(str, words)])
    shown = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
    print(f"{mode:10} {pairs:>9,} pairs: {shown} (load {os.getloadavg()[0]:.1f})", flush=True)
    return figures


def rate(small: dict[str, float], large: dict[str, float], lines: int, of: str) -> float:
    """Lines a second between two sizes."""
    return lines / (large[of] - small[of])


def main() -> None:
    """Rounds of all modes at both sizes; then the ratios."""
    if sys.argv[1:2] == ["--worker"]:
        _, _, mode, folder, pairs, memory = sys.argv
        work(mode, Path(folder), int(pairs), memory=bool(int(memory)))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=100_000, help="pairs")
    parser.add_argument("--large", type=int, default=1_000_000, help="pairs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["in_process", "ray"])
    arguments = parser.parse_args()
    sizes, modes = (arguments.small, arguments.large), ["plain", *arguments.modes]
    lines = 2 * (arguments.large - arguments.small)
    rates: dict[str, list[float]] = {mode: [] for mode in modes}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for pairs in sizes:
            tile(folder, pairs)
        for turn in range(arguments.rounds):
            for mode in modes[:: 1 if turn % 2 == 0 else -1]:
                small, large = (measure(mode, folder, n, memory=False) for n in sizes)
                rates[mode].append(rate(small, large, lines, "cpu"))
                wall = rate(small, large, lines, "wall")
                print(f"{mode:10} {rates[mode][-1]:,.0f} lines/CPU-s, {wall:,.0f} lines/s")
        for mode in arguments.modes:
            small, large = (measure(mode, folder, n, memory=True) for n in sizes)
            figures[f"memory_growth_{mode}"] = large["peak_mb"] / small["peak_mb"]
    for mode in arguments.modes:
        ratios = [ours / base for ours, base in zip(rates[mode], rates["plain"], strict=True)]
        figures[f"{mode}_vs_pyarrow"] = statistics.median(ratios)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{mode} against plain pyarrow: {statistics.median(ratios):.2f} ({spread})")
        print(f"{mode} peak memory x{figures[f'memory_growth_{mode}']:.2f} at the large size")
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
