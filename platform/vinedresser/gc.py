"""Garbage collection: what a workspace must keep, and the removal of everything else.

Kept are the bundles of registered versions, the result of each pipeline with what it was made from,
runs and sweeps that can resume with what they need, the best trials of each sweep, and the last
shard sets of each task. Leases and locks, not names of hosts, decide what is in use: a run under a
live lease stays, and so does a bundle or shard set that any process has opened (see holds.py).
"""

import re
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from vinedresser.config import Section
from vinedresser.errors import DamagedError
from vinedresser.workspace.commit import is_committed, read_manifest
from vinedresser.workspace.holds import unread
from vinedresser.workspace.inputs import read_inputs
from vinedresser.workspace.layout import BundleFolder, RunFolder, SweepFolder, Workspace
from vinedresser.workspace.lease import Lease, is_abandoned, leased
from vinedresser.workspace.storage import POSIX, make_folder, parsed_object

# Folders of commits in progress: `.NAME.tmp-PROCESS~ID`.
_STAGING = re.compile(r"^\..+\.tmp-(?P<process>.+)~[0-9a-f]{8}$")


class Retention(Section):
    """Amounts that a garbage collection keeps."""

    # Complete trials of each sweep whose models stay; those of a Pareto front always do.
    top: PositiveInt = 3
    # Shard sets of each task, the last used ones.
    shard_sets: PositiveInt = 3
    # Days after which runs outside of sweeps are removed, ended or not; null keeps them.
    days: NonNegativeInt | None = None


@dataclass(frozen=True)
class Entry:
    """A folder or file of the workspace, with what happens to it and why."""

    path: Path
    bytes: int
    is_kept: bool
    reason: str


def collect(
    workspace: Workspace,
    keep: Retention,
    registered: Mapping[str, Sequence[str]],
    *,
    is_dry: bool = False,
) -> list[Entry]:
    """Remove what nothing needs; return what is kept and what is removed, with reasons.

    A reader never loses a folder that it has opened. A command that starts meanwhile finds a
    folder either whole or absent.

    Args:
        workspace: folder of all results.
        keep: amounts.
        registered: digest of a bundle -> its names in the registry, `NAME@ALIAS` and
            `NAME/VERSION`; see `registry.versions.registered_bundles`.
        is_dry: decide, and remove nothing.

    Raises:
        BusyError: another garbage collection is running.
        MachineError: the disk refuses.
    """
    if not workspace.path.is_dir():
        return []
    with leased(workspace.leases / "gc.json", "gc"):
        shutil.rmtree(workspace.trash, ignore_errors=True)  # of a killed one
        plan = Plan(workspace, keep, registered)
        entries = []
        for path, reason in plan.kept.items():
            entries.append(Entry(path, _size(path), True, reason))
        for path, reason in plan.dropped.items():
            size = _size(path)
            in_use = _in_use(path) if is_dry else _remove(path, workspace.trash)
            entries.append(Entry(path, size, bool(in_use), in_use or reason))
        shutil.rmtree(workspace.trash, ignore_errors=True)
    return entries


@dataclass(frozen=True)
class Claim:
    """Verdict of an ended sweep on the run of one of its trials.

    Attributes:
        is_kept: whether it is among the best.
        reason: its rank.
        ended: time at which the sweep ended.
    """

    is_kept: bool
    reason: str
    ended: float


