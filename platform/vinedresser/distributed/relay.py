"""Relay from the workers of a group to the process that waits for them, by files in the folder.

Ray forwards what workers print or report late or not at all, and keeps their logs in files of its
own session, which end with it; the run's folder stays.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from vinedresser.errors import MachineError
from vinedresser.training.listener import Best, Listener, Progress
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.storage import POSIX, parsed_object

# Parent of the loggers of all modules.
_root = logging.getLogger("vinedresser")

# Seconds between two reads, and between two writes at least: 20 microseconds each on a disk.
_EVERY = 0.5


class GroupListener(Listener):
    """Listener inside a worker: reports go to Ray Train, rank 0's progress to the run's folder."""

    def __init__(self, folder: RunFolder, report: Callable[[Mapping[str, Any]], None]) -> None:
        """Args: the run's folder, and what hands a report to Ray Train: a barrier of all ranks."""
        self._folder, self._report = folder, report
        self._written, self._phase = 0.0, ""
        # Step, loss and speed of the last log line, repeated until there is another.
        self._logged: tuple[int, float | None, float | None] = (0, None, None)

    def progress(self, progress: Progress) -> None:
        """Write the progress twice per second; a full disk does not end a run for that."""
        if progress.loss is not None:
            self._logged = (progress.step, progress.loss, progress.tokens_per_second)
        now = time.monotonic()
        if now - self._written < _EVERY and progress.phase == self._phase:
            return
        self._written, self._phase = now, progress.phase
        partial = self._folder.progress.with_suffix(".partial")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps({**asdict(progress), "logged": self._logged}))
            partial.replace(self._folder.progress)

    def evaluated(self, report: Mapping[str, Any]) -> None:
        """Report to Ray Train, and append the report to the worker log."""
        if report:
            _root.info("%s", json.dumps(dict(report)), extra={"report": dict(report)})
        self._report(report)

    finished = evaluated


class _Line(logging.Formatter):
    """A line of JSON: rank, level and text; an evaluation has its report in place of the text."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {"rank": self._rank, "level": record.levelno}
        if hasattr(record, "report"):
            entry["report"] = record.report
        else:
            entry["text"] = record.getMessage()
        return json.dumps(entry, ensure_ascii=False)


@contextlib.contextmanager
def logging_to(folder: RunFolder, rank: int) -> Iterator[None]:
    """Append what this worker logs inside the block to the run's worker log."""
    folder.path.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder.worker_log)
    handler.setFormatter(_Line(rank))
    _root.addHandler(handler)
    _root.setLevel(logging.INFO)
    try:
        yield
    finally:
        _root.removeHandler(handler)
        handler.close()


class LogTail:
    """Lines that are appended to a run's worker log after the tail was opened."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.worker_log
        self._position = self._path.stat().st_size if self._path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Return the entries that were appended since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._position)
            # A line that is still being written is left for the next read.
            whole = stream.read().rpartition(b"\n")[0]
        self._position += len(whole) + 1 if whole else 0
        return [parsed_object(line) for line in whole.splitlines()]


@contextlib.contextmanager
def relaying(folder: RunFolder, listener: Listener, *, reports: bool) -> Iterator[None]:
    """Hand progress, evaluations and log lines of the workers on while the block runs.

    Args:
        folder: of the run.
        listener: receives them, in another thread.
        reports: false inside a Tune trial, where Ray Train itself forwards evaluations.
    """
    relay, ended = _Relay(folder, listener, reports=reports), threading.Event()

    def read() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(_EVERY)
            # A disk that fails for a moment delays the relay only.
            with contextlib.suppress(OSError, MachineError):
                relay.read_progress()
                relay.read_log()

    thread = threading.Thread(target=read, name="relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        folder.progress.unlink(missing_ok=True)


class _Relay:
    """Progress and log of one group; progress of an earlier group is removed, its log skipped."""

    def __init__(self, folder: RunFolder, listener: Listener, *, reports: bool) -> None:
        self._folder, self._listener, self._reports = folder, listener, reports
        folder.progress.unlink(missing_ok=True)
        self._seen: dict[str, Any] = {}
        self._logged_step = -1
        self._log = LogTail(folder)

    def read_progress(self) -> None:
        """Hand the progress of rank 0 on, if it is new."""
        seen = parsed_object(POSIX.read(self._folder.progress))
        if not seen or seen == self._seen:
            return
        self._seen, found = seen, dict(seen)
        step, loss, rate = found.pop("logged")
        # Each log line is handed on once, at the update where it is seen.
        is_new, self._logged_step = step != self._logged_step, step
        found |= {
            "best": Best(**found["best"]) if found["best"] else None,
            "loss": loss if is_new else None,
            "tokens_per_second": rate if is_new else None,
        }
        self._listener.progress(Progress(**found))

    def read_log(self) -> None:
        """Hand the lines that were appended on."""
        for entry in self._log.read():
            if "report" in entry and self._reports:
                report = entry["report"]
                is_last = report.get("is_last") == 1.0
                (self._listener.finished if is_last else self._listener.evaluated)(report)
            elif entry.keys() >= {"rank", "level", "text"}:
                _root.log(entry["level"], "rank %d: %s", entry["rank"], entry["text"])
