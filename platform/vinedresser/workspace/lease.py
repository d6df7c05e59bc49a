"""Lease: an exclusive right, kept in a file by conditional writes.

One mechanism serves as lock between commands and as fence between starts of a run. The fields
of the file are a token that is new with each holder, the holder's process, and the time of its last
heartbeat. The lease is free once it was released, once its process has died on this host, or once
a holder on another host has missed its heartbeats. A restarted worker takes the lease over from
its predecessor; the predecessor finds another token before its next write and stops.
"""

import contextlib
import json
import math
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from vinedresser.errors import BusyError, MachineError
from vinedresser.workspace.process import is_alive, process_label, this_host, this_process
from vinedresser.workspace.storage import POSIX, Storage, parsed_object

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
        """Take the lease if it is free; return False if it is not.

        Args:
            force: take it over from another holder.

        Raises:
            MachineError: the file cannot be written.
        """
        found = self._storage.read(self.path)
        while force or _is_free(_fields(found)):
            token = uuid.uuid4().hex
            if self._storage.replace(self.path, _content(token), expected=found):
                self.token = token
                return True
            found = self._storage.read(self.path)
        return False

    def is_free(self) -> bool:
        """Return whether the lease has no holder; writes nothing."""
        return _is_free(_fields(self._storage.read(self.path)))

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
        """Return the process that has the lease, for a message."""
        process = _fields(self._storage.read(self.path)).get("process", "")
        return process_label(process) if process else "another process"

    def _rewrite(self, content: bytes | None) -> bool:
        found = self._storage.read(self.path)
        is_own = bool(self.token) and _fields(found).get("token") == self.token
        return is_own and self._storage.replace(self.path, content, expected=found)


def is_abandoned(process: str, beat: float) -> bool:
    """Return whether a process has ended, or lives on another host and missed its heartbeats.

    Args:
        process: its identity; see process.py.
        beat: time of its last heartbeat, in seconds since the epoch.
    """
    is_here = process.startswith(f"{this_host()}~")
    return not is_alive(process) or (not is_here and time.time() - beat > EXPIRY_SECONDS)


def _is_free(fields: dict[str, str]) -> bool:
    beat = fields.get("heartbeat", "")
    return is_abandoned(fields.get("process", ""), float(beat) if beat.isdecimal() else -math.inf)


def _content(token: str) -> bytes:
    fields = {"token": token, "process": this_process(), "heartbeat": str(int(time.time()))}
    return (json.dumps(fields) + "\n").encode()


def _fields(content: bytes | None) -> dict[str, str]:
    """Return the fields of a lease; empty for a file that is absent or damaged."""
    return {key: str(value) for key, value in parsed_object(content).items()}


@contextlib.contextmanager
def leased(path: Path, subject: str, *, wait: float | None = 0.0) -> Iterator[Lease]:
    """Hold a lease, with heartbeats from a thread, until the block ends.

    Args:
        path: file of the lease.
        subject: name of the right, for the message.
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
            raise BusyError(f"{subject}: in use by {lease.holder()}{waited}; wait for it to end")
        time.sleep(_POLL_SECONDS)
    ended = threading.Event()

    def keep() -> None:
        is_held = True
        while is_held:
            is_over = ended.wait(HEARTBEAT_SECONDS)
            # The next heartbeat may be written; at the end an error of the block matters more.
            with contextlib.suppress(MachineError, OSError):
                is_held = False if is_over else lease.beat()
                if is_over:
                    lease.release()

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
