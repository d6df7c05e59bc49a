"""Lease: an exclusive right, kept in a file by conditional writes.

One mechanism serves as lock between commands and as fence between (re)starts of a run. A lease
holds a token that is new with each holder, the holder's process, and the time of its last
heartbeat. It is free once it was released, once its process has died on this host, or once a
holder on another host has missed its heartbeats. Who works without asking for exclusive access, as
a restarted worker whose predecessor is believed dead, takes the lease over; the predecessor finds
another token before its next write and stops (faults T08, S10).
"""

import contextlib
import json
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from vinedresser.errors import BusyError, InterruptedRunError, MachineError
from vinedresser.workspace.process import is_alive, shown, this_host, this_process
from vinedresser.workspace.storage import POSIX, Storage, parsed

_log = logging.getLogger("vinedresser")

HEARTBEAT_SECONDS = 30.0
# Four heartbeats: a host whose clock or disk lags by a minute keeps its leases.
EXPIRY_SECONDS = 120.0
_POLL_SECONDS = 0.1


class Lease:
    """An exclusive right that is named by a file.

    Attributes:
        path: the file.
        token: fencing token; empty until the lease is taken.
    """

    def __init__(self, path: Path, *, storage: Storage = POSIX) -> None:
        self.path, self.token, self._storage = path, "", storage

    def take(self, *, force: bool = False) -> bool:
        """Take the lease if it is free; return whether it was.

        Args:
            force: take it over from whoever holds it.

        Raises:
            MachineError: the file cannot be written.
        """
        found = self._storage.read(self.path)
        while force or self._is_free(_fields(found)):
            token = uuid.uuid4().hex
            if self._storage.replace(self.path, _content(token), expected=found):
                self.token = token
                return True
            found = self._storage.read(self.path)
        return False

    def is_current(self) -> bool:
        """Return whether this lease was taken and neither released nor taken over since."""
        token = _fields(self._storage.read(self.path)).get("token")
        return bool(self.token) and token == self.token

    def require_current(self) -> None:
        """Check the token; to be called before each write that must not come from a dead holder.

        Raises:
            BusyError: another holder has taken over.
        """
        if not self.is_current():
            raise BusyError(
                f"{self.path.parent}: a later start has taken over; this one writes no more"
            )

    def beat(self) -> bool:
        """Note that the holder lives; return False if the lease was lost."""
        return self._rewrite(_content(self.token))

    def release(self) -> None:
        """Free the lease, unless it was taken over."""
        self._rewrite(None)
        self.token = ""

    def holder(self) -> str:
        """Return who holds the lease, for a message."""
        process = _fields(self._storage.read(self.path)).get("process", "")
        return shown(process) if process else "another process"

    def _rewrite(self, content: bytes | None) -> bool:
        found = self._storage.read(self.path)
        is_own = bool(self.token) and _fields(found).get("token") == self.token
        return is_own and self._storage.replace(self.path, content, expected=found)

    @staticmethod
    def _is_free(content: dict[str, str]) -> bool:
        process = content.get("process", "")
        if not is_alive(process):
            return True
        is_here = process.startswith(f"{this_host()}~")
        beat = content.get("heartbeat", "")
        age = time.time() - int(beat) if beat.isdecimal() else math.inf
        return not is_here and age > EXPIRY_SECONDS


def _content(token: str) -> bytes:
    fields = {"token": token, "process": this_process(), "heartbeat": str(int(time.time()))}
    return (json.dumps(fields) + "\n").encode()


def _fields(content: bytes | None) -> dict[str, str]:
    """Return the fields of a lease; none of a file that is absent or damaged."""
    found = parsed(content)
    fields = found.items() if isinstance(found, dict) else ()
    return {str(key): str(value) for key, value in fields}


@contextlib.contextmanager
def leased(path: Path, subject: str, *, wait: float | None = 0.0) -> Iterator[Lease]:
    """Hold a lease, with heartbeats from a thread, until the block ends.

    Args:
        path: file of the lease.
        subject: what is held, for the message.
        wait: seconds to wait for another holder to end; None waits for as long as it takes.

    Raises:
        BusyError: another process holds it.
        MachineError: the file cannot be written.
    """
    lease = Lease(path)
    until = None if wait is None else time.monotonic() + wait
    while not lease.take():
        if until is not None and time.monotonic() >= until:
            waited = f" for {wait:.0f} s" if wait else ""
            raise BusyError(f"{subject}: in work by {lease.holder()}{waited}; wait for it to end")
        time.sleep(_POLL_SECONDS)
    ended = threading.Event()

    def keep() -> None:
        is_held = True
        while is_held and not ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(MachineError, OSError):  # the next one may be written
                is_held = lease.beat()

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(MachineError, OSError):  # the error of the block matters more
            lease.release()


# What a scheduler sends, and what a user's Ctrl-C does.
STOPPING = (signal.SIGTERM, signal.SIGINT)
_STOP = "stop"
# How often a run looks whether it shall stop: a look costs some microseconds, on NFS more.
_LOOK_SECONDS = 0.2


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
