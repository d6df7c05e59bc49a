"""How long a command takes to its first update, and what a second worker brings.

`make bench NAME=startup`. Multi30k De-En, the small Transformer, batches of 4,096 padded tokens,
one thread a worker, on shards that are prepared. Wall seconds from the start of the command to the
end of the first optimizer update, rounds alternating:

- torchrun: a hand-written DDP script (`peers/torchrun_steps.py`), same model, same batches;
- in place: `vinedresser train`, with its tracking run, checks and second model;
- Ray Train: the same in a worker group of one, with the start of a private Ray.

Then real target tokens per wall second: two gloo workers against one, and what two processes reach
that know nothing of each other, which is all that this machine has for two workers. On a busy
machine look at the tokens per processor second: what the second worker's company costs.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PEERS = ROOT / "benchmarks/peers"
PATIENCE = 300.0
WARM_UP = 3


def corpus(folder: Path) -> Path:
    """Prepares Multi30k in a workspace; answers the shards' folder."""
    from vinedresser.data.shards import prepare

    return prepare(_experiment().task, folder / "shards", executor="in_process").folder


def _experiment(workers: int = 1) -> Any:
    from benchmarks.corpora.multi30k import multi30k
    from vinedresser.config import Experiment

    return Experiment.from_json({
        "name": "startup", "task": multi30k().to_json(),
        "model": {"kind": "transformer-small", "tie": "all"},
        "objective": {"likelihood": {"label_smoothing": 0.1}}, "batch": {"max_padded_tokens": 4096},
        "compute": {"workers": workers, "threads": 1, "device": "cpu"}, "steps": 100000,
    })  # fmt: skip


def in_group(plain: Path, workspace: Path) -> None:
    """What `vinedresser train` does for several workers, with a worker group of one."""
    from vinedresser.cli.app import _open_streams

    _open_streams()
    from vinedresser.cluster.connect import connect
    from vinedresser.config import Experiment
    from vinedresser.data.shards import prepare
    from vinedresser.distributed.context import RunContext
    from vinedresser.distributed.group import train_in_group
    from vinedresser.tracking import store_for
    from vinedresser.training.listener import Listener
    from vinedresser.training.outcome import run_folder
    from vinedresser.workspace.layout import Workspace

    experiment = Experiment.from_json(json.loads(plain.read_text()))
    with connect():
        shards = prepare(experiment.task, workspace / "shards")
        store = store_for(workspace, experiment.task.name)
        context = RunContext(shards, Workspace(workspace), store)
        folder = run_folder(experiment, shards, context.workspace)
        train_in_group(experiment, context, folder, listener=Listener())


class Start:
    """Times commands to their first update in fresh copies of a prepared workspace."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder, folder / "workspace"
        self.shards = corpus(self.workspace)
        self.plain = folder / "experiment.json"
        self.plain.write_text(json.dumps(_experiment().to_json()))

    def commands(self, mark: Path) -> dict[str, list[str]]:
        """What is timed."""
        peer = str(PEERS / "torchrun_steps.py")
        train = ["train", str(self.plain), "-w", str(self.workspace)]
        group = ["--group", str(self.plain), str(self.workspace)]
        return {
            "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "1", peer, str(self.shards),
                         str(self.plain), str(mark)],
            "in_place": [str(BIN / "vinedresser"), *train],
            "ray_train": [sys.executable, __file__, *group],
        }  # fmt: skip

    def measure(self, name: str) -> tuple[float, float]:
        """Wall and processor seconds, the latter of the command and all that it started."""
        shutil.rmtree(self.workspace / "runs", ignore_errors=True)
        mark = self.folder / "first_step"
        mark.unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FIRST_STEP_FILE": str(mark)}
        paths = [str(PEERS / "first_step"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        for key in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            environment.pop(key, None)
        begun = time.monotonic()
        command = self.commands(mark)[name]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while not mark.exists():
                if process.poll() is not None or time.monotonic() - begun > PATIENCE:
                    text = (self.folder / f"{name}.log").read_text()[-2000:]
                    sys.exit(f"{' '.join(command)} came to no first step:\n{text}")
                time.sleep(0.02)
            seconds = float(mark.read_text()) - begun
            return seconds, _processor_seconds(process.pid)
        finally:
            _end(process)


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _processor_seconds(pid: int) -> float:
    total = 0.0
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command and everything under it."""
    with contextlib.suppress(psutil.Error):
        tree = _tree(process.pid)
        for one in tree:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait()
        psutil.wait_procs(tree, timeout=10)
    for left in Path(tempfile.gettempdir()).glob(f"vd-{process.pid}-*"):  # of a killed Ray
        shutil.rmtree(left, ignore_errors=True)


