"""MlflowTracker: a run in MLflow behind a spool, so that training never waits for a server.

Metrics, tags and files are written to the spool in the run's folder. A background thread delivers
it every 5 s, or sooner when 200 metrics wait. After an error it pauses for 30 s; what is not
delivered when the run ends stays in the folder, for the next start of the run or for `sync`.
"""

import contextlib
import io
import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vinedresser.errors import MachineError
from vinedresser.tracking.delivery import deliver
from vinedresser.tracking.runs import (
    KEY,
    MAX_TAG,
    OWNER,
    START,
    flat,
    provenance,
    safe_key,
)
from vinedresser.tracking.spool import Spool, starts_of
from vinedresser.tracking.store import Store, why
from vinedresser.tracking.tracker import NullTracker, State, Tracker
from vinedresser.workspace.layout import SpoolFolder
from vinedresser.workspace.process import this_process
from vinedresser.workspace.storage import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

# Importing mlflow takes 1 s of processor and opening a run in a new database 3 s, all of it Python
# that holds the interpreter. So the run is opened when there is something to deliver, after the
# first updates, but after 5 s at the latest: it should be seen to be RUNNING.
OPEN_SECONDS = 5.0
FLUSH_METRICS = 200
FLUSH_SECONDS = 5.0
BACK_OFF_SECONDS = 30.0
# Time of the last delivery in close(): one request with its retry takes 10 s at most.
CLOSE_SECONDS = 20.0
MAX_NAME = 200

# What the artifact viewer needs to show a table.
TABLES_TAG = "mlflow.loggedArtifacts"


def open_run(
    store: Store,
    folder: SpoolFolder,
    *,
    key: str,
    parent: str | None = None,
    params: Mapping[str, Any] = {},
    tags: Mapping[str, str] = {},
) -> Tracker:
    """Return a tracker of the key's run: the existing one is opened again, or else a new one.

    Returns at once: the run is opened in the tracker's thread, and the spool keeps what the store
    does not take. Where the spool cannot be written either, the run is not tracked, with a warning.

    Args:
        store: store of the run; created if necessary.
        folder: of its spool.
        key: digest of the run's content; letters, digits and `_.:-` only.
        parent: key of the run that this one is a part of.
        params: may be nested; kept under dotted keys, 6,000 characters per value.
        tags: for values that are not numbers, such as `vinedresser.kind`; `mlflow.runName` is
            shown in the user interface and need not be unique.

    Raises:
        ValueError: a key with other characters.
    """
    if not re.fullmatch(r"[\w.:-]{1,250}", key):
        raise ValueError(f"run key {key!r}: expected letters, digits and _.:-, 250 at most")
    name = tags.get("mlflow.runName", key)[:MAX_NAME]
    own = {KEY: key, OWNER: this_process(), START: uuid.uuid4().hex, "mlflow.runName": name}
    opening = {
        "store": store.label,
        "experiment": store.experiment,
        "parent": parent,
        "params": dict(flat(params)),
        "tags": {**tags, **own},
    }
    try:
        return MlflowTracker(store, Spool(folder, opening))
    except MachineError as error:
        _log.warning("%s; the run goes on without tracking", error.args[0])
        return NullTracker()


