"""Runs below Ray that are killed and run again: one process imports, children of it train and die.

An import takes seconds and a tiny run less than one, so children are forked from a process that
has imported everything and computed nothing. Each is a process of its own that trains, writes and
is ended by SIGKILL. Every update is written down bit by bit, so that two runs can be compared.
"""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from vinedresser import evaluate as evaluation
from vinedresser.config import Experiment
from vinedresser.data.shards import open_shards
from vinedresser.distributed import train as distributed
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train as command
from vinedresser.errors import InterruptedRunError
from vinedresser.tracking import NullTracker, store_for
from vinedresser.training import evaluator as judging
from vinedresser.training import run as runner
from vinedresser.training.device import resolve_device
from vinedresser.training.optimizer import OptimizerState
from vinedresser.training.outcome import Outcome, run_folder
from vinedresser.training.run import Run
from vinedresser.training.step import Step
from vinedresser.workspace import stopping
from vinedresser.workspace.layout import Workspace

# A named point, and the how-manieth pass of it, where a process gets SIGKILL or another signal.
Blow = tuple[str, int] | tuple[str, int, int]
# Or so many seconds after its start.
Moment = Blow | float


@dataclass(frozen=True)
class Job:
    """One run: what is trained on which shards, where, and where its updates are written down."""

    experiment: Mapping[str, Any]
    shards: Path
    workspace: Path
    trace: Path


class Points:
    """Counts named points as this process passes them, and at one of them gets a signal.

    Points: `start`, `gradient@7` (after backward, before the update), `updated@7` (after it, before
    anybody hears of it), `yielded@7`, `evaluate`, `decode@2` (each batch of the second evaluation),
    `evaluated`; and each time the file system is about to be asked for more than reading:
    `checkpoints`, `bundle` or `outcome`, and of these `writing@7`, `rename@7`, `renamed@7` around a
    checkpoint of step 7, and `removing` of what is in an old one.
    """

    def __init__(self, at: Blow | None) -> None:
        self.at, self.counts = at[:2] if at else None, Counter[str]()
        self._signal = at[2] if at and len(at) > 2 else signal.SIGKILL
        self._room, self._renamed = "", 0

    def __call__(self, name: str) -> None:
        """Passes a point."""
        self.counts[name] += 1
        if self.at == (name, self.counts[name]):
            os.kill(os.getpid(), self._signal)

    def audit(self, event: str, words: tuple[Any, ...]) -> None:
        """Called by Python before each open, rename, remove, mkdir and rmdir."""
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if isinstance(words[0], int) or (event == "open" and words[1] == "r"):
            return
        path = os.fsdecode(words[event == "os.rename"])
        if path.startswith("/"):
            found = re.search(r"/runs/[^/]+/\.?(checkpoints|bundle|outcome)", path)
            self._room = found[1] if found else ""
        if not self._room:
            return
        if self._renamed:
            self(f"renamed@{self._renamed}")
            self._renamed = 0
        if of_step := re.search(r"/(\.?)step-(\d+)", path):
            step = int(of_step[2])
            if event == "os.rename" and not of_step[1]:
                self(f"rename@{step}")
                self._renamed = step
            self(f"writing@{step}")
        if not path.startswith("/"):
            self("removing")
        self(self._room)