def work(plain: str, shards: str, rank: int, seconds: float) -> None:
    """One worker: the loop of a run, for some wall seconds; prints its tokens a second."""
    import torch
    import torch.distributed as dist

    from vinedresser.config import Experiment
    from vinedresser.data.batching.reader import stream
    from vinedresser.data.shards import open_shards
    from vinedresser.model import Vocabulary
    from vinedresser.objective import Objective
    from vinedresser.training.device import resolve_device
    from vinedresser.training.optimizer import build_optimizer
    from vinedresser.training.step import training_steps

    experiment = Experiment.from_json(json.loads(Path(plain).read_text()))
    opened, workers = open_shards(Path(shards)), experiment.compute.workers
    if workers > 1:
        dist.init_process_group("gloo")
    here = resolve_device(experiment.compute, rank=rank)
    torch.manual_seed(1)
    model = experiment.model.build(Vocabulary(opened.source_size, opened.source_size, joint=True))
    objective = Objective(experiment.objective, model.train())
    optimizer = build_optimizer(objective, experiment.optim)
    batches = stream(opened, experiment.batch, seed=experiment.seed, rank=rank, of=workers)
    begun, spent, tokens, over = 0.0, 0.0, 0, torch.zeros(1)
    for step in training_steps(objective, batches, optimizer, experiment, device=here):
        if step.index == WARM_UP:
            _meet()
            begun, spent = time.perf_counter(), time.process_time()
        if step.index > WARM_UP:
            tokens += int(step.tokens)
            over[0] = float(time.perf_counter() - begun > seconds)
            if workers > 1:  # rank 0 says when it is over: all ranks take equally many steps
                dist.broadcast(over, 0)
            if over[0]:
                break
    seconds, cpu = time.perf_counter() - begun, time.process_time() - spent
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu": cpu}))
    sys.stdout.flush()
    os._exit(0)


def _meet() -> None:
    """Waits until every process of a measurement has warmed up."""
    folder, count = os.environ.get("MEETING", ""), int(os.environ.get("MEETING_OF", "1"))
    if not folder:
        return
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + PATIENCE
    while len(list(Path(folder).iterdir())) < count and time.monotonic() < end:
        time.sleep(0.005)


class Throughput:
    """Tokens a wall second of one worker, two together, and two strangers."""

    def __init__(self, start: Start, seconds: float) -> None:
        self.start, self.seconds = start, seconds
        self.files = {}
        for workers in (1, 2):
            self.files[workers] = start.folder / f"workers-{workers}.json"
            self.files[workers].write_text(json.dumps(_experiment(workers).to_json()))

    def measure(self, name: str) -> tuple[float, float]:
        """Real target tokens of all processes together, a wall second and a processor second."""
        workers, processes = {"one": (1, 1), "two": (2, 2), "strangers": (1, 2)}[name]
        with socket.socket() as free, tempfile.TemporaryDirectory() as meeting:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
            free.close()
            common = {**os.environ, "OMP_NUM_THREADS": "1", "MEETING": meeting,
                      "MEETING_OF": str(processes), "WORLD_SIZE": str(workers),
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            running = []
            for rank in range(processes):
                place = rank if workers > 1 else 0
                command = [sys.executable, __file__, "--worker", str(self.files[workers]),
                           str(self.start.shards), str(place), str(self.seconds)]  # fmt: skip
                environment = {**common, "RANK": str(place), "LOCAL_RANK": str(place)}
                running.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
                )
            found = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
        rate = sum(one["tokens"] / one["seconds"] for one in found)
        return rate, sum(one["tokens"] for one in found) / sum(one["cpu"] for one in found)


