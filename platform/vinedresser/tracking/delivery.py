"""Delivery of spools to a tracking store: everything, in order, once.

A delivery may end anywhere and begin again there: the position is written after each request, and
a request that is repeated changes nothing, because MLflow keeps equal points, tags and files once
and a run is found by its key.
"""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vinedresser.errors import BusyError, ConfigError, MachineError
from vinedresser.tracking.runs import (
    KEY,
    OWNER,
    end_run,
    open_by_key,
    reap,
    run_of_key,
)
from vinedresser.tracking.spool import entries_of, opening_of, starts_of
from vinedresser.tracking.store import (
    Store,
    initialise,
    is_reachable,
    open_client,
    server_errors,
    store_for,
    why,
)
from vinedresser.workspace.layout import SpoolFolder, Workspace
from vinedresser.workspace.lease import leased
from vinedresser.workspace.process import is_alive
from vinedresser.workspace.storage import read_json, write_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_log = logging.getLogger(__name__)

# MLflow's own limits of one request.
BATCH_METRICS = 1000
BATCH_TAGS = 100
# Answers to content that no repetition improves: bad request, too large, unprocessable.
_REFUSED = (400, 413, 422)


def deliver(folder: SpoolFolder, store: Store) -> str:
    """Send what a spool holds; return the run's id in the store, "" for an empty spool.

    Files of dead or ended starts are deleted once they are delivered. What the store refuses for
    good, as a value that is too long, is left out with a warning.

    Raises:
        MachineError: the store does not answer; what it did not take stays.
        BusyError: another process delivers this spool, or creates the database.
        ConfigError: the experiment was deleted, or the spool belongs to another store.
    """
    # A server that is away costs no import of mlflow.
    if "mlflow" not in sys.modules and not is_reachable(store):
        raise MachineError(f"tracking store {store.shown}: does not answer; start it")
    with server_errors(store):
        client = open_client(store)
        with leased(folder.lease, f"delivery of {folder.path}"):
            sender = _Sender(client, store)
            for start in starts_of(folder):
                sender.send(start)
    return sender.run_id


