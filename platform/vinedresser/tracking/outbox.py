"""MlflowTracker: a run in MLflow behind an outbox, so that training never waits for a server.

Metrics, tags and files go into a bounded outbox. A background thread opens the run, then empties
the outbox every 5 s, or sooner when 200 metrics wait. After an error of the server it pauses for
30 s, while the outbox keeps collecting.
"""

import io
import json
import logging
import math
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vinedresser.errors import BusyError, MachineError
from vinedresser.tracking.store import Store, open_client, why
from vinedresser.tracking.tracker import State, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

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
# MLflow's own limits of one request.
BATCH_METRICS = 1000
BATCH_TAGS = 100
MAX_TAG = 8000
MAX_KEY = 250
# About 20 MB; at 20 metrics every 10 s, 14 hours without a server.
KEPT_METRICS = 100_000
KEPT_FILES = 100

# What the artifact viewer needs to show a table.
TABLES_TAG = "mlflow.loggedArtifacts"

_Point = tuple[str, float, int, int]


def safe_key(name: str) -> str:
    """Return a metric or parameter name that MLflow takes: other characters become `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_KEY]


class MlflowTracker(Tracker):
    """A run in MLflow. Made by `open_run`; one per run, in the process that owns it.

    An error of opening that a user can repair, as a deleted experiment, is raised by the next call
    except `close`. A store that does not answer leaves the run without tracking, with a warning.

    Attributes:
        skipped: metrics that were not finite.
        dropped: metrics lost because the outbox was full or the server refused them.
    """

    def __init__(
        self, store: Store, opening: Callable[[], str], *, patience: float = OPEN_SECONDS
    ) -> None:
        """Start the thread.

        Args:
            store: store of the run.
            opening: opens the run and returns its id; called once, in the thread.
            patience: seconds to wait for something to deliver before the run is opened anyway.
        """
        self.skipped = 0
        self.dropped = 0
        self._store, self._opening, self._patience = store, opening, patience
        self._run_id = ""
        self._error: Exception | None = None
        self._is_wanted = self._is_lost = False
        self._opened = threading.Event()
        self._points: deque[_Point] = deque()
        self._tags: dict[str, str] = {}
        self._files: deque[tuple[str, bytes]] = deque()
        self._tables: list[str] = []
        self._wake = threading.Condition()
        self._final: State | None = None
        self._not_before = 0.0
        self._is_warned = False
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; waits until it is open; empty without tracking.

        Raises:
            VinedresserError: the run could not be opened.
        """
        self._want()
        self._opened.wait()
        if self._error is not None:
            raise self._error
        return self._run_id

    @property
    def pending(self) -> int:
        """Number of metrics that wait for delivery."""
        return len(self._points)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note metrics at a step; returns at once. Non-finite values are skipped and counted."""
        now = time.time_ns() // 1_000_000
        values = [(safe_key(key), float(value), now, step) for key, value in metrics.items()]
        finite = [point for point in values if math.isfinite(point[1])]
        self._want()
        with self._wake:
            self.skipped += len(values) - len(finite)
            self._points.extend(finite)
            self._bound()
            if len(self._points) >= FLUSH_METRICS:
                self._wake.notify()

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags with the next delivery."""
        self._want()
        with self._wake:
            self._tags |= {safe_key(key): str(value)[:MAX_TAG] for key, value in tags.items()}

    def text(self, content: str, name: str) -> None:
        """Store a text artifact with the next delivery."""
        self._file(name, content.encode())

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Store columns of equal length as a table artifact, replacing one of the same name.

        Raises:
            ValueError: columns of unequal length.
        """
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        content = {"columns": list(columns), "data": rows}
        self._file(name, json.dumps(content, default=str, ensure_ascii=False).encode())
        if name not in self._tables:
            self._tables.append(name)
            shown = [{"path": table, "type": "table"} for table in self._tables]
            self.tag({TABLES_TAG: json.dumps(shown)})

    def figure(self, figure: "Figure", name: str) -> None:
        """Store a figure with the next delivery; it is drawn before this returns."""
        stream = io.BytesIO()
        figure.savefig(stream, format=PurePosixPath(name).suffix[1:] or "png", bbox_inches="tight")
        self._file(name, stream.getvalue())

    def close(self, state: State, reason: str = "") -> None:
        """Deliver what waits and end the run; gives up after 20 s, never raises.

        A run that could not be ended stays RUNNING in the store until `reap`.
        """
        with self._wake:
            if self._final is not None:
                return
            counts = {"skipped_metrics": self.skipped, "dropped_metrics": self.dropped}
            self._tags |= {f"vinedresser.{key}": str(n) for key, n in counts.items() if n}
            if reason:
                self._tags["vinedresser.reason"] = reason[:MAX_TAG]
            self._final, self._is_wanted = state, True
            self._wake.notify()
        self._opened.wait()
        self._thread.join(CLOSE_SECONDS)
        if self._points or self._thread.is_alive():
            _log.warning(
                "tracking store %s: %d metrics of run %s were not delivered",
                self._store.shown, self.pending, self._run_id,
            )  # fmt: skip

    def _want(self) -> None:
        """Let the thread open the run, and raise if it could not."""
        with self._wake:
            if self._error is not None:
                raise self._error
            if not self._is_wanted:
                self._is_wanted = True
                self._wake.notify()

    def _file(self, name: str, content: bytes) -> None:
        self._want()
        with self._wake:
            self._files.append((name, content))
            while len(self._files) > KEPT_FILES:
                self._files.popleft()

    def _bound(self) -> None:
        while len(self._points) > (0 if self._is_lost else KEPT_METRICS):
            self._points.popleft()
            self.dropped += 1

    def _run(self) -> None:
        """Open the run and empty the outbox until the run is closed; the thread."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_wanted, timeout=self._patience)
        try:
            self._run_id = self._opening()
            client = open_client(self._store)
        except Exception as error:  # noqa: BLE001 (raised where somebody can act on it)
            with self._wake:
                if isinstance(error, MachineError | BusyError):
                    _log.warning("%s; the run goes on without tracking", error.args[0])
                else:
                    self._error = error
                self._is_lost = True
                self._points.clear()
            return
        finally:
            self._opened.set()
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: (
                        self._final is not None
                        or (
                            len(self._points) >= FLUSH_METRICS
                            and time.monotonic() >= self._not_before
                        )
                    ),
                    timeout=FLUSH_SECONDS,
                )
                final = self._final
            if final is not None or time.monotonic() >= self._not_before:
                self._deliver(client, final)
            if final is not None:
                return

    def _deliver(self, client: "MlflowClient", final: State | None) -> None:
        """Send all that waits; what a failing server did not take stays in the outbox."""
        from mlflow.entities import Metric, RunTag

        try:
            while self._points:
                with self._wake:
                    count = min(len(self._points), BATCH_METRICS)
                    points = [self._points.popleft() for _ in range(count)]
                metrics = [Metric(k, v, t, s) for k, v, t, s in points]
                send = partial(client.log_batch, self._run_id, metrics=metrics)
                # The same timestamps again: MLflow keeps a point delivered twice only once.
                put_back = partial(self._points.extendleft, reversed(points))
                if not self._send(f"{count} metrics", send, put_back):
                    self.dropped += count
            while self._tags:
                with self._wake:
                    taken = dict(list(self._tags.items())[:BATCH_TAGS])
                    self._tags = {k: v for k, v in self._tags.items() if k not in taken}
                tags = [RunTag(key, value) for key, value in taken.items()]
                send = partial(client.log_batch, self._run_id, tags=tags)
                # A newer value of the same key stays.
                self._send(f"tags {', '.join(taken)}", send, partial(self._put_back_tags, taken))
            while self._files:
                with self._wake:
                    file = self._files.popleft()
                upload = partial(self._upload, client, *file)
                self._send(f"artifact {file[0]}", upload, partial(self._files.appendleft, file))
            if final is not None:
                client.set_terminated(self._run_id, final)
        except Exception as error:  # noqa: BLE001 (training goes on whatever a server answers)
            self._not_before = time.monotonic() + BACK_OFF_SECONDS
            self._warn(f"{why(error, self._store)}; metrics wait in memory, training goes on")

    def _send(self, subject: str, call: Callable[[], object], put_back: Callable[[], None]) -> bool:
        """Call; return False if the server refused, and put the content back if it failed."""
        try:
            call()
        except Exception as error:
            status = getattr(error, "get_http_status_code", lambda: 500)()
            if not 400 <= status < 500 or status in (408, 429):
                with self._wake:
                    put_back()
                    self._bound()
                raise
            self._warn(f"refused {subject}: {why(error, self._store)}")
            return False
        return True

    def _put_back_tags(self, taken: Mapping[str, str]) -> None:
        self._tags = {**taken, **self._tags}

    def _upload(self, client: "MlflowClient", name: str, content: bytes) -> None:
        path = PurePosixPath(name)
        folder = None if path.parent == PurePosixPath() else str(path.parent)
        with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
            file = Path(temporary) / path.name
            file.write_bytes(content)
            client.log_artifact(self._run_id, str(file), folder)

    def _warn(self, message: str) -> None:
        if not self._is_warned:
            self._is_warned = True
            _log.warning("tracking store %s: %s", self._store.shown, message)
