"""Opening runs by their content key, never twice; closing those whose process is gone."""

import contextlib
import getpass
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vinedresser.errors import MachineError
from vinedresser.tracking.remote import BATCH_TAGS, MAX_TAG, MlflowTracker, safe_key
from vinedresser.tracking.store import (
    Store,
    connect,
    initialise,
    is_reachable,
    locked,
    logger,
    server_errors,
)
from vinedresser.tracking.tracker import NullTracker
from vinedresser.workspace.process import is_alive, this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY, OWNER, RESUMED = "vinedresser.key", "vinedresser.owner", "vinedresser.resumed"
REASON = "vinedresser.reason"
# MLflow's limit of a parameter's value.
MAX_PARAM = 6000
LOCK_SECONDS = 60.0
MAX_NAME = 200


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and texts of a nested mapping; texts are JSON, strings as they are."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield safe_key(f"{prefix}{key}"), text[:MAX_PARAM]


def _revision() -> str:
    """The commit of the folder we run in; empty outside of a repository."""
    git = shutil.which("git")
    if git is None:
        return ""
    try:
        command = [git, "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)  # noqa: S603 (fixed words)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _provenance() -> dict[str, str]:
    tags = {OWNER: this_process(), "vinedresser.host": socket.gethostname()}
    with contextlib.suppress(PackageNotFoundError):
        tags["vinedresser.version"] = version("vinedresser")
    with contextlib.suppress(OSError, KeyError, ImportError):
        tags["mlflow.user"] = getpass.getuser()
    if revision := _revision():
        tags["mlflow.source.git.commit"] = revision
    return tags | {"mlflow.source.name": "vinedresser", "mlflow.source.type": "LOCAL"}


def open_run(  # noqa: PLR0913 (keyword-only; each is a field of the run, none is a switch)
    store: Store,
    *,
    key: str,
    name: str,
    parent: str | None = None,
    params: Mapping[str, Any] = {},
    tags: Mapping[str, str] = {},
    description: str = "",
) -> MlflowTracker | NullTracker:
    """The run of a key: the one that is there, re-opened, or else a new one.

    Parameters that differ from the first time are kept beside them as tags `resume.N.<key>`,
    because MLflow does not change a parameter.

    Args:
        store: where; `initialise` is done here.
        key: digest of what the run is; letters, digits and `_.:-` only.
        name: shown in the user interface; need not be unique.
        parent: run id of the run that this one is a part of.
        params: may be nested; kept under dotted keys, 6,000 characters a value.
        tags: for what is not a number, such as `vinedresser.kind`.
        description: Markdown, shown on top of the run.

    Returns:
        A tracker to be closed; one that forgets everything where the server is not there.

    Raises:
        ValueError: a key with other characters.
        ConfigError: the experiment was deleted.
    """
    if not re.fullmatch(r"[\w.:-]{1,250}", key):
        raise ValueError(f"run key {key!r}: letters, digits and _.:- are wanted, 250 at most")
    tags = {**tags, **_provenance(), KEY: key, "mlflow.runName": name[:MAX_NAME]}
    if parent:
        tags["mlflow.parentRunId"] = parent
    if description:
        tags["mlflow.note.content"] = description
    try:
        if not is_reachable(store):
            raise MachineError(f"tracking store {store.shown}: does not answer")
        experiment = initialise(store)
        client = connect(store)
        with locked(store, f"run {key}", seconds=LOCK_SECONDS), server_errors(store):
            run_id = _open(client, experiment, key, dict(flat(params)), tags)
    except MachineError as error:
        logger.warning("%s; the run goes on without tracking", error.args[0])
        return NullTracker()
    return MlflowTracker(store, run_id, client)


def _open(
    client: "MlflowClient",
    experiment: str,
    key: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    if found:
        return _reopen(client, found[0], params, tags)
    run = client.create_run(experiment, tags=_short(tags), run_name=tags["mlflow.runName"])
    _write(client, run.info.run_id, params, {})
    return str(run.info.run_id)


def _reopen(
    client: "MlflowClient", run: "Run", params: Mapping[str, str], tags: Mapping[str, str]
) -> str:
    run_id = str(run.info.run_id)
    count = int(run.data.tags.get(RESUMED, "0")) + 1
    before = run.data.params
    changed = {
        safe_key(f"resume.{count}.{key}"): value
        for key, value in params.items()
        if key in before and before[key] != value
    }
    # What was said when it ended no longer holds; a tag can only be emptied in the same batch.
    stale = {REASON: ""} if REASON in run.data.tags else {}
    client.update_run(run_id, status="RUNNING")
    fresh = {key: value for key, value in params.items() if key not in before}
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
    """Closes the experiment's runs that are RUNNING although their process is gone.

    They become KILLED with a `vinedresser.reason`; opening one by its key later goes on with it.
    Runs of other hosts, and runs that we did not open, are left alone.

    Returns:
        The ids of the runs that were closed.

    Raises:
        MachineError: the store does not answer.
    """
    client, experiment = connect(store), initialise(store)
    closed = []
    with server_errors(store):
        for run in pages(client, experiment, "attributes.status = 'RUNNING'"):
            owner = run.data.tags.get(OWNER)
            if owner is not None and not is_alive(owner) and _close(client, store, run):
                closed.append(str(run.info.run_id))
    return closed


def end_children(store: Store, parent: str, reason: str) -> None:
    """Closes as KILLED what is RUNNING under a run whose parts are over, whoever owned them.

    Raises:
        MachineError: the store does not answer.
    """
    client, experiment = connect(store), initialise(store)
    query = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{parent}'"
    with server_errors(store):
        for run in pages(client, experiment, query):
            client.set_tag(run.info.run_id, REASON, reason)
            client.set_terminated(run.info.run_id, "KILLED")


def _close(client: "MlflowClient", store: Store, run: "Run") -> bool:
    """Closes an orphan unless somebody re-opened it since it was found."""
    run_id = run.info.run_id
    with locked(store, f"run {run.data.tags.get(KEY, run_id)}", seconds=LOCK_SECONDS):
        now = client.get_run(run_id)
        owner = now.data.tags.get(OWNER, "")
        if now.info.status != "RUNNING" or is_alive(owner):
            return False
        client.set_tag(run_id, REASON, f"its process {owner} ended without closing")
        client.set_terminated(run_id, "KILLED")
        return True


def pages(
    client: "MlflowClient", experiment: str, query: str = "", *, most: int = 5000
) -> "Iterator[Run]":
    """The runs of an experiment that match, the newest first, at most `most`."""
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
