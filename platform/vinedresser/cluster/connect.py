"""Connection to Ray: to the cluster in RAY_ADDRESS, or to a private one on this machine."""

import contextlib
import getpass
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from vinedresser.cluster.admission import refuse_client, require_same_versions, require_token
from vinedresser.errors import MachineError

_log = logging.getLogger(__name__)

# Objects in the store are configurations and blocks of 20,000 rows; shards travel as files.
_OBJECT_STORE_BYTES = 300_000_000

# Timeout for a connection to RAY_ADDRESS.
_CONNECT_SECONDS = 10
# Between two looks at the head node, and without an answer until the command ends: Ray ends it
# after 60, a head node that is restarted in between is not missed.
_HEAD_LOOK_SECONDS, _HEAD_SECONDS = 5.0, 45.0

# Read by Ray when it starts and by its child processes. Set unless the user has set them.
# RAY_AUTH_MODE is not among them: a private cluster asks for a token by default, and setting the
# variable after `import ray` gives driver and cluster different modes.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else every worker resolves the environment again
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process that was given no GPU sees none
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no TensorBoard, CSV and JSON copies
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial without its metric fails alone
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # the searcher limits them, by the size of the cluster
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else Ctrl-C marks the sweep as finished
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def is_named() -> bool:
    """Return True if the user named a cluster, to which all work goes."""
    return bool(os.environ.get("RAY_ADDRESS"))


def is_connected() -> bool:
    """Return True if this process is connected to a Ray cluster."""
    import ray

    return bool(ray.is_initialized())


def probe() -> str:
    """Run a task on the connected cluster, for at most a minute; return Ray's version."""
    import ray

    answer = ray.remote(lambda: os.getpid())
    ray.get(answer.remote(), timeout=60)
    return str(ray.__version__)


@contextlib.contextmanager
def connect(
    *,
    cpus: int | None = None,
    dashboard: bool = False,
    search: bool = False,
    admit_any: bool = False,
) -> Iterator[None]:
    """Connect to Ray for the duration of the block; an existing connection is reused.

    `RAY_ADDRESS` names a cluster; without it a private one starts on this machine, never one found
    in /tmp.

    Args:
        cpus: CPUs of the private cluster; all by default.
        dashboard: start it on loopback. Trials of several workers need it to release the placement
            group of a stopped trial (ray#58515).
        search: Ray Tune will run, which needs a process on the cluster.
        admit_any: also a cluster without token or with nodes of different versions, to examine it.

    Raises:
        MachineError: the cluster cannot be reached or started, or does not fit.
        ConfigError: RAY_ADDRESS names Ray Client for a search.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if search:
        refuse_client(address)
    with _own_sigterm():
        if address != "local":
            require_listener(address, "RAY_ADDRESS")
            if not admit_any:
                require_token(address)
        folder = _start(address, cpus, dashboard)
    try:
        if address != "local" and not admit_any:
            require_same_versions()
        with contextlib.nullcontext() if address == "local" else watching_head(address):
            yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def watching_head(address: str) -> Iterator[None]:
    """End the process with the code of the environment, 3, once the head node does not answer.

    Ray itself ends it after a minute without an answer: with code 1 and no message.
    """
    ended = threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not ended.wait(_HEAD_LOOK_SECONDS):
            try:
                require_listener(address, "RAY_ADDRESS")
                answered = time.monotonic()
            except MachineError as error:
                if time.monotonic() - answered > _HEAD_SECONDS:
                    sys.stderr.write(f"{error}; then run the same command to resume\n")
                    sys.stderr.flush()
                    os._exit(error.exit_code)

    threading.Thread(target=watch, name="head", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Restore our handler of SIGTERM; that of `ray.init` prints a stack and exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(previous):
            signal.signal(signal.SIGTERM, previous)


def _start(address: str, cpus: int | None, dashboard: bool) -> Path | None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        try:
            ray.init(address=address, runtime_env={"env_vars": _for_workers()}, **quiet)
        except Exception as error:  # Ray raises many kinds here
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MachineError(
                f"RAY_ADDRESS={address}: {reason}; start the cluster or unset RAY_ADDRESS"
            ) from error
        return None
    # Sockets live in the session folder, whose path may have at most 107 bytes.
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=f"vd-{os.getpid()}-", dir="/tmp"))
    # umask 077: Ray would create its token 0644 and its session folder 0777.
    previous = os.umask(0o077)
    try:
        _start_local(folder, cpus, dashboard, quiet)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MachineError(f"Ray did not start: {reason}; see `vinedresser doctor`") from error
    finally:
        os.umask(previous)
    return folder


def _for_workers() -> dict[str, str]:
    """Return the variables that workers on other nodes get from this process.

    Those that `ray job submit` has set are theirs already, and Ray refuses to set them twice.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    given = job.get("runtime_env", {}).get("env_vars", {})
    names = {"VINEDRESSER_PACKAGES", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"} - given.keys()
    return {name: os.environ[name] for name in names if name in os.environ}


def require_listener(address: str, name: str) -> None:
    """Refuse a host:port, in a URL or not, without a listener: Ray waits long or ends the process.

    Raises:
        MachineError: no process listens there; the message begins with the name of the setting.
    """
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise MachineError(
            f"{name}={address}: {reason}; start the cluster or change {name}"
        ) from None


def _remove_abandoned() -> None:
    """Delete session folders of killed processes, tens of megabytes each."""
    for left in Path("/tmp").glob("vd-*-*"):  # noqa: S108 (ours, by name and owner)
        pid = left.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and left.owner() == getpass.getuser():
            shutil.rmtree(left, ignore_errors=True)


def _start_local(folder: Path, cpus: int | None, dashboard: bool, quiet: dict[str, Any]) -> None:
    import ray

    for try_number in (1, 2):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=dashboard,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                **quiet,
            )
        except RuntimeError:
            # The raylet gives its agent 15 s, which a busy machine can miss once (ray#65983).
            ray.shutdown()
            if try_number == 2:
                raise
        else:
            return