class MlflowTracker(Tracker):
    """A run in MLflow. Made by `open_run`; one per run, in the process that owns it.

    Attributes:
        skipped: metrics that were not finite.
        attempted: set once the run was opened, or could not be.
    """

    def __init__(self, store: Store, spool: Spool, *, patience: float = OPEN_SECONDS) -> None:
        """Start the thread.

        Args:
            store: store of the run.
            spool: file of this start.
            patience: seconds to wait for something to deliver before the run is opened anyway.
        """
        self.skipped = 0
        self._store, self._spool, self._patience = store, spool, patience
        self._run_id = ""
        self._waiting = 0  # entries since the last delivery
        self._is_closed = self._is_wanted = False
        self.attempted = threading.Event()
        self._tables: list[str] = []
        self._wake = threading.Condition()
        self._not_before = 0.0
        self._reason = ""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; waits for the first delivery; empty while the store is away."""
        with self._wake:
            self._is_wanted = True
            self._wake.notify()
        self.attempted.wait()
        return self._run_id

    def wait_for_opening(self) -> None:
        """Wait for the first delivery, so that children find their parent in the store."""
        _ = self.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note metrics at a step; returns at once. Non-finite values are skipped and counted."""
        values = {safe_key(key): float(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        with self._wake:
            self.skipped += len(values) - len(finite)
        if finite:
            self._add({"metrics": finite, "step": step}, len(finite))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags with the next delivery."""
        self._add({"tags": {safe_key(key): str(value)[:MAX_TAG] for key, value in tags.items()}})

    def text(self, content: str, name: str) -> None:
        """Store a text artifact with the next delivery."""
        self._add_file(name, content.encode())

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Store columns of equal length as a table artifact, replacing one of the same name.

        Raises:
            ValueError: columns of unequal length.
        """
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        content = {"columns": list(columns), "data": rows}
        self._add_file(name, json.dumps(content, default=str, ensure_ascii=False).encode())
        if name not in self._tables:
            self._tables.append(name)
            shown = [{"path": table, "type": "table"} for table in self._tables]
            self.tag({TABLES_TAG: json.dumps(shown)})

    def figure(self, figure: "Figure", name: str) -> None:
        """Store a figure with the next delivery; it is drawn before this returns."""
        stream = io.BytesIO()
        figure.savefig(stream, format=PurePosixPath(name).suffix[1:] or "png", bbox_inches="tight")
        self._add_file(name, stream.getvalue())

    def close(self, state: State, reason: str = "") -> None:
        """Deliver what waits and end the run; gives up after 20 s, never raises.

        What is left then stays in the spool, with a warning.
        """
        if self._is_closed:
            return
        for key, count in (("skipped", self.skipped), ("lost", self._spool.lost)):
            if count:
                self.tag({f"vinedresser.{key}_metrics": str(count)})
        self._add({"close": {"state": state, "reason": reason}})
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._spool.path.exists():
            _log.warning(
                "%s; what is not delivered is kept in %s: `vinedresser sync` delivers it",
                self._reason or f"tracking store {self._store.shown}: slow",
                self._spool.folder.path,
            )  # fmt: skip

    def _add(self, entry: Mapping[str, Any], count: int = 1) -> None:
        """Append an entry, unless the run is closed, and wake the thread where many wait."""
        if self._is_closed:
            return
        self._spool.add(entry)
        self._noted(count)

    def _add_file(self, name: str, content: bytes) -> None:
        if not self._is_closed:
            self._spool.add_file(name, content)
            self._noted(1)

    def _noted(self, count: int) -> None:
        with self._wake:
            self._waiting += count
            if not self._is_wanted or self._waiting >= FLUSH_METRICS:
                self._is_wanted = True
                self._wake.notify()

    def _run(self) -> None:
        """Deliver the spool until the run is closed; the thread."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_wanted, timeout=self._patience)
        self._spool.add({"tags": provenance()})
        is_last = False
        while not is_last:
            is_last, waiting = self._is_closed, self._waiting
            has_any = waiting or not self.attempted.is_set()
            if is_last or (has_any and time.monotonic() >= self._not_before):
                if self._deliver():
                    with self._wake:
                        self._waiting -= waiting
                self.attempted.set()
            if not is_last:
                with self._wake:
                    self._wake.wait_for(self._is_due, timeout=FLUSH_SECONDS)

    def _is_due(self) -> bool:
        is_full = self._waiting >= FLUSH_METRICS and time.monotonic() >= self._not_before
        return self._is_closed or is_full

    def _deliver(self) -> bool:
        """Deliver what the spool holds; after an error, note it for the driver, and pause."""
        problem = self._spool.folder.problem
        try:
            self._run_id = deliver(self._spool.folder, self._store) or self._run_id
        except Exception as error:  # noqa: BLE001 (training goes on whatever a server answers)
            self._not_before = time.monotonic() + BACK_OFF_SECONDS
            if not self._reason:
                _log.warning(
                    "%s; the run goes on and keeps its metrics until they can be delivered",
                    why(error, self._store),
                )
            self._reason = why(error, self._store)
            with contextlib.suppress(MachineError, OSError):
                write_file(problem, self._reason + "\n")
            return False
        if self._reason:
            _log.info("tracking store %s: answers again, metrics are delivered", self._store.shown)
            self._reason = ""
            with contextlib.suppress(OSError):
                problem.unlink(missing_ok=True)
        return True


def undelivered(folder: SpoolFolder) -> str:
    """Return why a run's metrics are not in its store at present; "" where they are."""
    try:
        return folder.problem.read_text().strip() if starts_of(folder) else ""
    except OSError:
        return ""
