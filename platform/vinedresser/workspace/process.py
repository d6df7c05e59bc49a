"""Identity of a process: names the running one, and tests later whether it still lives."""

import os
import socket
from pathlib import Path

import psutil

_NAMESPACE = Path("/proc/self/ns/pid")


def this_host() -> str:
    """Return the name of the host and of the namespace of process ids.

    Containers may share a host name; they differ in the namespace.
    """
    namespace = _NAMESPACE.readlink().name.strip("pid:[]") if _NAMESPACE.is_symlink() else ""
    return f"{socket.gethostname()}.{namespace}"


def this_process() -> str:
    """Return host~pid~start of the running process.

    The start time distinguishes a process from a later one with the same id.
    """
    return f"{this_host()}~{os.getpid()}~{int(psutil.Process().create_time())}"


def is_alive(process: str) -> bool:
    """Return whether the process named by `this_process` lives; True for one of another host."""
    host, _, rest = process.partition("~")
    pid, _, started = rest.partition("~")
    if not (pid.isdecimal() and started.isdecimal()):
        return False
    if host != this_host():
        return True
    try:
        found = psutil.Process(int(pid))
        # In a container without an init a killed process stays a zombie.
        is_zombie = found.status() == psutil.STATUS_ZOMBIE
        return not is_zombie and abs(found.create_time() - int(started)) < 2
    except (psutil.Error, OverflowError):
        return False


def process_label(process: str) -> str:
    """Return a process for a message: process 12 on host x."""
    host, _, rest = process.partition("~")
    return f"process {rest.partition('~')[0]} on {host.rpartition('.')[0]}"