@dataclass
class Plan:
    """Decision about every folder of a workspace; `kept` and `dropped` hold the reasons."""

    workspace: Workspace
    keep: Retention
    registered: Mapping[str, Sequence[str]]
    kept: dict[Path, str] = field(default_factory=dict)
    dropped: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Decide."""
        space = self.workspace
        # Shard sets that unfinished work names; None where one does not name any.
        self.needed_shards: set[str | None] = set()
        self._bundles()
        claims = _claims(space, self.keep.top)
        sweeps = [SweepFolder(path) for path in _folders(space.sweeps)]
        self.has_open_sweep = not all(sweep.outcome.is_file() for sweep in sweeps)
        for sweep in sweeps:
            self._sweep(sweep)
        for run in map(RunFolder, _folders(space.runs)):
            self._run(run, claims.get(run.name, []))
        self._shards()
        for folder in _folders(space.champions):
            names = [name for name in self.registered.get(folder.name, ()) if "@" in name]
            if names:
                self.kept.setdefault(folder, f"registered: {', '.join(names)}")
            elif folder not in self.kept:
                self.dropped[folder] = "a copy of the registry's; fetched again when needed"
        for path, reason in _leftovers(space):
            self.dropped[path] = reason
        for path in list(self.dropped):
            if path in self.kept or set(path.parents) & self.dropped.keys():
                del self.dropped[path]

    def need(self, bundle: str, reason: str, *, with_origins: bool = False) -> None:
        """Keep the bundle at a path, and on request the bundles that it was made from.

        With these the same pipeline recognises its steps.
        """
        path = _inside(self.workspace, bundle)
        while path is not None:
            unit = path.parent if path.parent.parent == self.workspace.runs else path
            if not unit.is_dir():
                return
            self.kept.setdefault(unit, reason)
            if not with_origins:
                return
            reason = f"{unit.name} was made from it"
            path = _inside(self.workspace, _init_of(path))

    def _bundles(self) -> None:
        """Keep registered and damaged bundles, and the results of pipelines."""
        for bundle in _bundles(self.workspace):
            try:
                names = self.registered.get(read_manifest(bundle).digest, ())
            except DamagedError as error:
                self.need(str(bundle), f"damaged: {error.args[0]}")
                continue
            if names:
                has_alias = any("@" in name for name in names)
                self.need(str(bundle), f"registered: {', '.join(names)}", with_origins=has_alias)
        for table in sorted(self.workspace.path.glob("*.json")):
            found = parsed_object(POSIX.read(table)).get("bundle")
            if isinstance(found, str):
                self.need(found, f"result of pipeline {table.stem}", with_origins=True)
        for model in _folders(self.workspace.models):
            if self.keep.days is None or _age(model) <= 86400 * self.keep.days:
                self.kept.setdefault(model, "a model that was made from another")
            else:
                self.dropped[model] = f"not registered, older than {self.keep.days} days"

    def _sweep(self, sweep: SweepFolder) -> None:
        if sweep.outcome.is_file():
            self.kept[sweep.path] = "record of a sweep"
            return
        self.kept[sweep.path] = "an unfinished sweep; the same command resumes it"
        self._keep_inputs(sweep.inputs, sweep.name)
        for bundle in _journal_bundles(sweep):
            self.need(bundle, f"complete trial of the unfinished sweep {sweep.name}")

    def _keep_inputs(self, path: Path, name: str) -> None:
        inputs = read_inputs(path)
        self.needed_shards.add(inputs.shards if inputs else None)
        if inputs and inputs.init:
            self.need(inputs.init, f"{name} starts from it")

    def _run(self, run: RunFolder, claims: list[Claim]) -> None:
        """Decide about one run; `claims` are those of ended sweeps that it is a trial of."""
        is_ended = run.outcome.is_file() and is_committed(run.bundle)
        if not Lease(run.command_lease).is_free():
            self.kept[run.path] = f"in use by {Lease(run.command_lease).holder()}"
            return self._keep_inputs(run.inputs, run.name)
        if run.path in self.kept:
            return None
        wanted = [claim.reason for claim in claims if claim.is_kept]
        checkpoints = list(run.checkpoints.glob("step-????????"))
        # A sweep removes checkpoints at its end; later ones are of a search that goes on.
        is_open = not is_ended and any(
            self.has_open_sweep or path.stat().st_mtime > claim.ended
            for path in checkpoints
            for claim in claims
        )
        if wanted:
            self.kept[run.path] = wanted[0]
        elif claims and not is_open:
            self._drop(run, claims[0].reason)
        elif self.keep.days is not None and _age(run.path) > 86400 * self.keep.days:
            self._drop(run, f"outside of sweeps, older than {self.keep.days} days")
        elif is_ended:
            self.kept[run.path] = "a trained model outside of sweeps"
        elif checkpoints:
            self.kept[run.path] = "an unfinished run; the same command resumes it"
            self._keep_inputs(run.inputs, run.name)
        else:
            self._drop(run, "neither a model nor a checkpoint")
        if is_ended and run.checkpoints.exists():
            self.dropped[run.checkpoints] = "checkpoints of an ended run"
        return None

    def _drop(self, run: RunFolder, reason: str) -> None:
        """Remove a run; its metrics stay until the tracking store has them."""
        if not any(run.tracking.glob("*.jsonl")):
            self.dropped[run.path] = reason
            return
        self.kept[run.path] = "its metrics wait for the tracking store; see `vinedresser sync`"
        for part in (run.bundle, run.checkpoints):
            if part.exists():
                self.dropped[part] = reason

    def _shards(self) -> None:
        by_task = defaultdict[str, list[Path]](list)
        for folder in _folders(self.workspace.shards):
            if is_committed(folder):
                by_task[folder.name.rpartition("-")[0]].append(folder)
        for task, folders in by_task.items():
            folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
            for index, folder in enumerate(folders):
                if index < self.keep.shard_sets:
                    self.kept[folder] = f"among the last {self.keep.shard_sets} of {task}"
                elif {folder.name, None} & self.needed_shards:
                    self.kept[folder] = "an unfinished run or sweep reads it"
                else:
                    self.dropped[folder] = f"not among the last {self.keep.shard_sets} of {task}"


def _claims(workspace: Workspace, top: int) -> dict[str, list[Claim]]:
    """Return name of a run -> claims of the ended sweeps that it is a trial of."""
    found = defaultdict[str, list[Claim]](list)
    for sweep in map(SweepFolder, _folders(workspace.sweeps)):
        plain = parsed_object(POSIX.read(sweep.outcome))
        front, rank = set(plain.get("front", ())), 0
        for trial in plain.get("trials", ()):  # the best first
            number, is_complete = trial["number"], trial["state"] == "complete"
            rank += is_complete
            is_kept = is_complete and (rank <= top or number in front)
            place = f"rank {rank}" if is_kept else f"not among the best {top}"
            reason = f"trial {number} of {sweep.name}, {place}"
            found[trial.get("run", "")].append(
                Claim(is_kept, reason, sweep.outcome.stat().st_mtime)
            )
    return found


def _journal_bundles(sweep: SweepFolder) -> Iterator[str]:
    """Return the bundles of the complete trials in the journal of a sweep."""
    for line in (POSIX.read(sweep.journal) or b"").split(b"\n"):
        outcome = parsed_object(line).get("user_attr", {}).get("outcome", {})
        if "run/bundle" in outcome:
            yield str(outcome["run/bundle"])


def _bundles(workspace: Workspace) -> Iterator[Path]:
    for run in map(RunFolder, _folders(workspace.runs)):
        if is_committed(run.bundle):
            yield run.bundle
    yield from filter(is_committed, _folders(workspace.models))


def _init_of(bundle: Path) -> str:
    """Return the path of the model that a bundle's training started from; "" for none."""
    return str(parsed_object(POSIX.read(BundleFolder(bundle).experiment)).get("init") or "")


