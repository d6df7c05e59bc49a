"""Store: a tracking database or server with an experiment, and safe ways to reach it."""

import contextlib
import glob
import hashlib
import logging
import os
import sqlite3
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vinedresser.errors import ConfigError, MachineError, VinedresserError
from vinedresser.tracking.relocation import relocate
from vinedresser.workspace.layout import Workspace
from vinedresser.workspace.lease import Lease, leased

if TYPE_CHECKING:
    from mlflow import MlflowClient

_T = TypeVar("_T")
# Of the wait for another process that holds a named lease: an export, and the creation of a
# database, which takes 3 s.
LOCK_SECONDS = 60.0
CREATION_SECONDS = 15.0
# MLflow's error codes.
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
EXISTS = ("RESOURCE_ALREADY_EXISTS",)

# Seconds that one request to a server may take; with the single retry 10 s at the very worst,
# where MLflow's defaults (120 s, 7 retries) blocked 249.6 s on a closed port.
TIMEOUT = 5
_SQLITE = "sqlite:///"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")

# No telemetry, no pickled models, no request that hangs.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT),
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
    # Standard output is for results.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Store:
    """Tracking store and experiment of runs.

    Attributes:
        uri: tracking URI, of a database or a server.
        experiment: name of the experiment that new runs go to.
        artifacts: `file://` URI of a new experiment's files; None for a location chosen by the
            server.
        leases: folder of the leases of processes that share a workspace.
    """

    uri: str
    experiment: str
    artifacts: str | None
    leases: Path

    @property
    def is_server(self) -> bool:
        """Return whether the store is reached by HTTP."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def label(self) -> str:
        """The store's address in files that outlive a move of the workspace; no credentials."""
        return "the workspace" if self.artifacts is not None else self.shown

    @property
    def shown(self) -> str:
        """URI without user, password and query, for messages."""
        parts = urllib.parse.urlsplit(self.uri)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path}"


def store_for(workspace: Path, experiment: str) -> Store:
    """Return the store of `MLFLOW_TRACKING_URI`, or else a database inside the workspace.

    Creates nothing; see `initialise`.

    Raises:
        ConfigError: a kind of store that MLflow no longer writes, or a path that SQLite's URIs
            cannot express.
    """
    root = workspace.absolute()
    folder = Workspace(root)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        scheme = uri.partition(":")[0].partition("+")[0]
        if scheme not in SCHEMES:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI is of kind {scheme}, MLflow writes to {', '.join(SCHEMES)}; "
                "unset it to use the workspace's own database"
            )
        return Store(uri, experiment, None, folder.leases)
    if set(str(root)) & set("?#%"):
        raise ConfigError(
            f"{root}: a workspace's path must hold none of ? # %; name another folder"
        )
    artifacts = folder.artifacts.as_uri()
    return Store(f"{_SQLITE}{folder.database}", experiment, artifacts, folder.leases)


def _set_defaults() -> None:
    """Set what mlflow reads from the environment at import, unless the user has."""
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)


def open_client(store: Store) -> "MlflowClient":
    """Return a client of the store; MLflow's process-wide state stays as it is.

    A new SQLite database is created under a lease: of 4 processes that create one at once, 3 fail.
    mlflow is imported before it is taken, because processes that wait for each other's import of
    some seconds would time out.

    Raises:
        BusyError: another process has been creating the database for 15 s.
    """
    if store.artifacts is not None:
        relocate(Path(store.uri.removeprefix(_SQLITE)), store.artifacts)
    _set_defaults()
    from mlflow import MlflowClient

    if _is_new(store):
        with locked(store, f"creation of {store.shown}", wait=CREATION_SECONDS):
            if _is_new(store):
                _create_database(store)

    return MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)


def sqlite_file(store: Store) -> Path | None:
    """Return the database file of a store that is one; None for a server."""
    path = store.uri.removeprefix(_SQLITE)
    return Path(path) if path != store.uri and "?" not in path else None


