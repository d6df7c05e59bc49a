"""Runs of the tracking store: opened by their content key, closed after a killed process."""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vinedresser.errors import BusyError, MachineError
from vinedresser.tracking.store import (
    Store,
    initialise,
    is_reachable,
    open_client,
    server_errors,
)
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.lease import Lease
from vinedresser.workspace.process import is_alive, this_host

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

KEY, OWNER, RESUMED = "vinedresser.key", "vinedresser.owner", "vinedresser.resumed"
REASON_TAG, START = "vinedresser.reason", "vinedresser.start"
# File of the lease of a run's process; by default the command lease in its folder.
LEASE = "vinedresser.lease"
# MLflow's limits.
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
_BATCH = 100


def safe_key(name: str) -> str:
    """Return a metric or parameter name that MLflow takes: other characters become `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_KEY]


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Return dotted keys and texts of a nested mapping; texts are JSON, strings as they are."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield safe_key(f"{prefix}{key}"), text[:MAX_PARAM]


def provenance() -> dict[str, str]:
    """Return tags: host, user, version, and the commit of the working directory."""
    tags = {
        "vinedresser.host": socket.gethostname(),
        "vinedresser.version": version("vinedresser"),
        # A container's user may have no name, for which getpass raises.
        "mlflow.user": os.environ.get("LOGNAME") or os.environ.get("USER") or f"{os.getuid()}",
        "mlflow.source.name": "vinedresser",
        "mlflow.source.type": "LOCAL",
    }
    # No git, no repository, or a slow disk.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [shutil.which("git") or "git", "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)  # noqa: S603 (fixed words)
        tags["mlflow.source.git.commit"] = done.stdout.strip()
    return tags


def run_of_key(client: "MlflowClient", experiment: str, key: str) -> "Run | None":
    """Return the run of an experiment that was opened with a key, if there is one."""
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    return found[0] if found else None


def open_by_key(
    client: "MlflowClient",
    experiment: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    time: int,
) -> str:
    """Open the run with the key in the tags, or create it; return its id.

    Parameters that differ from the first time are kept as tags `resume.N.<key>`, because MLflow
    does not change a parameter. The same start opens a run once, however often it is repeated.

    Args:
        client: of the store.
        experiment: id of the experiment.
        params: dotted keys and texts.
        tags: with key, start and name.
        time: of the start, in milliseconds.
    """
    found = run_of_key(client, experiment, tags[KEY])
    if found is None:
        name = tags["mlflow.runName"]
        run = client.create_run(experiment, start_time=time, tags=_short(tags), run_name=name)
        _write(client, run.info.run_id, params, {})
        return str(run.info.run_id)
    run_id, before = str(found.info.run_id), found.data
    is_again = before.tags.get(START) == tags[START]
    count = int(before.tags.get(RESUMED, "0")) + (not is_again)
    changed = {
        safe_key(f"resume.{count}.{key}"): value
        for key, value in params.items()
        if before.params.get(key, value) != value
    }
    # The reason of its end no longer holds; a tag can only be emptied in the same batch.
    stale = {REASON_TAG: ""} if REASON_TAG in before.tags else {}
    client.update_run(run_id, status="RUNNING")
    fresh = {key: value for key, value in params.items() if key not in before.params}
    resumed = {RESUMED: str(count)} if count else {}
    _write(client, run_id, fresh, {**changed, **stale, **tags, **resumed})
    return run_id


def end_run(client: "MlflowClient", run_id: str, end: Mapping[str, str], time: int) -> None:
    """End a run with its state and reason, also one that was taken for killed meanwhile.

    Args:
        client: of the store.
        run_id: of the run.
        end: state and reason.
        time: of the end, in milliseconds.
    """
    if end["reason"] or REASON_TAG in client.get_run(run_id).data.tags:
        client.set_tag(run_id, REASON_TAG, end["reason"][:MAX_TAG])
    client.set_terminated(run_id, end["state"], end_time=time)


def _short(tags: Mapping[str, str]) -> dict[str, str]:
    return {safe_key(key): str(value)[:MAX_TAG] for key, value in tags.items()}


def _write(
    client: "MlflowClient", run_id: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    from mlflow.entities import Param, RunTag

    every_param = [Param(key, value) for key, value in params.items()]
    every_tag = [RunTag(key, value) for key, value in _short(tags).items()]
    for start in range(0, max(len(every_param), len(every_tag)), _BATCH):
        batch = slice(start, start + _BATCH)
        client.log_batch(run_id, params=every_param[batch], tags=every_tag[batch])


def reap(store: Store) -> list[str]:
    """Close the experiment's runs that are RUNNING although their process is dead.

    They become KILLED with a `vinedresser.reason`; opening one by its key later resumes it. The
    process of another host is dead once the lease of its run, sweep or pipeline has expired. Runs
    of other programs are left as they are.

    Returns:
        The ids of the runs that were closed.

    Raises:
        MachineError: the store does not answer.
    """
    client, experiment = open_client(store), initialise(store)
    closed = []
    with server_errors(store):
        for run in pages(client, experiment, "attributes.status = 'RUNNING'"):
            has_died = _has_died(run.data.tags)
            if has_died and _close(client, run):
                closed.append(str(run.info.run_id))
    return closed


def prepare_store(store: Store) -> None:
    """Create the store unless it exists, and close runs of killed processes.

    A store that does not answer is left to the runs, which keep what they cannot deliver.
    """
    try:
        if not is_reachable(store):
            raise MachineError(f"tracking store {store.shown}: does not answer")
        initialise(store)
        for run_id in reap(store):
            _log.info("tracking: run %s of a killed process closed", run_id[:8])
    except (BusyError, MachineError) as error:
        _log.warning("%s; runs keep their metrics until they can be delivered", error.args[0])


def _has_died(tags: Mapping[str, str]) -> bool:
    """Return whether the process that owns a run has ended without closing it."""
    owner, folder = tags.get(OWNER), RunFolder(Path(tags.get("vinedresser.folder", "")))
    if owner is None or not is_alive(owner):
        return owner is not None
    lease = Path(tags.get(LEASE) or folder.command_lease)
    return not owner.startswith(f"{this_host()}~") and lease.is_file() and Lease(lease).is_free()


def end_children(store: Store, parent: str, reason: str, *, key: str = "") -> None:
    """Close the RUNNING children of a run, or the one with a key, as KILLED, also those of others.

    Where the store does not answer they stay RUNNING, with a warning.

    Args:
        store: of the runs.
        parent: key of the parent.
        reason: kept as a tag.
        key: of one child; "" for all.
    """
    try:
        if not is_reachable(store):
            raise MachineError(f"tracking store {store.shown}: does not answer")
        client, experiment = open_client(store), initialise(store)
        with server_errors(store):
            found = run_of_key(client, experiment, parent)
            parent_id = found.info.run_id if found else ""
            query = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{parent_id}'"
            query += f" and tags.`{KEY}` = '{key}'" if key else ""
            for run in pages(client, experiment, query):
                client.set_tag(run.info.run_id, REASON_TAG, reason)
                client.set_terminated(run.info.run_id, "KILLED")
    except (BusyError, MachineError) as error:
        _log.warning("%s; stopped runs may stay RUNNING there", error.args[0])


def _close(client: "MlflowClient", run: "Run") -> bool:
    """Close an orphan unless it was opened again since it was found."""
    run_id = run.info.run_id
    now = client.get_run(run_id)
    owner = now.data.tags.get(OWNER, "")
    if now.info.status != "RUNNING" or not _has_died(now.data.tags):
        return False
    client.set_tag(run_id, REASON_TAG, f"its process {owner} ended without closing")
    client.set_terminated(run_id, "KILLED")
    return True


def pages(client: "MlflowClient", experiment: str, query: str = "") -> "Iterator[Run]":
    """Yield the runs of an experiment that match, the newest first."""
    token = None
    while True:
        page = client.search_runs([experiment], query, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
