"""Store: which tracking database or server, which experiment; and how to reach it safely."""

import contextlib
import glob
import hashlib
import logging
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vinedresser.errors import ConfigError, MachineError
from vinedresser.tracking.moved import follow
from vinedresser.workspace.layout import Workspace
from vinedresser.workspace.lease import Lease, leased

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("vinedresser")

# Seconds that one question to a server may take; with the single retry 10 s at the very worst,
# where MLflow's defaults (120 s, 7 retries) blocked 249.6 s on a closed port.
TIMEOUT = 5
_SQLITE = "sqlite:///"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")

# Nothing is reported home, no pickled model is ever opened, no request hangs.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT),
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
}


@dataclass(frozen=True)
class Store:
    """Where runs are kept.

    Attributes:
        uri: tracking URI, of a database or a server.
        experiment: name of the experiment that new runs go to.
        artifacts: `file://` URI under which a new experiment keeps files; None lets the server
            choose.
        locks: folder of the lock files by which processes that share a workspace take turns.
    """

    uri: str
    experiment: str
    artifacts: str | None
    locks: Path

    @property
    def is_server(self) -> bool:
        """Whether the store is reached by HTTP."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def shown(self) -> str:
        """The URI without its user, password and query, for messages."""
        parts = urllib.parse.urlsplit(self.uri)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path}"


def store_for(workspace: Path, experiment: str) -> Store:
    """The user's `MLFLOW_TRACKING_URI`, or else an SQLite database inside the workspace.

    Touches nothing; `initialise` does.

    Raises:
        ConfigError: a kind of store that MLflow no longer writes, or a path that SQLite's URIs
            cannot name.
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
        raise ConfigError(f"{root}: a workspace's path holds none of ? # %; name another folder")
    artifacts = folder.artifacts.as_uri()
    return Store(f"{_SQLITE}{folder.database}", experiment, artifacts, folder.leases)


def _environment() -> None:
    """Sets what mlflow reads from the environment, unless the user has."""
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)


def connect(store: Store) -> "MlflowClient":
    """A client of the store, without touching MLflow's process-wide state."""
    if store.artifacts is not None:
        follow(Path(store.uri.removeprefix(_SQLITE)), store.artifacts)
    _environment()
    from mlflow import MlflowClient

    # Alembic announces every migration of a new database; a user cannot act on that.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)


def locked(store: Store, name: str, *, seconds: float) -> AbstractContextManager[Lease]:
    """Hold a named lease of the workspace.

    Raises:
        BusyError: another process held it for all of `seconds`.
    """
    path = store.locks / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    return leased(path, name, wait=seconds)


def why(error: BaseException, store: Store) -> str:
    """A failure in one short line, without the credentials that a URI may hold."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first.replace(store.uri, store.shown)[:200]


@contextlib.contextmanager
def server_errors(store: Store) -> Iterator[None]:
    """Turns a tracking store's trouble into one line with a fix; our own errors pass.

    Raises:
        MachineError: the store did not answer, or refused.
    """
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


def is_reachable(store: Store) -> bool:
    """Whether a server answers anything at all within 5 s; a database is taken to be there.

    Asked before mlflow is imported, so that an absent server costs no 3 s of import.
    """
    if not store.is_server:
        return True
    parts = urllib.parse.urlsplit(store.uri)
    host = parts.netloc.rpartition("@")[2]
    url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT):  # noqa: S310 (http or https, see is_server)
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # requests may trust certificates that urllib does not know.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False


def initialise(store: Store) -> str:
    """Creates the database and the experiment unless they are there; the experiment's id.

    Takes a lock: of 4 processes that create one SQLite database at once, 3 fail.

    Raises:
        MachineError: the store does not answer or cannot be written.
        ConfigError: the experiment was deleted.
        BusyError: another process has been creating it for 60 s.
    """
    try:
        return _initialise(store)
    except OSError as error:
        raise MachineError(f"{store.locks}: {error.strerror}; name another workspace") from error


def _initialise(store: Store) -> str:
    with locked(store, f"creation of {store.shown}", seconds=60):
        _environment()
        with server_errors(store):
            _create_database(store)
            client = connect(store)
            found = client.get_experiment_by_name(store.experiment)
            if found is None:
                return _create(client, store)
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"experiment {store.experiment} was deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}` or name another"
        )
    return str(found.experiment_id)


def _create_database(store: Store) -> None:
    """Makes a new SQLite database beside its place, and moves it there whole.

    A process that is killed between two of MLflow's migrations leaves a database that no later
    one can open: `table trace_info already exists`.
    """
    path = Path(store.uri.removeprefix(_SQLITE))
    if not store.uri.startswith(_SQLITE) or "?" in store.uri or path.exists():
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.new-*"):
        left.unlink(missing_ok=True)
    # Another name each time: MLflow keeps what it has opened, by URI.
    partial = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    uri = f"{_SQLITE}{partial}"
    connect(replace(store, uri=uri)).search_experiments(max_results=1)
    partial.replace(path)


def _create(client: "MlflowClient", store: Store) -> str:
    from mlflow.exceptions import MlflowException

    try:
        # The kind makes MLflow's pages open on runs and charts instead of on traces of prompts.
        made = client.create_experiment(
            store.experiment,
            artifact_location=store.artifacts,
            tags={"mlflow.experimentKind": "custom_model_development"},
        )
        return str(made)
    except MlflowException as error:
        # On a shared server the lock does not reach the others: somebody else was first.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        found = client.get_experiment_by_name(store.experiment)
        if found is None:
            raise
        return str(found.experiment_id)
