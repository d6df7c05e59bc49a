"""Random workspaces of small real files, with what each of their parts needs, for tests of gc."""

import fcntl
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vinedresser.gc import Retention
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.layout import RunFolder, SweepFolder, Workspace
from vinedresser.workspace.process import this_process

DEAD = "elsewhere.1~1~1"
HOUR = 3600.0


@dataclass
class RandomWorkspace:
    """A workspace in a random state.

    Attributes:
        space: its folders.
        keep: random amounts.
        registered: digest -> names, as the registry gives them.
        needed: folder -> why nothing may remove it.
        held: manifests that a reader has opened.
    """

    space: Workspace
    draw: random.Random
    keep: Retention = field(init=False)
    registered: dict[str, list[str]] = field(default_factory=dict)
    needed: dict[Path, str] = field(default_factory=dict)
    held: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = self.draw
        days = draw.choice([None, None, 1, 30])
        self.keep = Retention(top=draw.randint(1, 3), shard_sets=draw.randint(1, 2), days=days)
        self.shards = [self._shards(task, i) for task in "ab" for i in range(draw.randint(0, 4))]
        self.trained: list[RunFolder] = []
        self.open: list[RunFolder] = []
        for number in range(draw.randint(0, 8)):
            self._run(number)
        self.models = [self._model(number) for number in range(draw.randint(0, 3))]
        for number in range(draw.randint(0, 3)):
            self._sweep(number)
        self._register()
        for folder in self._bundles() + self.shards:
            if draw.random() < 0.1:
                self.held.append(folder / "manifest.json")
                self.need(folder, "a reader has opened it")

    def need(self, folder: Path, reason: str) -> None:
        self.needed.setdefault(folder, reason)

    def _bundles(self) -> list[Path]:
        return [run.bundle for run in self.trained] + self.models

    def _committed(self, folder: Path, **files: Any) -> Path:
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        (folder / "weights.safetensors").write_bytes(b"w" * 100)
        content: dict[str, Any] = {"schema": 1, "files": {}, "meta": {"name": str(folder)}}
        content["digest"] = digest_of(content)
        (folder / "manifest.json").write_text(json.dumps(content))
        return folder

    def _shards(self, task: str, number: int) -> Path:
        folder = self._committed(self.space.shards / f"{task}-{number:012x}")
        used = time.time() - self.draw.randint(0, 100) * HOUR
        os.utime(folder, (used, used))
        return folder

    def _init(self) -> str:
        choices = (
            [str(bundle) for bundle in self._bundles()]
            if hasattr(self, "models")
            else [str(run.bundle) for run in self.trained]
        )
        return self.draw.choice([*choices, "", ""])

    def _inputs(self, path: Path, reason: str) -> None:
        """Write the inputs of unfinished work, which must stay."""
        init = self._init()
        shards = self.draw.choice(self.shards) if self.shards else None
        path.write_text(json.dumps({"shards": shards.name if shards else "gone", "init": init}))
        if reason:
            for folder in [Path(init)] * bool(init) + [shards] * (shards is not None):
                self.need(folder, f"{reason} needs it")

    def _run(self, number: int) -> None:
        draw, run = self.draw, RunFolder(self.space.runs / f"r-{number:012x}")
        run.path.mkdir(parents=True)
        lease = draw.choice(["none", "none", "none", "dead", "expired", "here", "remote"])
        is_live = lease in ("here", "remote")
        if lease != "none":
            process = {"dead": this_process() + "9", "here": this_process()}.get(lease, DEAD)
            beat = int(time.time()) - (1000 if lease == "expired" else 0)
            fields = {"token": "t", "process": process, "heartbeat": str(beat)}
            run.command_lease.write_text(json.dumps(fields))
        kind = draw.choice(["trained", "trained", "open", "empty"])
        if kind == "trained":
            self._committed(run.bundle, experiment={"init": self._init() or None}, scores={})
            run.outcome.write_text("{}")
            self.trained.append(run)
            if draw.random() < 0.2:
                run.checkpoint(5).mkdir(parents=True)
        elif kind == "open":
            run.checkpoint(5).mkdir(parents=True)
            self.open.append(run)
            self._inputs(run.inputs, run.name if self.keep.days is None or is_live else "")
            if self.keep.days is None:
                self.need(run.checkpoint(5), "the run resumes from it")
        if is_live:
            self.need(run.path, "a command runs on it")

    def _model(self, number: int) -> Path:
        init = str(self.draw.choice(self.trained).bundle) if self.trained else None
        folder = self.space.models / f"m-{number:012x}"
        return self._committed(folder, experiment={"init": init}, scores={})

    def _sweep(self, number: int) -> None:
        draw, sweep = self.draw, SweepFolder(self.space.sweeps / f"s-{number:012x}")
        sweep.path.mkdir(parents=True)
        self.need(sweep.path, "a search is recognised or resumed")
        complete = draw.sample(self.trained, draw.randint(0, len(self.trained)))
        if draw.random() < 0.5:
            self._inputs(sweep.inputs, sweep.name)
            lines = [
                {"op_code": 8, "user_attr": {"outcome": {"run/bundle": str(run.bundle)}}}
                for run in complete
            ]
            sweep.journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"tor')
            for run in complete:
                self.need(run.bundle, "a complete trial of a search that goes on")
            return
        front = draw.sample(range(len(complete)), draw.randint(0, min(2, len(complete))))
        trials = [
            {"number": i, "state": "complete", "run": run.name} for i, run in enumerate(complete)
        ]
        stopped = [{"number": 50, "state": "pruned", "run": f"gone-{number:012x}"}]
        content = {"trials": trials + stopped, "front": front}
        sweep.outcome.write_text(json.dumps(content))
        for i, run in enumerate(complete):
            if i < self.keep.top or i in front:
                self.need(run.bundle, "among the best of a search")

    def _register(self) -> None:
        for number, folder in enumerate(self._bundles()):
            if self.draw.random() < 0.3:
                digest = json.loads((folder / "manifest.json").read_text())["digest"]
                names = [f"x/{number}"] + ["x@champion"] * (self.draw.random() < 0.3)
                self.registered[digest] = names
                self.need(folder, f"registered as {', '.join(names)}")
                if len(names) > 1:
                    self._need_origins(folder)
            elif self.draw.random() < 0.1:
                table = self.space.path / f"pipeline{number}.json"
                table.write_text(json.dumps({"bundle": str(folder)}))
                self.need(folder, "the result of a pipeline")
                self._need_origins(folder)

    def _need_origins(self, folder: Path) -> None:
        init = json.loads((folder / "experiment.json").read_text())["init"]
        while init:
            self.need(Path(init), "the same pipeline recognises it")
            init = json.loads((Path(init) / "experiment.json").read_text())["init"]

    @contextmanager
    def readers(self) -> Iterator[None]:
        """Hold what readers have opened, by descriptors of their own."""
        with ExitStack() as stack:
            for path in self.held:
                stream = stack.enter_context(path.open())
                fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    def files(self) -> Mapping[Path, bytes]:
        """Return the files of everything that is needed."""
        found = {}
        for folder in self.needed:
            for path in [folder, *folder.rglob("*")]:
                found[path] = path.read_bytes() if path.is_file() else b""
        return found
