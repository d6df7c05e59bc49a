"""MlflowTracker: a run in MLflow, fed by one background thread so that training never waits.

What is logged goes into a bounded outbox; the thread empties it every 5 s, or sooner when 200
metrics wait. A server that fails is left alone for 30 s while the outbox keeps collecting.
"""

import io
import json
import math
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vinedresser.tracking.store import Store, connect, logger, why
from vinedresser.tracking.tracker import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

FLUSH_METRICS = 200
FLUSH_SECONDS = 5.0
BACK_OFF_SECONDS = 30.0
# What close() waits for the last delivery: one request with its retry takes 10 s at most.
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
    """A metric or parameter name that MLflow takes: other characters become `_`, 250 at most."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_KEY]


def is_refused(error: BaseException) -> bool:
    """Whether the server understood and said no, so that asking again is of no use."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (408, 429)


class MlflowTracker:
    """A run in MLflow. Made by `open_run`; one per run, in the process that owns it.

    Attributes:
        run_id: MLflow's id of the run.
        skipped: metrics that were not finite.
        dropped: metrics lost because the outbox was full or the server refused them.
    """

    def __init__(self, store: Store, run_id: str, client: "MlflowClient | None" = None) -> None:
        self.run_id = run_id
        self.skipped = 0
        self.dropped = 0
        self._store = store
        self._client = client or connect(store)
        self._points: deque[_Point] = deque()
        self._tags: dict[str, str] = {}
        self._files: deque[tuple[str, bytes]] = deque()
        self._tables: list[str] = []
        self._wake = threading.Condition()
        self._final: State | None = None
        self._not_before = 0.0
        self._is_warned = False
        self._thread = threading.Thread(target=self._deliver, name=f"track-{run_id}", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Metrics that wait for delivery."""
        return len(self._points)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Notes metrics at a step; returns at once. Non-finite values are skipped and counted."""
        now = time.time_ns() // 1_000_000
        values = [(safe_key(key), float(value), now, step) for key, value in metrics.items()]
        finite = [point for point in values if math.isfinite(point[1])]
        with self._wake:
            self.skipped += len(values) - len(finite)
            self._points.extend(finite)
            self._bound()
            if len(self._points) >= FLUSH_METRICS:
                self._wake.notify()

    def tag(self, tags: Mapping[str, str]) -> None:
        """Sets tags with the next delivery."""
        with self._wake:
            self._tags |= {safe_key(key): str(value)[:MAX_TAG] for key, value in tags.items()}

    def text(self, content: str, name: str) -> None:
        """Stores a text artifact with the next delivery."""
        self._file(name, content.encode())

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Stores columns of equal length as a table artifact, replacing one of the same name.

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
        """Stores a figure with the next delivery; it is drawn before this returns."""
        stream = io.BytesIO()
        figure.savefig(stream, format=PurePosixPath(name).suffix[1:] or "png", bbox_inches="tight")
        self._file(name, stream.getvalue())

    def close(self, state: State, reason: str = "") -> None:
        """Delivers what waits and ends the run; gives up after 20 s, never raises.

        A run that could not be ended stays RUNNING in the store until `reap`.
        """
        with self._wake:
            if self._final is not None:
                return
            counts = {"skipped_metrics": self.skipped, "dropped_metrics": self.dropped}
            self._tags |= {f"vinedresser.{key}": str(n) for key, n in counts.items() if n}
            if reason:
                self._tags["vinedresser.reason"] = reason[:MAX_TAG]
            self._final = state
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._points or self._thread.is_alive():
            logger.warning(
                "tracking store %s: %d metrics of run %s were not delivered",
                self._store.shown, self.pending, self.run_id,
            )  # fmt: skip

    def _file(self, name: str, content: bytes) -> None:
        with self._wake:
            self._files.append((name, content))
            while len(self._files) > KEPT_FILES:
                self._files.popleft()

    def _bound(self) -> None:
        while len(self._points) > KEPT_METRICS:
            self._points.popleft()
            self.dropped += 1

    def _is_due(self) -> bool:
        is_full = len(self._points) >= FLUSH_METRICS and time.monotonic() >= self._not_before
        return self._final is not None or is_full

    def _deliver(self) -> None:
        """The thread: empties the outbox until the run is closed."""
        while True:
            with self._wake:
                self._wake.wait_for(self._is_due, timeout=FLUSH_SECONDS)
                final = self._final
            if final is not None or time.monotonic() >= self._not_before:
                self._send_all(final)
            if final is not None:
                return

    def _send_all(self, final: State | None) -> None:
        try:
            while self._points:
                self._send_metrics()
            while self._tags:
                self._send_tags()
            while self._files:
                self._send_file()
            if final is not None:
                self._client.set_terminated(self.run_id, final)
        except Exception as error:  # noqa: BLE001 (training goes on whatever a server answers)
            self._not_before = time.monotonic() + BACK_OFF_SECONDS
            self._warn(f"{why(error, self._store)}; metrics wait in memory, training goes on")

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric

        with self._wake:
            count = min(len(self._points), BATCH_METRICS)
            taken = [self._points.popleft() for _ in range(count)]
        try:
            self._client.log_batch(
                self.run_id, metrics=[Metric(k, v, t, s) for k, v, t, s in taken]
            )
        except Exception as error:
            with self._wake:
                if is_refused(error):
                    self.dropped += len(taken)
                else:
                    # The same timestamps again: MLflow keeps a point delivered twice only once.
                    self._points.extendleft(reversed(taken))
                    self._bound()
            if not is_refused(error):
                raise
            self._warn(f"refused {len(taken)} metrics: {why(error, self._store)}")

    def _send_tags(self) -> None:
        from mlflow.entities import RunTag

        with self._wake:
            taken = dict(list(self._tags.items())[:BATCH_TAGS])
            self._tags = {key: v for key, v in self._tags.items() if key not in taken}
        try:
            self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in taken.items()])
        except Exception as error:
            if not is_refused(error):
                with self._wake:
                    self._tags = taken | self._tags
                raise
            self._warn(f"refused tags {', '.join(taken)}: {why(error, self._store)}")

    def _send_file(self) -> None:
        with self._wake:
            name, content = self._files.popleft()
        place = PurePosixPath(name)
        folder = None if place.parent == PurePosixPath() else str(place.parent)
        try:
            with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
                path = Path(temporary) / place.name
                path.write_bytes(content)
                self._client.log_artifact(self.run_id, str(path), folder)
        except Exception as error:
            if not is_refused(error):
                with self._wake:
                    self._files.appendleft((name, content))
                raise
            self._warn(f"refused artifact {name}: {why(error, self._store)}")

    def _warn(self, message: str) -> None:
        if not self._is_warned:
            self._is_warned = True
            logger.warning("tracking store %s: %s", self._store.shown, message)
