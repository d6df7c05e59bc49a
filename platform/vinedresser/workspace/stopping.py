"""Graceful stop: stop requests as files in run folders, and every signal handler of the package.

A stop request is a file in the folder of a run: the run may be in another process, on another
node, or in another thread. The run removes the file once it has stopped. On a cluster the request
goes through Ray too (distributed/notices.py), which sets the flags of the run's own process here.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FrameType
from typing import Protocol

from vinedresser.errors import InterruptedRunError
from vinedresser.workspace.layout import RunFolder

_log = logging.getLogger(__name__)

# Sent by schedulers, and by Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds between two looks at the file: a look costs some microseconds, on NFS more.
_POLL_SECONDS = 0.2

# Seconds that runs have for a checkpoint after SIGTERM; schedulers of clusters kill after 30.
_GRACE_SECONDS = 20.0
# Of these, what the process itself needs to end.
_END_SECONDS = 2.0
# Ray Jobs kill three seconds after SIGTERM by default.
_JOB_SECONDS = 3.0

# Flags of the run that this process hosts in another thread: a stop is requested, and the node is
# about to be lost.
_stop_here = threading.Event()
_loss_announced = threading.Event()


def request_stop(folder: RunFolder) -> None:
    """Request that the run in a folder stops after its current update."""
    folder.stop.touch()


def stop_requested(folder: RunFolder) -> bool:
    """Return whether a stop of the run in a folder is requested."""
    return folder.stop.exists()


def confirm_stop(folder: RunFolder) -> None:
    """Remove a stop request: the run in the folder has stopped."""
    folder.stop.unlink(missing_ok=True)


class StopRequest:
    """Stop request of one run, polled a few times per second at most."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._next, self._is_requested = folder, 0.0, False

    def __call__(self) -> bool:
        """Return True from the first time on that a request or an announced loss was found."""
        now = time.monotonic()
        if not self._is_requested and now >= self._next:
            self._next = now + _POLL_SECONDS
            self._is_requested = _stop_here.is_set() or stop_requested(self._folder)
        return self._is_requested or _loss_announced.is_set()

    @property
    def is_requested(self) -> bool:
        """Return whether a stop was requested: false for an announced loss alone."""
        return self._is_requested


def stop_here() -> None:
    """Stop the run that this process hosts in another thread."""
    _stop_here.set()


def announce_loss() -> None:
    """Stop the run that this process hosts, because its node is about to be lost."""
    _loss_announced.set()


def notices_withdrawn() -> None:
    """Reset both flags: the next run in this process starts without them."""
    _stop_here.clear()
    _loss_announced.clear()


def stop_on_sigterm() -> None:
    """Make SIGTERM stop the run that this process hosts in another thread.

    Writes no request: a worker that Ray ends gets a SIGTERM too, and its run continues elsewhere.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: _stop_here.set())


def grace_seconds() -> float:
    """Return the seconds that runs have for a checkpoint after SIGTERM.

    VINEDRESSER_GRACE_SECONDS is the time until a pod is killed; RAY_JOB_STOP_WAIT_TIME_S that of a
    Ray job, which has 3 s without it.
    """
    environment = os.environ
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment
    default = _JOB_SECONDS if is_job else _GRACE_SECONDS + _END_SECONDS
    names = ("VINEDRESSER_GRACE_SECONDS", "RAY_JOB_STOP_WAIT_TIME_S")
    given = [environment[name] for name in names if name in environment]
    try:
        seconds = float(given[0]) if given else default
    except ValueError:
        seconds = default
    return max(seconds - _END_SECONDS, 1.0)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a handler of SIGTERM and SIGINT that is removed at its first call and at the end.

    Outside of the main thread signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, previous in before.items():
            signal.signal(number, previous)

    def once(number: int, frame: FrameType | None) -> None:
        restore()
        handler(number, frame)

    for number in _SIGNALS:
        signal.signal(number, once)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def graceful_stop(folder: RunFolder) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C inside the block into a stop request; a second signal ends at once.

    Raises:
        KeyboardInterrupt: the run has stopped because of Ctrl-C.
    """
    received: list[int] = []

    def request(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        request_stop(folder)
        if number == signal.SIGINT:
            # Not through a stream, which the interrupted code may be writing to.
            os.write(2, b"\nstopping after this update; Ctrl-C again ends at once\n")

    confirm_stop(folder)
    try:
        with _handling(request):
            yield
    except InterruptedRunError as error:
        if received != [signal.SIGINT]:
            raise
        _log.info("%s", error.args[0])
        raise KeyboardInterrupt from error
    finally:
        confirm_stop(folder)


class StopChannel(Protocol):
    """Another way than by files to request a stop of all runs, and to learn which have stopped."""

    def request(self) -> None:
        """Request the stop."""

    def confirmed(self) -> Collection[str]:
        """Return the names of the folders of the runs that have stopped."""


@contextlib.contextmanager
def stopping_runs_first(
    folders: Callable[[], Iterable[RunFolder]], channel: StopChannel
) -> Iterator[None]:
    """Give runs elsewhere time for a checkpoint before SIGTERM and Ctrl-C take their usual effect.

    Args:
        folders: return the folders of the runs that train at the moment of the signal, at once.
        channel: to the hosts of the runs, faster than files on NFS.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def stop_runs(number: int, frame: FrameType | None) -> None:
        until = time.monotonic() + grace_seconds()
        stopped, ended = set[str](), threading.Event()

        def ask() -> None:
            # Without an answer the files remain.
            with contextlib.suppress(Exception):
                channel.request()
                while not ended.wait(_POLL_SECONDS):
                    stopped.update(channel.confirmed())

        # In a thread: the interrupted code may be inside of the channel itself.
        threading.Thread(target=ask, daemon=True).start()
        running = {folder.name: folder for folder in folders() if folder.path.is_dir()}
        for folder in running.values():
            request_stop(folder)
        while time.monotonic() < until and any(
            name not in stopped and stop_requested(folder) for name, folder in running.items()
        ):
            time.sleep(_POLL_SECONDS / 2)
        ended.set()
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    with _handling(stop_runs):
        yield


class InterruptOnSigterm:
    """SIGTERM as a KeyboardInterrupt, the one exception that Ray lets through its waits.

    Attributes:
        is_received: whether a SIGTERM has arrived.
    """

    def __init__(self) -> None:
        self.is_received = False
        signal.signal(signal.SIGTERM, self._interrupt)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.is_received = True
        raise KeyboardInterrupt(signal.SIGTERM)
