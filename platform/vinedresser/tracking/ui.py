"""MLflow's own user interface on this machine, in its lightest form."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys

from vinedresser.errors import ConfigError, MachineError
from vinedresser.tracking.store import DEFAULTS, Store, initialise

HOST = "127.0.0.1"
# 0.5 GB resident; with MLflow's defaults, 4 workers and 8 job processes, 2.7 GB.
LIGHT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
STOP_SECONDS = 10


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            what = "in use" if error.errno == errno.EADDRINUSE else "reserved for the system"
            raise MachineError(
                f"port {port} of {HOST} is {what}; name another, as {port + 1}"
            ) from None


def serve_ui(store: Store, port: int) -> int:
    """Run the user interface at http://127.0.0.1:<port> until it ends or is interrupted.

    Returns:
        The server's exit code; 0 after Ctrl-C, and after SIGTERM as the commands receive it.

    Raises:
        MachineError: the port is in use, or the store does not answer.
        ConfigError: the store is a server, which has its own user interface.
    """
    if store.is_server:
        raise ConfigError(f"the tracking server is {store.shown}; open that address in a browser")
    _check_port(port)
    initialise(store)
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    if store.artifacts:
        command += ["--artifacts-destination", store.artifacts]
    # In the environment, not in argv: a database's URI may hold a password that `ps` would show.
    environment = {**DEFAULTS, **os.environ, **LIGHT, "MLFLOW_BACKEND_STORE_URI": store.uri}
    # In a new session, so that the server and its worker are stopped together, once.
    server = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603 (argv list)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for each in (signal.SIGTERM, signal.SIGKILL):
            gone = (ProcessLookupError, PermissionError)
            with contextlib.suppress(*gone, subprocess.TimeoutExpired):
                os.killpg(server.pid, each)
                server.wait(STOP_SECONDS)