def _inside(workspace: Workspace, path: str) -> Path | None:
    """Return a recorded path in the present workspace, which may have been moved; None outside."""
    parts = Path(path).parts
    for parent in (workspace.runs, workspace.models, workspace.champions):
        if parent.name in parts:
            start = len(parts) - parts[::-1].index(parent.name)
            return parent.joinpath(*parts[start:]) if parts[start:] else None
    return None


def _leftovers(workspace: Workspace) -> Iterator[tuple[Path, str]]:
    """Return what killed processes left: commits and Ray Tune's files."""
    parents = [workspace.shards, workspace.models]
    for run in map(RunFolder, _folders(workspace.runs)):
        parents += [run.path, run.checkpoints]
    for parent in parents:
        for path in parent.glob(".*"):
            match = _STAGING.match(path.name)
            if match and is_abandoned(match["process"], path.stat().st_mtime):
                yield path, "a commit of a process that has ended"
    for sweep in map(SweepFolder, _folders(workspace.sweeps)):
        if sweep.ray_scratch.exists() and Lease(sweep.lease).is_free():
            yield sweep.ray_scratch, "files of Ray Tune of a process that has ended"


def _folders(parent: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without those that begin with a dot."""
    if not parent.is_dir():
        return []
    found = (path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    return sorted(path for path in found if not path.name.startswith("."))


def _in_use(path: Path) -> str:
    """Return who uses a folder that could be removed; "" for no one."""
    for bundle in (path, RunFolder(path).bundle):
        with unread(bundle) as is_unread:
            if not is_unread:
                return "being read, or on a file system without locks"
    return ""


def _remove(path: Path, trash: Path) -> str:
    """Remove a folder that is not in use; return who uses it, or ""."""
    lease = Lease(RunFolder(path).command_lease) if path.parent.name == "runs" else None
    if lease is not None and not lease.take():
        return f"in use by {lease.holder()}"
    with unread(path) as is_unread, unread(RunFolder(path).bundle) as is_bundle_unread:
        if is_unread and is_bundle_unread:
            make_folder(trash)
            path.rename(trash / f"{path.name}-{uuid.uuid4().hex[:8]}")
            return ""
    if lease is not None:
        lease.release()
    return "being read, or on a file system without locks"


def _size(path: Path) -> int:
    """Return the bytes of the files in a folder; files that disappear meanwhile do not count."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        try:
            total += file.lstat().st_size if not file.is_dir() else 0
        except FileNotFoundError:
            continue
    return total


def _age(path: Path) -> float:
    """Return the seconds since a folder or anything directly in it was last written."""
    times = [path.stat().st_mtime, *(each.lstat().st_mtime for each in path.glob("*"))]
    return time.time() - max(times)
