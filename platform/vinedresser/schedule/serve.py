"""Scheduler: starts a tick process at each slot of its schedules; metrics and health over HTTP.

All decisions are those of `tick`, so a second scheduler, a cron line or a restart changes nothing.
A tick dies with the scheduler, and its run with the tick; the next tick continues the run.
"""

import logging
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vinedresser.schedule.child import dies_with_parent
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.notify import waiting_notices
from vinedresser.schedule.record import GOOD, Ledger, State
from vinedresser.schedule.when import is_overdue, next_slot
from vinedresser.workspace.layout import Workspace

_log = logging.getLogger(__name__)

# Seconds between two looks for retries, settled data and unsent notices, and at ended ticks.
LOOK_SECONDS = 5.0
_WAIT_SECONDS = 0.5
# After SIGTERM a tick may need its grace period and a moment more.
_SLACK_SECONDS = 10.0


@dataclass(frozen=True)
class Served:
    """A schedule with its name on the command line, and its ledger."""

    schedule: Schedule
    source: str
    ledger: Ledger


def served(schedules: Sequence[tuple[Schedule, str]], workspace: Path) -> list[Served]:
    """Return schedules with their ledgers in a workspace."""
    place = Workspace(workspace.absolute())
    return [Served(value, name, Ledger(place.schedule(value.name))) for value, name in schedules]


class SlotTrigger(BaseTrigger):  # type: ignore[misc] # APScheduler has no types
    """APScheduler's view of the slots of a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
        """Return the first slot after the previous one, or after now."""
        return next_slot(self._schedule, max(previous, now) if previous else now)


class Server:
    """Tick processes of several schedules."""

    def __init__(self, schedules: Sequence[Served], words: Callable[[Served], list[str]]) -> None:
        """Args: what to serve, and the command of a tick."""
        self._served, self._words = schedules, words
        self._due: queue.SimpleQueue[Served] = queue.SimpleQueue()
        self._ticks: dict[subprocess.Popen[bytes], Served] = {}
        self._stop = threading.Event()
        self.looked = time.monotonic()

    def stop(self, *_: object) -> None:
        """End `run` after the ticks; the handler of SIGTERM and SIGINT."""
        self._stop.set()

    def run(self) -> None:
        """Start ticks until `stop`; to be called in the main thread, which must live as long.

        A tick that a thread of a pool has started would die with that thread.
        """
        scheduler = BackgroundScheduler(timezone=UTC)
        for each in self._served:
            self._due.put(each)  # what was missed
            scheduler.add_job(
                self._due.put, SlotTrigger(each.schedule), args=[each],
                coalesce=True, misfire_grace_time=None,
            )  # fmt: skip
        scheduler.add_job(self._look, "interval", seconds=LOOK_SECONDS, coalesce=True)
        before = {n: signal.signal(n, self.stop) for n in (signal.SIGTERM, signal.SIGINT)}
        scheduler.start()
        try:
            while not self._stop.is_set():
                self.looked = time.monotonic()
                self._start_due()
                self._reap()
        finally:
            scheduler.shutdown(wait=False)
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_due(self) -> None:
        try:
            each = self._due.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            return
        words = self._words(each)
        process = subprocess.Popen(  # noqa: S603 - own program
            words,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGKILL),
        )
        self._ticks[process] = each

    def _reap(self) -> None:
        for process in [process for process in self._ticks if process.poll() is not None]:
            each = self._ticks.pop(process)
            if process.returncode:
                _log.warning("tick of %s ended with %d", each.schedule.name, process.returncode)

    def _look(self) -> None:
        """Start a tick where a retry, a wait for data or a notice is due; slots start their own."""
        running = {each.schedule.name for each in list(self._ticks.values())}
        for each in self._served:
            now = datetime.now(UTC)
            state = each.ledger.state()
            first = next(iter(state.pending), None) if state else None
            is_due = first is not None and not (first.not_before and first.not_before > now)
            if each.schedule.name not in running and (
                is_due or waiting_notices(each.ledger.folder, now)
            ):
                self._due.put(each)

    def _end(self) -> None:
        """Stop all ticks, and with them their runs."""
        for process in self._ticks:
            process.terminate()
        for process, each in self._ticks.items():
            try:
                process.wait(each.schedule.grace.total_seconds() + _SLACK_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


class Metrics(Collector):
    """State of schedules as Prometheus metrics, read at each scrape."""

    def __init__(self, schedules: Sequence[Served]) -> None:
        self._served = schedules

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of all schedules."""
        prefix, labels = "vinedresser_schedule", ["schedule"]
        gauges = {
            name: GaugeMetricFamily(f"{prefix}_{name}", text, labels=labels)
            for name, text in {
                "last_success_timestamp_seconds": "End of the last slot that ended well.",
                "last_duration_seconds": "Wall time of the last run that ended well.",
                "next_slot_timestamp_seconds": "Time of the next slot.",
                "overdue": "1 if a slot has had no good end for too long.",
                "paused": "1 if the schedule is paused.",
                "running": "1 if a slot runs.",
                "consecutive_failures": "Failed slots in a row.",
            }.items()
        }
        ends = CounterMetricFamily(
            f"{prefix}_slots", "Slots by their end.", labels=[*labels, "end"]
        )
        now = datetime.now(UTC)
        for each in self._served:
            name, state = each.schedule.name, each.ledger.state()
            for key, value in _figures(each, state, now).items():
                gauges[key].add_metric([name], value)
            for end in (*GOOD, "skipped", "failed"):
                ends.add_metric([name, end], state.ends.get(end, 0) if state else 0)
        yield from gauges.values()
        yield ends


def _figures(each: Served, state: State | None, now: datetime) -> Mapping[str, float]:
    figures = {"next_slot_timestamp_seconds": next_slot(each.schedule, now).timestamp()}
    if state is None:
        return {**figures, "overdue": 0, "paused": 0, "running": 0, "consecutive_failures": 0}
    if state.good_at is not None:
        figures["last_success_timestamp_seconds"] = state.good_at.timestamp()
        figures["last_duration_seconds"] = state.seconds
    return {
        **figures,
        "overdue": float(is_overdue(each.schedule, state.since, state.good, now)),
        "paused": float(state.paused is not None),
        "running": float(any(record.state == "running" for record in state.pending)),
        "consecutive_failures": state.failures,
    }


def metrics_server(
    server: Server, schedules: Sequence[Served], host: str, port: int
) -> ThreadingHTTPServer:
    """Return a running HTTP server with `/metrics` and `/health`; port 0 takes a free one."""
    registry = CollectorRegistry()
    registry.register(Metrics(schedules))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, generate_latest(registry), "text/plain; version=0.0.4")
            elif self.path == "/health":
                is_well = time.monotonic() - server.looked < 10 * _WAIT_SECONDS + LOOK_SECONDS
                self._answer(200 if is_well else 503, b"ok\n" if is_well else b"stuck\n")
            else:
                self._answer(404, b"expected /metrics or /health\n")

        def _answer(self, code: int, content: bytes, kind: str = "text/plain") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Log no request."""

    http = ThreadingHTTPServer((host, port), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, name="metrics", daemon=True).start()
    return http
