"""Run of a command in a new process session, which ends as a whole."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from vinedresser.schedule import guard as guarding
from vinedresser.workspace.process import is_alive, this_host
from vinedresser.workspace.storage import make_folder

_POLL_SECONDS = 0.2
_ROUNDS = 200
# Time for a checkpoint of a run whose tick was killed.
_ORPHAN_SECONDS = 5.0
# Options of prctl(2).
_PDEATHSIG, _SUBREAPER = 1, 36
# Variables that a run may see; beginnings of names end with an underscore.
ALLOWED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM", "VIRTUAL_ENV",
    "LD_LIBRARY_PATH", "DO_NOT_TRACK", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "LC_", "PYTHON",
    "OMP_", "MKL_", "CUDA_", "NVIDIA_", "NCCL_", "RAY_", "MLFLOW_", "AWS_", "VINEDRESSER_",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command with its limits.

    Attributes:
        words: program and arguments.
        environment: all variables of the process.
        output: file for its standard output.
        log: file to which its standard error is appended.
        deadline: seconds until it is stopped.
        grace: seconds between SIGTERM and SIGKILL.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    output: Path
    log: Path
    deadline: float
    grace: float


@dataclass(frozen=True)
class Ended:
    """End of a command.

    Attributes:
        code: exit code; negative for the signal that ended it.
        stopped: reason for which it was stopped; empty if it ended by itself.
        seconds: wall time.
        cpu_seconds: processor time of all its processes that have ended.
        peak_mb: largest resident memory of one of its processes.
    """

    code: int
    stopped: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


def allowed_environment(more: Sequence[str]) -> dict[str, str]:
    """Return the variables of this process that a run may see: those of the allow-list and `more`.

    The URLs of webhooks and other secrets of the scheduler are not among them.
    """
    names = {*ALLOWED, *more}
    starts = tuple(name for name in ALLOWED if name.endswith("_") or name == "PYTHON")
    return {
        name: value
        for name, value in os.environ.items()
        if name in names or name.upper() in names or name.startswith(starts)
    }


def dies_with_parent(number: int) -> Callable[[], None]:
    """Return a function for `preexec_fn`: the kernel sends the signal when the parent has died.

    The parent is the thread that starts the child, which must live for as long.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def prepare() -> None:
        prctl(_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return prepare


def adopt_orphans() -> None:
    """Make this process the parent of its orphaned descendants, so that their cost is known."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0)


def run(command: Command, *, began: Callable[[str], None], stop: Callable[[], str]) -> Ended:
    """Run a command to its end; no process of its session is left, whatever happens.

    Args:
        command: what to run.
        began: gets the child's name, as host~pid~start, once it runs.
        stop: polled; returns the reason to stop the command, or "".
    """
    make_folder(command.log.parent)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with command.output.open("wb") as output, command.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - own program, words are never parsed by a shell
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            env=dict(command.environment),
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGTERM),
        )
    # The run has SIGTERM when this process is killed; then the guard ends its whole session.
    guard = subprocess.Popen(  # noqa: S603 - own script
        [sys.executable, "-S", "-E", guarding.__file__, str(process.pid), str(_ORPHAN_SECONDS)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    session = f"{this_host()}~{process.pid}~{int(psutil.Process(process.pid).create_time())}"
    reason = ""
    try:
        began(session)
        while process.poll() is None and not reason:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
            late = time.monotonic() - started > command.deadline
            reason = f"stopped at its deadline of {command.deadline:g} s" if late else stop()
    finally:
        end_session(session, grace=command.grace if process.poll() is None else 0.0)
        code = process.wait()
        guard.kill()
        guard.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ended(code, reason, time.monotonic() - started, cpu, after.ru_maxrss / 1024)


def end_session(session: str, *, grace: float) -> int:
    """End all processes of a session: SIGTERM to its leader, after the grace SIGKILL to all.

    Args:
        session: the leader, as host~pid~start; sessions of other hosts are left as they are.
        grace: seconds that the leader may take.

    Returns:
        The number of processes that were killed.
    """
    host, _, rest = session.partition("~")
    pid, _, started = rest.partition("~")
    if host != this_host() or not (pid.isdecimal() and started.isdecimal()):
        return 0
    leader, killed = int(pid), 0
    if grace and is_alive(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGTERM)
        until = time.monotonic() + grace
        while is_alive(session) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS / 2)
    # A killed process may have started another meanwhile; one in the kernel takes a moment.
    for _ in range(_ROUNDS):
        members = list(_members(leader, int(started)))
        if not members:
            break
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        killed += len(members)
        time.sleep(_POLL_SECONDS / 4)  # not psutil's wait, which would take the exit code
    return killed


def _members(session: int, started: int) -> Iterator[psutil.Process]:
    """Yield the living processes of a session that began at a time; reap adopted dead ones."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) != session or process.create_time() < started - 2:
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process
            elif process.pid != session and process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
