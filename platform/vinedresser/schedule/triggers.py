"""Conditions of a slot: the corpus by size and time of its files, the code, and the rows.

Nothing here imports the pipeline, whose models need torch: a child process resolves it once, and
the files of its corpus are remembered until code or configuration change.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from vinedresser.config.corpus import REMOTE_PREFIX, paths_in
from vinedresser.config.kinds import allowed_packages
from vinedresser.errors import ConfigError, DataError, MachineError
from vinedresser.schedule.child import allowed_environment
from vinedresser.schedule.definition import CONFIGURATION_FILES, Schedule, When
from vinedresser.schedule.record import State
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.layout import ScheduleFolder
from vinedresser.workspace.storage import read_json, write_file

# The program, whatever the environment's PATH is.
PROGRAM = (sys.executable, "-m", "vinedresser.cli")
_PLAN_SECONDS = 300.0

# Name, size in bytes and modification time in ns of a file; -1 and 0 for an absent one.
Stamp = tuple[str, int, int]


@dataclass(frozen=True)
class Conditions:
    """Result of the conditions of a slot.

    Attributes:
        state: `met`; `wait` for data that is being written; `unmet` where nothing is to do.
        reason: for `wait` and `unmet`.
        data: fingerprint of files and code.
        rows: rows of the training split; None if they were not counted.
    """

    state: Literal["met", "wait", "unmet"]
    reason: str
    data: str = ""
    rows: int | None = None


def retrain_words(
    schedule: Schedule, workspace: Path, *more: str, changes: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the command that runs the pipeline of a schedule, with values replaced in it."""
    changes = {**schedule.overrides, **(changes or {})}
    texts = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    words = [*PROGRAM, "retrain", *more, "--json", "-w", str(workspace)]
    return [*words, "--", schedule.pipeline, *texts]


def warm_start_overrides(schedule: Schedule, state: State) -> dict[str, Any]:
    """Return the values of a pipeline that trains on from the champion; none for the first run."""
    if schedule.warm_start is None or not state.has_run:
        return {}
    name = schedule.warm_start.removeprefix("models:/").removesuffix("@champion")
    return {"steps": ["prepare", "finetune", "prune", "register"], "model_name": name}


def conditions(
    schedule: Schedule, state: State, folder: ScheduleFolder, workspace: Path, now: datetime
) -> Conditions:
    """Evaluate the conditions of a due slot by the times and sizes of files.

    Raises:
        VinedresserError: the pipeline or a file of its corpus cannot be read.
    """
    when = schedule.when
    if when == When(data="any"):
        return Conditions("met", "")
    code = _code(schedule)
    plan = _plan(schedule, folder, workspace, code)
    stamps = _stamps(plan["paths"])
    data = digest_of([plan["key"], stamps])
    if when.data == "changed" and data == state.data:
        return Conditions("unmet", "corpus, code and schedule are as at the last good run", data)
    if reason := _unsettled(when.settle, when.success_file, stamps, now):
        return Conditions("wait", reason, data)
    rows = None
    if when.min_new_rows:
        rows = sum(map(_rows, _expanded(plan["rows"])))
        new = rows - (state.rows or 0)
        if state.rows is not None and new < when.min_new_rows:
            return Conditions(
                "unmet", f"{new} new rows, fewer than the {when.min_new_rows} expected", data, rows
            )
    return Conditions("met", "", data, rows)


def _plan(
    schedule: Schedule, folder: ScheduleFolder, workspace: Path, code: Sequence[Stamp]
) -> Mapping[str, Any]:
    """Return the paths of the corpus of a pipeline: remembered, or from a dry run."""
    asked = {"pipeline": schedule.pipeline, "overrides": dict(schedule.overrides)}
    key = digest_of([asked, schedule.warm_start, version("vinedresser"), code])
    known = read_json(folder.plan)
    if isinstance(known, dict) and known.get("key") == key:
        return known
    try:
        done = subprocess.run(  # noqa: S603 - own program
            retrain_words(schedule, workspace, "--dry-run"),
            capture_output=True,
            text=True,
            timeout=_PLAN_SECONDS,
            env=allowed_environment(schedule.env),
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"{schedule.pipeline}: not resolved after {_PLAN_SECONDS:.0f} s; see what its module "
            "does on import"
        ) from None
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise (MachineError if done.returncode == MachineError.exit_code else ConfigError)(
            f"{schedule.pipeline}: {line.partition('] ')[2] or line}"
        )
    corpus = _corpus(json.loads(done.stdout).get("configuration"))
    if corpus is None:
        raise ConfigError(f"{schedule.pipeline}: names no corpus; expected a pipeline with a task")
    train = corpus.get("train", corpus.get("path"))
    rows = train.get("source") if isinstance(train, Mapping) else train
    plan = {
        "key": key,
        "paths": paths_in(corpus),
        "rows": [rows] if isinstance(rows, str) else list(rows or ()),
    }
    write_file(folder.plan, json.dumps(plan, indent=1) + "\n")
    return plan