@contextlib.contextmanager
def opened_database(database: Path) -> Iterator[sqlite3.Connection]:
    """Open an SQLite database for reading alone; its user needs no right to write.

    Raises:
        MachineError: it cannot be read.
    """
    try:
        uri = f"file:{urllib.parse.quote(str(database))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=TIMEOUT)) as opened:
            yield opened
    except sqlite3.Error as error:
        raise MachineError(f"{database}: {error}; it must be a database of MLflow") from error


def locked(store: Store, name: str, *, wait: float | None = None) -> AbstractContextManager[Lease]:
    """Hold a named lease of the workspace.

    Args:
        store: whose workspace.
        name: of the lease.
        wait: seconds to wait for another holder; 60 by default.

    Raises:
        BusyError: another process held it for that long.
    """
    path = store.leases / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    return leased(path, name, wait=LOCK_SECONDS if wait is None else wait)


def why(error: BaseException, store: Store) -> str:
    """Return an error as one short line, without the credentials that a URI may hold."""
    text = str(error.args[0] if isinstance(error, VinedresserError) else error)
    first = (text.strip() or type(error).__name__).splitlines()[0]
    return first.replace(store.uri, store.shown)[:200]


@contextlib.contextmanager
def server_errors(store: Store) -> Iterator[None]:
    """Turn errors of a tracking store into one line with a fix; errors of ours pass.

    Raises:
        MachineError: the store did not answer, or refused.
    """
    _set_defaults()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        raise MachineError(
            f"tracking store {store.shown}: {why(error, store)}; "
            "start or repair it and run the same command again"
        ) from error


def none_if(codes: tuple[str, ...], call: Callable[[], _T]) -> _T | None:
    """Return a call's result; None if the store answers with one of its error codes."""
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except (MlflowException, FileNotFoundError) as error:  # of a server, of a store of files
        if getattr(error, "error_code", ABSENT[0]) not in codes:
            raise
    return None


def is_reachable(store: Store) -> bool:
    """Return whether a server answers within 5 s, with any status; True for a database.

    Needs no mlflow, so that an absent server does not cost 3 s of import.
    """
    if not store.is_server:
        return True
    import requests

    try:
        requests.get(f"{store.uri.rstrip('/')}/health", timeout=TIMEOUT)
    except requests.RequestException:
        return False
    return True


def initialise(store: Store) -> str:
    """Create the database and the experiment unless they exist; return the experiment's id.

    Raises:
        MachineError: the store does not answer or cannot be written.
        ConfigError: the experiment was deleted.
        BusyError: another process has been creating the database for 15 s.
    """
    with server_errors(store):
        client = open_client(store)
        found = _experiment(store, client)
        if found is None:
            # The kind makes MLflow's pages open on runs and charts, not on traces of prompts.
            create = partial(
                client.create_experiment,
                store.experiment,
                artifact_location=store.artifacts,
                tags={"mlflow.experimentKind": "custom_model_development"},
            )
            found = none_if(EXISTS, create) or _experiment(store, client)
        return str(found)


def _experiment(store: Store, client: "MlflowClient") -> str | None:
    """Return the id of the store's experiment, if it exists."""
    found = client.get_experiment_by_name(store.experiment)
    if found is None:
        return None
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"experiment {store.experiment} was deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}` or name another"
        )
    return str(found.experiment_id)


def _is_new(store: Store) -> bool:
    """Return whether the store is an SQLite file that is still to be made."""
    database = sqlite_file(store)
    return database is not None and not database.exists()


def _create_database(store: Store) -> None:
    """Make a new SQLite database under another name, and rename it into place whole.

    A process that is killed between two of MLflow's migrations leaves a database that no later
    one can open: `table trace_info already exists`.
    """
    path = Path(store.uri.removeprefix(_SQLITE))
    for left in path.parent.glob(f".{glob.escape(path.name)}.new-*"):
        left.unlink(missing_ok=True)
    # A new name each time: MLflow caches opened stores by URI.
    unnamed = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    # Alembic logs every migration; a user cannot act on that.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = f"{_SQLITE}{unnamed}"
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
    unnamed.chmod(path.parent.stat().st_mode & 0o666)  # SQLite gives no right to a group
    unnamed.replace(path)