def alternate(names: list[str], measure: Callable[[str], Any], rounds: int) -> dict[str, list[Any]]:
    """Everything once a round, forwards in one and backwards in the next."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            found[name].append(measure(name))
        line = ", ".join(f"{name} {_shown(found[name][-1])}" for name in names)
        print(f"round {turn + 1}: {line}", flush=True)
    return found


def _shown(value: Any) -> str:
    first, second = value
    is_rate = first > 1000  # tokens a second; no start takes that long
    return f"{first:.0f} ({second:.0f} CPU)" if is_rate else f"{first:.2f} s ({second:.2f} CPU)"


def _ratios(above: list[float], below: list[float]) -> tuple[float, str]:
    """The median over rounds of the ratio within one round, and its range."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"


def report(times: Mapping[str, list[Any]], rates: Mapping[str, list[Any]]) -> dict[str, float]:
    """Prints the tables; the figures that goals are set for, and those that explain them."""
    figures: dict[str, float] = {}
    if times:
        print(f"\n{'to the first update':22}{'wall s':>8}{'min':>8}{'max':>8}{'CPU s':>8}")
    walls = {name: [wall for wall, _ in pairs] for name, pairs in times.items()}
    for name, pairs in times.items():
        wall, spent = walls[name], statistics.median(cpu for _, cpu in pairs)
        middle = statistics.median(wall)
        print(f"{name:22}{middle:8.2f}{min(wall):8.2f}{max(wall):8.2f}{spent:8.2f}")
        figures[f"{name}_seconds"] = round(middle, 3)
    for name in walls:
        if name != "torchrun" and "torchrun" in walls:
            ratio, spread = _ratios(walls[name], walls["torchrun"])
            figures[f"{name}_vs_torchrun"] = round(ratio, 3)
            print(f"{name} against torchrun: {ratio:.2f} ({spread})")
    if rates:
        print(f"\n{'target tokens a wall s':22}{'median':>8}{'min':>8}{'max':>8}{'a CPU s':>8}")
        wall = {name: [rate for rate, _ in found] for name, found in rates.items()}
        cpu = {name: [rate for _, rate in found] for name, found in rates.items()}
        for name, found in wall.items():
            middle, spent = statistics.median(found), statistics.median(cpu[name])
            print(f"{name:22}{middle:8.0f}{min(found):8.0f}{max(found):8.0f}{spent:8.0f}")
        for label, above, below in (
            ("two_workers_vs_one", wall["two"], wall["one"]),
            ("two_strangers_vs_one", wall["strangers"], wall["one"]),
            ("two_workers_vs_strangers_per_cpu_second", cpu["two"], cpu["strangers"]),
        ):
            ratio, spread = _ratios(above, below)
            figures[label] = round(ratio, 3)
            print(f"{label}: {ratio:.2f} ({spread})")
        print("two_strangers_vs_one is the ceiling: processes that exchange nothing")
    return figures


def main() -> None:
    """Runs the rounds and prints tables and ratios."""
    if sys.argv[1:2] == ["--group"]:
        return in_group(Path(sys.argv[2]), Path(sys.argv[3]))
    if sys.argv[1:2] == ["--worker"]:
        plain, shards, rank, seconds = sys.argv[2:]
        return work(plain, shards, int(rank), float(seconds))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="wall seconds of a window")
    parser.add_argument("--only", nargs="+", help="of torchrun in_place ray_train workers")
    arguments = parser.parse_args()
    wanted = arguments.only or ["torchrun", "in_place", "ray_train", "workers"]
    with tempfile.TemporaryDirectory() as folder:
        start = Start(Path(folder))
        names = [name for name in ("torchrun", "in_place", "ray_train") if name in wanted]
        times = alternate(names, start.measure, arguments.rounds)
        rates: dict[str, list[Any]] = {}
        if "workers" in wanted:
            throughput = Throughput(start, arguments.seconds)
            rates = alternate(["one", "two", "strangers"], throughput.measure, arguments.rounds)
    print(json.dumps(report(times, rates)))
    return None


if __name__ == "__main__":
    main()