def _corpus(tree: Any) -> Mapping[str, Any] | None:
    """Return the first corpus of a task inside a plain configuration."""
    if not isinstance(tree, Mapping):
        return None
    if isinstance(tree.get("corpus"), Mapping) and "metric" in tree:
        return tree["corpus"]  # type: ignore[no-any-return] # JSON
    return next(filter(None, map(_corpus, tree.values())), None)


def _code(schedule: Schedule) -> list[Stamp]:
    """Return the stamps of the files that may define the pipeline.

    These are the modules of the allowed packages, and the configuration files in the folder of a
    pipeline that is a file, or that an override names.
    """
    files: list[Path] = []
    for package in allowed_packages():
        found = None if package == "vinedresser" else importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or ()) if found else ():
            files += Path(place).rglob("*.py")
    named = [schedule.pipeline, *(v for v in schedule.overrides.values() if isinstance(v, str))]
    for name in named:
        if name.endswith(CONFIGURATION_FILES):
            folder = Path(name).parent
            files += [p for end in ("yaml", "yml", "json") for p in folder.glob(f"*.{end}")]
    return sorted(_stamp(str(path)) for path in set(files))


def _expanded(names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        if Path(name).exists():  # spares half a second for pyarrow, which reads the others
            found.append(name)
            continue
        from vinedresser.data.corpora.inputs import expand, locate

        with contextlib.suppress(DataError):  # a glob that fits no file yet
            found += expand([name if name.startswith(REMOTE_PREFIX) else str(locate(name))])
    return found


def _stamps(paths: Sequence[str]) -> list[Stamp]:
    """Return the stamps of all files of the paths; a folder counts by its files."""
    files: list[str] = []
    for name in _expanded(paths):
        if Path(name).is_dir():
            inside = (Path(root) / leaf for root, _, leaves in os.walk(name) for leaf in leaves)
            files += sorted(map(str, inside))
        else:
            files.append(name)
    return [_stamp(name) for name in files]


def _stamp(name: str) -> Stamp:
    if name.startswith(REMOTE_PREFIX):
        from vinedresser.data.corpora.inputs import stamp

        try:
            return (name, *stamp(name))
        except DataError:
            return name, -1, 0
    try:
        found = Path(name).stat()
    except OSError:
        return name, -1, 0
    return name, found.st_size, found.st_mtime_ns


def _unsettled(settle: timedelta, success_file: str, stamps: Sequence[Stamp], now: datetime) -> str:
    """Return the reason to wait for files that are being written; "" if there is none."""
    present = [stamp for stamp in stamps if stamp[1] >= 0]
    for name, _, changed in present if settle else ():
        age = now - datetime.fromtimestamp(changed / 1e9, UTC)
        if age < settle:
            return f"waits: {name} changed {max(age.total_seconds(), 0):.0f} s ago"
    for folder in sorted(
        {name.rpartition("/")[0] for name, _, _ in present} if success_file else ()
    ):
        mark = _stamp(f"{folder}/{success_file}" if folder else success_file)
        newest = max(s[2] for s in present if s[0].rpartition("/")[0] == folder)
        if mark[1] < 0 or mark[2] < newest:
            return f"waits: no {success_file} that is newer than the files in {folder or '.'}"
    return ""


def _rows(name: str) -> int:
    """Return the rows of a file: lines, or rows of Parquet."""
    from vinedresser.data.corpora.inputs import open_raw, open_seekable, read_range

    if read_range(name, 0, 4) == b"PAR1":
        import pyarrow.parquet as pq

        with open_seekable(name) as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)
    with open_raw(name) as raw:
        return sum(piece.count(b"\n") for piece in raw.pieces())