def trace_steps(path_of: Callable[[int], Path], points: Points | None = None) -> dict[str, int]:
    """Lets training write a line an update into a rank's file; the update that was last finished.

    A line is one write to the end of the file: whole, or not there.
    """
    steps, now = runner.training_steps, {"step": 0}

    def training_steps(*words: Any, **more: Any) -> Iterator[Step]:
        now["step"] = more.get("start", 0)
        stream = os.open(path_of(more["device"].rank), os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        for step in steps(*words, **more):
            now["step"] = step.index
            os.write(stream, f"{line_of(step)}\n".encode())
            if points is not None:
                points(f"yielded@{step.index}")
            yield step

    runner.training_steps = training_steps
    return now


def watch(points: Points, trace: Path) -> None:
    """Puts the points into this process, which is thrown away afterwards."""
    sys.addaudithook(points.audit)
    now = trace_steps(lambda _: trace, points)
    evaluate, decode = judging.evaluate, evaluation.decode

    def evaluated(*words: Any, **more: Any) -> Any:
        points("evaluate")
        found = evaluate(*words, **more)
        points("evaluated")
        return found

    def decoded(*words: Any, **more: Any) -> Any:
        points("decode")
        points(f"decode@{points.counts['evaluate']}")
        return decode(*words, **more)

    judging.evaluate, evaluation.decode = evaluated, decoded
    register_optimizer_step_pre_hook(lambda *_: points(f"gradient@{now['step'] + 1}"))
    register_optimizer_step_post_hook(lambda *_: points(f"updated@{now['step'] + 1}"))


def line_of(step: Step) -> str:
    """An update as text that loses no bit."""
    floats = (
        float(step.nll),
        float(step.gradient_norm),
        step.learning_rate,
        step.metrics["teacher_forcing_ratio"],
    )
    return " ".join([str(step.index), str(int(step.tokens)), *(x.hex() for x in floats)])


def ending(outcome: Outcome) -> str:
    """What a run ended in: a digest of the bundle's weights, and its scores."""
    plain = asdict(outcome)
    for key in ("folder", "bundle", "seconds"):
        del plain[key]
    weights = Path(outcome.bundle) / "weights.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return json.dumps({"weights": digest, "outcome": plain}, sort_keys=True)


def state(run: Run) -> str:
    """Digests of all that training changes: weights, averages, the optimizer's moments."""
    groups = {
        "model": run.model.state_dict(),
        "average": run.ema.tensors,
        "optimizer": OptimizerState(run.optimizer).state_dict(),
    }
    return json.dumps({name: tensors_digest(tensors) for name, tensors in groups.items()})


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(job: Job, at: Blow | None, counts: Path | None = None) -> None:
    """Trains to the end, in device, as `vinedresser train` does below its tracking."""
    logging.getLogger("vinedresser").setLevel(logging.ERROR)  # tiny models have many symptoms
    points, runs = Points(at), list[Run]()
    watch(points, job.trace)

    execute = Run.execute

    def begun(run: Run, monitor: Any = None) -> Outcome | None:
        runs.append(run)
        points("start")
        return execute(run, monitor)

    store = store_for(job.workspace, "kills")
    context = RunContext(open_shards(job.shards), Workspace(job.workspace), store, kind="prune")
    stopping._POLL_SECONDS = 0.0  # a stop request is seen at once
    Run.execute = begun
    distributed.open_run = lambda *_, **__: NullTracker()
    config = Experiment.from_json(job.experiment)
    outcome = command(config, context)
    with job.trace.open("a") as stream:
        stream.writelines(f"state {state(run)}\n" for run in runs)
        stream.write(f"end {ending(outcome)}\n")
    if counts is not None:
        seconds = outcome.seconds
        found = {"points": points.counts, "modules": sorted(sys.modules), "seconds": seconds}
        counts.write_text(json.dumps(found))


def pair(job: Job) -> None:
    """Two ranks of gloo in children of this process, and nobody kills them.

    Raises:
        RuntimeError: one of them failed.
    """
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if not children[-1]:
            try:
                _be(rank, job)
            except BaseException:  # noqa: BLE001 - said, and the parent raises
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    for child in children:
        _checked(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _be(rank: int, job: Job) -> None:
    meeting = f"file://{job.trace.with_suffix('.meeting')}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    trace_steps(lambda rank: job.trace.with_name(f"trace-{rank}"))
    config, shards = Experiment.from_json(job.experiment), open_shards(job.shards)
    run = Run(
        config,
        shards,
        run_folder(config, shards, Workspace(job.workspace)),
        device=resolve_device(config.compute, rank=rank),
        tracker=NullTracker(),
    )
    outcome = run.execute()
    if outcome is not None:
        with job.trace.open("a") as stream:
            stream.write(f"end {ending(outcome)}\n")


def attempt(job: Job, moment: Moment | None = None, *, counts: Path | None = None) -> int:
    """One child that trains; its exit code: 0, -9 where it was killed, 75 where told to stop.

    Raises:
        RuntimeError: it ended in another way than by the kill or at the end.
    """
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            train(job, moment if isinstance(moment, tuple) else None, counts)
        except InterruptedRunError as error:
            os._exit(error.exit_code)
        except BaseException:  # noqa: BLE001 - said, and the parent raises
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if isinstance(moment, float):
        end = time.monotonic() + moment
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return _checked(os.waitstatus_to_exitcode(status))
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    return _checked(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _checked(code: int) -> int:
    if code not in (0, -signal.SIGKILL, InterruptedRunError.exit_code):
        raise RuntimeError(f"a run ended with code {code}; its traceback is above")
    return code


@dataclass(frozen=True)
class Trace:
    """What runs wrote down.

    Attributes:
        lines: update -> the line of every attempt that finished it.
        states: of attempts that reached the end; none where only the outcome was still to be read.
        ends: of attempts that ended well.
    """

    lines: Mapping[int, list[str]]
    states: list[str]
    ends: list[str]

    @property
    def last(self) -> int:
        """The last update that any attempt finished."""
        return max(self.lines, default=0)


def read_trace(path: Path) -> Trace:
    """Reads what was written, whoever was killed while writing."""
    found = Trace({}, [], [])
    for line in path.read_text().splitlines() if path.exists() else ():
        first, _, rest = line.partition(" ")
        if first in ("state", "end"):
            (found.states if first == "state" else found.ends).append(rest)
        else:
            cast("dict[int, list[str]]", found.lines).setdefault(int(first), []).append(rest)
    return found


def differences(whole: Trace, killed: Trace) -> list[str]:
    """Where a killed run is not, bit for bit, the one that nobody killed; empty is identical."""
    found = []
    for index in sorted(whole.lines.keys() | killed.lines.keys()):
        wanted = set(whole.lines.get(index, []))
        if len(wanted) != 1 or set(killed.lines.get(index, [])) != wanted:
            found.append(f"step {index}: {killed.lines.get(index)} is not {whole.lines.get(index)}")
    found += [f"state: {s} is not {whole.states}" for s in killed.states if s not in whole.states]
    if len(killed.ends) != len(whole.ends) or set(killed.ends) != set(whole.ends):
        found.append(f"end: {killed.ends} is not {whole.ends}")
    return found


@dataclass(frozen=True)
class Whole:
    """A run that nobody kills: what it wrote, how often it passed each point, how long it took."""

    trace: Trace
    counts: Counter[str]
    seconds: float


def whole_run(job: Job) -> Whole:
    """Trains undisturbed.

    What it had to import, this process imports, so that the children after it need not.
    """
    counts = job.trace.with_suffix(".counts")
    attempt(job, counts=counts)
    found = json.loads(counts.read_text())
    for name in found["modules"]:
        with contextlib.suppress(ImportError):  # those that another module makes up
            importlib.import_module(name)
    return Whole(read_trace(job.trace), Counter(found["points"]), found["seconds"])
