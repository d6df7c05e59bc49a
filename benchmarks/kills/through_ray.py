"""Runs of two gloo workers through Ray Train: workers and drivers are killed, and run again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
from kills import forms, nursery

from vinedresser.cluster.connect import connect
from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train
from vinedresser.tracking import store_for
from vinedresser.workspace.layout import Workspace

# Of each run, who dies in turn: a worker, or the driver, which is then started again.
PATTERNS = ("WWD", "WDW", "DWW", "W")
_FORMS = ("transformer, gated, sampled", "attention_rnn, bf16", "conv, sampled")
# Enough for a kill in the first 150 to come long before the end.
_STEPS = 400
# Seconds that any one wait may take; a group starts in 10 on two idle cores.
_PATIENCE = 240.0
# Exit code of a command that another process keeps from its folder.
_BUSY = 75


def kill(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills so many workers and drivers, compares all losses and final weights; prints a table."""
    draw, done = random.Random(seed), 0  # noqa: S311
    figures: dict[str, Any] = {"kills": 0, "identical": 0, "runs": 0, "drivers": 0}
    found: dict[str, list[float]] = {"worker_seconds": [], "driver_seconds": [], "gone_seconds": []}
    wholes: dict[str, tuple[nursery.Trace, ...]] = {}
    while done < kills:
        pattern = PATTERNS[figures["runs"] % len(PATTERNS)][: kills - done]
        name = _FORMS[figures["runs"] % len(_FORMS)]
        if name not in wholes:
            wholes[name] = _whole(folder / f"whole-{len(wholes)}", name)
        driven = _Driven(folder / f"run-{figures['runs']}", name)
        steps = sorted(draw.sample(range(5, 150), len(pattern)))
        reached = list[int]()
        for who, step in zip(pattern, steps, strict=True):
            driven.wait_for(step)
            time.sleep(draw.uniform(0, 0.1))
            key, seconds = driven.kill_worker() if who == "W" else driven.kill_driver()
            found[key].append(seconds)
            reached.append(driven.reached)
        found["gone_seconds"] += driven.gone_seconds
        traces = driven.finish()
        differing = [
            line
            for one, other in zip(wholes[name], traces, strict=True)
            for line in nursery.differences(one, other)
        ]
        lines = sum(len(each) for t in traces for each in t.lines.values())
        again = lines - sum(len(t.lines) for t in traces)
        verdict = "differs: " + differing[0] if differing else "identical"
        print(
            f"through Ray, {name}: {pattern} killed after {reached}; {lines} losses of 2 workers, "
            f"{again} re-run; {verdict}",
            flush=True,
        )
        done += len(pattern)
        figures["kills"], figures["runs"] = done, figures["runs"] + 1
        figures["drivers"] += pattern.count("D")
        figures["identical"] += len(pattern) * (not differing)
    for key, values in found.items():
        figures[key] = [round(value, 1) for value in values]
    return figures


def _job(folder: Path, form: str) -> nursery.Job:
    folder.mkdir(parents=True)
    shards = forms.corpus(folder, "symbols")
    plain = forms.experiment(form, shards.task, **{"compute.workers": 2, "steps": _STEPS})
    return nursery.Job(plain, shards.folder, folder / "workspace", folder / "trace-0")


def _whole(folder: Path, form: str) -> tuple[nursery.Trace, ...]:
    """Two workers whom nobody kills, and without Ray: they start in a tenth of the time."""
    job = _job(folder, form)
    nursery.pair(job)
    return nursery.read_trace(job.trace), nursery.read_trace(folder / "trace-1")


