"""Who works on a run's folder: one command at a time, one attempt at a time, politely stopped.

A run is resumed by whoever comes next, so its folder has to say who may write to it. The command
holds a lock; each (re)start of its workers is an attempt with a token, and whoever finds another
token than its own has been declared dead and must not write (faults T08, S10).
"""

import contextlib
import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from vinedresser.errors import (
    BusyError,
    DataError,
    InterruptedRunError,
    MachineError,
    TrainingError,
    VinedresserError,
)
from vinedresser.workspace.commit import make_folder, this_process, write_file

_log = logging.getLogger("vinedresser")

# What a scheduler sends, and what a user's Ctrl-C does.
STOPPING = (signal.SIGTERM, signal.SIGINT)
# The same failure at the same step so many times in a row is no accident (fault T22).
_POISON = 3
# Passes, or is mended, outside of the run: a mount that is away, a checkpoint to be brought back.
_OUTSIDE = (OSError, DataError, MachineError)
_STOP = "stop"
_ROLLBACKS = "rollbacks.json"
_FAILURES = "failures.json"
# How often a run looks whether it shall stop: a look costs some microseconds, on NFS more.
_LOOK_SECONDS = 0.2


@contextlib.contextmanager
def held(folder: Path, *, wait: bool) -> Iterator[None]:
    """Holds a run's folder; the lock of a dead process is free.

    Args:
        folder: of the run.
        wait: whether to wait for the holder to end, instead of refusing.

    Raises:
        BusyError: another command works on it.
    """
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    owner = folder / ".owner"
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        who = owner.read_text() if owner.is_file() else "another process"
        raise BusyError(f"{folder}: in work by {who}; wait for it to end") from None
    try:
        host, pid, _ = this_process().rsplit("~", 2)
        write_file(owner, f"process {pid} on {host}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def stopping_politely(folder: Path) -> Iterator[None]:
    """While inside, SIGTERM or Ctrl-C asks the run in the folder to stop after its step.

    A second one ends at once. Elsewhere than in the main thread, signals are left alone.

    Raises:
        KeyboardInterrupt: the run has stopped because of Ctrl-C.
    """
    stop = folder / _STOP
    stop.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    told: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def politely(number: int, frame: FrameType | None) -> None:
        del frame
        restore()
        told.append(number)
        ask(folder)
        if number == signal.SIGINT:
            # Not through a stream, which the interrupted code may be writing to.
            os.write(2, b"\nstopping after this update; Ctrl-C again ends at once\n")

    for number in STOPPING:
        signal.signal(number, politely)
    try:
        yield
    except InterruptedRunError as error:
        if told != [signal.SIGINT]:
            raise
        _log.info("%s", error.args[0])
        raise KeyboardInterrupt from error
    finally:
        restore()
        stop.unlink(missing_ok=True)


def ask_to_stop(folders: Iterable[Path], *, grace: float) -> None:
    """Asks the runs in the folders to stop, and waits until each has said that it did.

    Args:
        folders: of runs that are in work elsewhere; others make this wait in vain.
        grace: seconds after which nobody is waited for any more.
    """
    stops = [folder / _STOP for folder in folders if folder.is_dir()]
    for stop in stops:
        stop.touch()
    until = time.monotonic() + grace
    while any(stop.exists() for stop in stops) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS / 2)


def has_stopped(folder: Path) -> None:
    """Tells who asked the run in a folder to stop that it did."""
    (folder / _STOP).unlink(missing_ok=True)


# Set in a worker of a group that was told to stop by itself, as by a machine that is taken away.
_told_here = threading.Event()


def listen() -> None:
    """From now on SIGTERM asks the run that this process hosts in another thread to stop.

    Nothing is written at once: a worker that Ray ends gets a SIGTERM too, and its run goes on.
    """

    def ask_here(number: int, frame: FrameType | None) -> None:
        del number, frame
        _told_here.set()

    signal.signal(signal.SIGTERM, ask_here)


def ask(folder: Path) -> None:
    """Asks the run in a folder to stop after its step."""
    (folder / _STOP).touch()


def was_asked(folder: Path) -> bool:
    """Whether the run in a folder was asked to stop."""
    return (folder / _STOP).exists()


class StopRequest:
    """Whether the run in a folder was asked to stop; looks a few times a second at most."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._next, self._is_asked = folder, 0.0, False

    def __call__(self) -> bool:
        """True from the first time on that it was seen."""
        now = time.monotonic()
        if not self._is_asked and now >= self._next:
            self._next = now + _LOOK_SECONDS
            self._is_asked = _told_here.is_set() or was_asked(self._folder)
        return self._is_asked


class Attempt:
    """One attempt at a run. Beginning it ends the right of earlier ones to write.

    A failure that comes back is refused before it costs anything, and once: being told resets the
    count, because what was mended may be code, which no run is named by. A supervisor that starts
    the same command for ever trains in three of four, from the last checkpoint to the same step;
    the fourth ends at once. The exit code of the refusal, 4, is for it to end on.
    """

    def __init__(self, folder: Path) -> None:
        """Begins.

        Raises:
            TrainingError: the three attempts before failed in the same way at the same step; the
                next one may begin.
            MachineError: the folder cannot be written.
        """
        self._path, self._failures = folder / "attempt.json", folder / _FAILURES
        last = _read(self._failures)[-_POISON:]
        if len(last) == _POISON and all(entry == last[0] for entry in last):
            step, reason = last[0]
            forget_failures(folder)
            raise TrainingError(
                f"{folder.name} failed {_POISON} times after step {step} with: {reason}. Fix: mend "
                "that, or change the experiment; the next command tries again from the last "
                "checkpoint"
            )
        self._token = uuid.uuid4().hex
        content = {"token": self._token, "process": this_process(), "pid": os.getpid()}
        write_file(self._path, json.dumps(content) + "\n")

    def require_current(self) -> None:
        """Called before anything is written for good.

        Raises:
            BusyError: a later attempt has taken over.
        """
        try:
            token = json.loads(self._path.read_text())["token"]
        except (OSError, ValueError, KeyError):
            token = None
        if token != self._token:
            raise BusyError(
                f"{self._path.parent}: a later attempt has taken over; this one writes no more"
            )

    def failed(self, step: int, error: Exception) -> None:
        """Notes how this attempt ended; the same again and again is refused by the next.

        What data, disk or machine brought about is not noted: whoever mends it goes on at once.
        """
        if isinstance(error, _OUTSIDE):
            return
        said = error.args[0] if isinstance(error, VinedresserError) else str(error)
        reason = ": ".join([type(error).__name__, *said.strip().splitlines()[:1]])
        entries = [*_read(self._failures), [step, reason]]
        with contextlib.suppress(Exception):  # the error itself matters more
            write_file(self._failures, json.dumps(entries) + "\n")


def forget_failures(folder: Path) -> None:
    """Once they were told: the next attempt may begin."""
    with contextlib.suppress(OSError):  # then it is told again
        (folder / _FAILURES).unlink()


def rollbacks(folder: Path) -> int:
    """How often the run in a folder went back to its last checkpoint because it diverged (T02)."""
    return len(_read(folder / _ROLLBACKS))


def roll_back(folder: Path, *, done: int, reason: str) -> None:
    """Notes one more than `done`; ranks that note the same one do so once."""
    entries = _read(folder / _ROLLBACKS)[:done]
    write_file(folder / _ROLLBACKS, json.dumps([*entries, [done + 1, reason]]) + "\n")


def _read(path: Path) -> list[list[object]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []
