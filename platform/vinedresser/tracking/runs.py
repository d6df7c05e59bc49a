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
from typing import TYPE_CHECKING, Any

from vinedresser.errors import BusyError, MachineError
from vinedresser.tracking.outbox import BATCH_TAGS, MAX_TAG, MlflowTracker, safe_key
from vinedresser.tracking.store import (
    Store,
    initialise,
    is_reachable,
    locked,
    open_client,
    server_errors,
)
from vinedresser.workspace.process import is_alive, this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)

KEY, OWNER, RESUMED = "vinedresser.key", "vinedresser.owner", "vinedresser.resumed"
REASON_TAG = "vinedresser.reason"
# MLflow's limit of a parameter's value.
MAX_PARAM = 6000
MAX_NAME = 200


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Return dotted keys and texts of a nested mapping; texts are JSON, strings as they are."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield safe_key(f"{prefix}{key}"), text[:MAX_PARAM]


def _provenance() -> dict[str, str]:
    """Return tags: process, host, user, version, and the commit of the working directory."""
    tags = {
        OWNER: this_process(),
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


def open_run(
    store: Store,
    *,
    key: str,
    name: str,
    parent: str | None = None,
    params: Mapping[str, Any] = {},
    tags: Mapping[str, str] = {},
) -> MlflowTracker:
    """Return a tracker of the key's run: the existing one is opened again, or else a new one.

    The run is opened in the tracker's thread. A run without a parent closes those of killed
    processes then. Parameters that differ from the first time are kept as tags `resume.N.<key>`,
    because MLflow does not change a parameter.

    Args:
        store: store of the run; created if necessary.
        key: digest of the run's content; letters, digits and `_.:-` only.
        name: shown in the user interface; need not be unique.
        parent: run id of the run that this one is a part of.
        params: may be nested; kept under dotted keys, 6,000 characters per value.
        tags: for values that are not numbers, such as `vinedresser.kind`.

    Raises:
        ValueError: a key with other characters.
    """
    if not re.fullmatch(r"[\w.:-]{1,250}", key):
        raise ValueError(f"run key {key!r}: expected letters, digits and _.:-, 250 at most")
    tags = {**tags, KEY: key, "mlflow.runName": name[:MAX_NAME]}
    if parent:
        tags["mlflow.parentRunId"] = parent

    def opening() -> str:
        if not is_reachable(store):
            raise MachineError(f"tracking store {store.shown}: does not answer")
        experiment = initialise(store)
        client = open_client(store)
        with locked(store, f"run {key}"), server_errors(store):
            run_id = _open(client, experiment, dict(flat(params)), {**tags, **_provenance()})
        with contextlib.suppress(BusyError, MachineError):  # the next run tries again
            for orphan in [] if parent else reap(store):
                _log.info("tracking: run %s of a killed process closed", orphan[:8])
        return run_id

    return MlflowTracker(store, opening)


def _open(
    client: "MlflowClient", experiment: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> str:
    """Open the run with the key in the tags, or create it; return its id."""
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{tags[KEY]}'", max_results=1)
    if not found:
        run = client.create_run(experiment, tags=_short(tags), run_name=tags["mlflow.runName"])
        _write(client, run.info.run_id, params, {})
        return str(run.info.run_id)
    run_id, before = str(found[0].info.run_id), found[0].data
    count = int(before.tags.get(RESUMED, "0")) + 1
    changed = {
        safe_key(f"resume.{count}.{key}"): value
        for key, value in params.items()
        if before.params.get(key, value) != value
    }
    # The reason of its end no longer holds; a tag can only be emptied in the same batch.
    stale = {REASON_TAG: ""} if REASON_TAG in before.tags else {}
    client.update_run(run_id, status="RUNNING")
    fresh = {key: value for key, value in params.items() if key not in before.params}
    _write(client, run_id, fresh, {**changed, **stale, **tags, RESUMED: str(count)})
    return run_id


def _short(tags: Mapping[str, str]) -> dict[str, str]:
    return {safe_key(key): str(value)[:MAX_TAG] for key, value in tags.items()}


def _write(
    client: "MlflowClient", run_id: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    from mlflow.entities import Param, RunTag

    every_param = [Param(key, value) for key, value in params.items()]
    every_tag = [RunTag(key, value) for key, value in _short(tags).items()]
    for start in range(0, max(len(every_param), len(every_tag)), BATCH_TAGS):
        batch = slice(start, start + BATCH_TAGS)
        client.log_batch(run_id, params=every_param[batch], tags=every_tag[batch])


def reap(store: Store) -> list[str]:
    """Close the experiment's runs that are RUNNING although their process is dead.

    They become KILLED with a `vinedresser.reason`; opening one by its key later resumes it.
    Runs of other hosts, and runs of other programs, are left as they are.

    Returns:
        The ids of the runs that were closed.

    Raises:
        MachineError: the store does not answer.
    """
    client, experiment = open_client(store), initialise(store)
    closed = []
    with server_errors(store):
        for run in pages(client, experiment, "attributes.status = 'RUNNING'"):
            owner = run.data.tags.get(OWNER)
            if owner is not None and not is_alive(owner) and _close(client, store, run):
                closed.append(str(run.info.run_id))
    return closed


def end_children(store: Store, parent: str, reason: str) -> None:
    """Close the RUNNING children of a run as KILLED, whatever process owned them.

    Where the store does not answer they stay RUNNING, with a warning.
    """
    query = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{parent}'"
    try:
        client, experiment = open_client(store), initialise(store)
        with server_errors(store):
            for run in pages(client, experiment, query):
                client.set_tag(run.info.run_id, REASON_TAG, reason)
                client.set_terminated(run.info.run_id, "KILLED")
    except MachineError as error:
        _log.warning("%s; stopped runs may stay RUNNING there", error.args[0])


def _close(client: "MlflowClient", store: Store, run: "Run") -> bool:
    """Close an orphan unless it was opened again since it was found."""
    run_id = run.info.run_id
    with locked(store, f"run {run.data.tags.get(KEY, run_id)}"):
        now = client.get_run(run_id)
        owner = now.data.tags.get(OWNER, "")
        if now.info.status != "RUNNING" or is_alive(owner):
            return False
        client.set_tag(run_id, REASON_TAG, f"its process {owner} ended without closing")
        client.set_terminated(run_id, "KILLED")
        return True


def pages(
    client: "MlflowClient", experiment: str, query: str = "", *, most: int = 5000
) -> "Iterator[Run]":
    """Return the runs of an experiment that match, the newest first, at most `most`."""
    token, seen = None, 0
    while True:
        page = client.search_runs([experiment], query, max_results=1000, page_token=token)
        for run in page:
            if seen == most:
                return
            seen += 1
            yield run
        token = page.token
        if not token:
            return