class _Driven:
    """One run: its driver process, and the traces of its two workers."""

    def __init__(self, folder: Path, form: str) -> None:
        job = _job(folder, form)
        self.folder, self.gone_seconds, self.reached = folder, list[float](), 0
        self._plan = folder / "plan.json"
        words = {"experiment": job.experiment, "shards": str(job.shards), "folder": str(folder)}
        self._plan.write_text(json.dumps(words))
        self._driver = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, sys.argv[0], "--driver", str(self._plan)]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _trace(self, rank: int) -> nursery.Trace:
        return nursery.read_trace(self.folder / f"trace-{rank}")

    def _wait(self, until: Callable[[], bool], what: str) -> float:
        began = time.monotonic()
        while not until():
            if self._driver.poll() == _BUSY:  # a worker of the dead driver still holds the run
                time.sleep(0.5)
                self._driver = self._start()
            if self._driver.poll() not in (None, -signal.SIGKILL):
                text = (self.folder / "log").read_text()[-2000:]
                raise RuntimeError(f"driver ended with {self._driver.returncode}: {text}")
            if time.monotonic() - began > _PATIENCE:
                raise TimeoutError(f"{what} took over {_PATIENCE:.0f} s")
            time.sleep(0.005)
        return time.monotonic() - began

    def wait_for(self, step: int) -> None:
        """Until an attempt has finished an update."""
        self._wait(lambda: self._trace(0).last >= step, f"step {step}")

    def _next_line(self, since: float) -> float:
        """Seconds from a kill until another update of rank 0 was written down."""
        path = self.folder / "trace-0"
        size, self.reached = path.stat().st_size, self._trace(0).last
        if self.reached == _STEPS:
            raise RuntimeError("the run had ended before the kill; make it longer")
        self._wait(lambda: path.stat().st_size > size, "the next step")
        return time.monotonic() - since

    def kill_worker(self) -> tuple[str, float]:
        """SIGKILL to one of the two; seconds until the next update."""
        workers = [p for p in _below(self._driver.pid) if "RayTrainWorker" in _name(p)]
        killed = workers[-1]
        began = time.monotonic()
        killed.kill()
        # What the other one still does before it hears of it is no recovery.
        others = [p for p in workers if p.pid != killed.pid]
        self._wait(lambda: not any(map(_lives, others)), "the other worker's end")
        return "worker_seconds", self._next_line(began)

    def kill_driver(self) -> tuple[str, float]:
        """SIGKILL to the driver; the same command again, at once; seconds until its next update."""
        # Ray's own two agents try for a minute to report the loss to a service that is gone, too.
        children = [p for p in _below(self._driver.pid) if "Agent" not in _name(p)]
        began = time.monotonic()
        os.kill(self._driver.pid, signal.SIGKILL)
        self._driver.wait()
        self._driver = self._start()
        self.gone_seconds.append(self._wait(lambda: not any(map(_lives, children)), "dying"))
        return "driver_seconds", self._next_line(began)

    def finish(self) -> tuple[nursery.Trace, ...]:
        """Waits for the end; the traces of both workers, with the bundle in the first one's."""
        self._wait(lambda: self._driver.poll() == 0, "the end")
        return self._trace(0), self._trace(1)


def _below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _lives(process: psutil.Process) -> bool:
    """A dead one that nobody reaps, as in a container without an init, does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class _TracedContext(RunContext):
    """A context whose arrival in a process makes its training loop write down every update."""

    def __init__(self, context: RunContext, folder: Path) -> None:
        super().__init__(**{each.name: getattr(context, each.name) for each in fields(context)})
        self.__dict__["folder"] = folder

    def __reduce__(self) -> tuple[Any, ...]:
        plain = {each.name: getattr(self, each.name) for each in fields(RunContext)}
        return _traced, (plain, self.__dict__["folder"])


def _traced(plain: Mapping[str, Any], folder: Path) -> RunContext:
    nursery.trace_steps(lambda rank: folder / f"trace-{rank}")
    return RunContext(**plain)


def drive(plan: Path) -> None:
    """A driver process: trains what the plan says, with two workers that write traces."""
    words = json.loads(plan.read_text())
    folder = Path(words["folder"])
    workspace = folder / "workspace"
    shards, store = open_shards(Path(words["shards"])), store_for(workspace, "kills")
    context = RunContext(shards, Workspace(workspace), store)
    with connect(cpus=2):
        outcome = train(
            Experiment.from_json(words["experiment"]),
            _TracedContext(context, folder),
        )
    with (folder / "trace-0").open("a") as stream:
        stream.write(f"end {nursery.ending(outcome)}\n")