class _Sender:
    """Sender of spool files; collects metrics and tags for the next request."""

    def __init__(self, client: "MlflowClient", store: Store) -> None:
        self._client, self._store = client, store
        self.run_id = ""
        self._start = Path()
        self._metrics: list[Metric] = []
        self._tags: dict[str, str] = {}

    def send(self, start: Path) -> None:
        """Deliver a file from its position to its end; delete it if no more can be appended."""
        opening = opening_of(start)
        if opening.get("store") != self._store.label:
            raise ConfigError(
                f"{start}: was written for {opening.get('store')}, not for {self._store.shown}; "
                "set MLFLOW_TRACKING_URI accordingly"
            )
        from mlflow.entities import Metric

        position = read_json(SpoolFolder.position(start)) or {"offset": 0, "run": ""}
        self._start, self.run_id = start, str(position["run"])
        done = end = int(position["offset"])
        is_over = not is_alive(str(opening["tags"].get(OWNER, "")))
        for entry, offset in entries_of(start, end):
            points = entry.get("metrics", {})
            if len(self._metrics) + len(points) > BATCH_METRICS or "metrics" not in entry:
                done = self._flush(end, done)
            if "open" in entry:
                self._open(entry["open"], entry["time"])
            for key, value in points.items():
                self._metrics.append(Metric(key, value, entry["time"], entry["step"]))
            self._tags |= entry.get("tags", {})
            if "file" in entry:
                self._upload(
                    entry["file"], SpoolFolder.artifacts(start) / Path(entry["content"]).name
                )
            if "close" in entry:
                end_run(self._client, self.run_id, entry["close"], entry["time"])
                is_over = True
            end = offset
        self._flush(end, done)
        if is_over:
            shutil.rmtree(SpoolFolder.artifacts(start), ignore_errors=True)
            start.unlink()
            SpoolFolder.position(start).unlink(missing_ok=True)

    def _open(self, opening: Mapping[str, Any], time: int) -> None:
        """Open the run of a key, as a child of its parent, and close runs of killed processes."""
        experiment, tags = initialise(self._store), dict(opening["tags"])
        parent = opening["parent"]
        if parent:
            found = run_of_key(self._client, experiment, parent)
            if found is None:
                raise MachineError(
                    f"run {tags[KEY]}: its parent {parent} is not delivered yet; "
                    "`vinedresser sync` delivers both"
                )
            tags["mlflow.parentRunId"] = str(found.info.run_id)
        self.run_id = open_by_key(self._client, experiment, opening["params"], tags, time)
        if not parent:
            for orphan in reap(self._store):
                _log.info("tracking: run %s of a killed process closed", orphan[:8])

    def _flush(self, end: int, done: int) -> int:
        """Send what was collected up to an offset, and write the position; return the offset."""
        from mlflow.entities import RunTag

        log_batch = partial(self._client.log_batch, self.run_id)
        for at in range(0, len(self._metrics), BATCH_METRICS):
            metrics = self._metrics[at : at + BATCH_METRICS]
            self._call("metrics", partial(log_batch, metrics=metrics))
        tags = [RunTag(key, value) for key, value in self._tags.items()]
        for at in range(0, len(tags), BATCH_TAGS):
            self._call("tags", partial(log_batch, tags=tags[at : at + BATCH_TAGS]))
        self._metrics, self._tags = [], {}
        if end > done:
            content = json.dumps({"offset": end, "run": self.run_id})
            write_file(SpoolFolder.position(self._start), content)
        return end

    def _upload(self, name: str, stored: Path) -> None:
        """Send an artifact under its own name."""
        path = PurePosixPath(name)
        folder = None if path.parent == PurePosixPath() else str(path.parent)
        with TemporaryDirectory(prefix="vinedresser-") as temporary:
            file = Path(temporary) / path.name
            if not stored.is_file():
                _log.warning("%s: missing; the artifact %s is lost", stored, name)
                return
            shutil.copyfile(stored, file)
            self._call(name, lambda: self._client.log_artifact(self.run_id, str(file), folder))

    def _call(self, subject: str, call: Callable[[], object]) -> None:
        """Call; content that the store refuses for good is left out with a warning."""
        try:
            call()
        except Exception as error:
            status = getattr(error, "get_http_status_code", lambda: 0)()
            if status not in _REFUSED:
                raise
            _log.warning(
                "tracking store %s: refused %s of run %s: %s",
                self._store.shown, subject, self.run_id, why(error, self._store),
            )  # fmt: skip


@dataclass(frozen=True)
class Synced:
    """Result of `sync`.

    Attributes:
        delivered: folders of the spools that are empty now.
        left: folder -> reason, for those that are not.
    """

    delivered: list[Path]
    left: dict[Path, str]


def spools_of(workspace: Workspace) -> list[SpoolFolder]:
    """Return the spools of a workspace with something to deliver, parents before children."""
    levels = (
        workspace.tracking.glob("*"),
        workspace.sweeps.glob("*/.tracking"),
        workspace.runs.glob("*/.tracking"),
    )
    found = [SpoolFolder(path) for level in levels for path in sorted(level)]
    return [folder for folder in found if starts_of(folder)]


def deliver_spools(folders: Iterable[SpoolFolder], workspace: Path) -> Synced:
    """Deliver spools to the stores of their runs; a store that does not answer is called once.

    Args:
        folders: parents before children.
        workspace: that they belong to.
    """
    done, left, absent = list[Path](), dict[Path, str](), dict[str, str]()
    for folder in folders:
        starts = starts_of(folder)
        if not starts:
            continue
        experiment = str(opening_of(starts[0]).get("experiment", ""))
        try:
            store = store_for(workspace, experiment)
            if store.uri in absent:
                raise MachineError(absent[store.uri])
            if not is_reachable(store):
                absent[store.uri] = f"tracking store {store.shown}: does not answer"
                raise MachineError(absent[store.uri])
            deliver(folder, store)
        except (BusyError, ConfigError, MachineError) as error:
            left[folder.path] = str(error.args[0])
            continue
        if starts_of(folder):  # its run is going on
            left[folder.path] = "its run is not over"
        else:
            folder.problem.unlink(missing_ok=True)
            done.append(folder.path)
    return Synced(done, left)
