"""Leaderboard: runs as plain rows, the best first; and the folder of a run."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vinedresser.errors import ConfigError
from vinedresser.metrics import is_lower_better
from vinedresser.tracking.runs import pages
from vinedresser.tracking.store import (
    ABSENT,
    Store,
    initialise,
    none_if,
    open_client,
    server_errors,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_ID_LENGTH = 32
FOLDER, KIND, METRIC = "vinedresser.folder", "vinedresser.kind", "vinedresser.metric"


@dataclass(frozen=True)
class RunRow:
    """Row of the leaderboard.

    Attributes:
        parent: run id of the parent, if any.
        kind: sweep, trial, train, prune or pipeline; empty for a run of another program.
        state: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        metric: name of the ranking metric; `value` is the best so far, None before the first.
        started: in UTC.
        seconds: of wall time, until now for a run that is RUNNING.
    """

    name: str
    run_id: str
    parent: str | None
    kind: str
    state: str
    metric: str | None
    value: float | None
    started: datetime
    seconds: float


def _row(run: "Run") -> RunRow:
    tags, info = run.data.tags, run.info
    metric = tags.get(METRIC)
    is_over = info.end_time and info.status != "RUNNING"
    end = info.end_time if is_over else time.time() * 1000
    return RunRow(
        name=info.run_name or info.run_id,
        run_id=info.run_id,
        parent=tags.get("mlflow.parentRunId"),
        kind=tags.get(KIND, ""),
        state=info.status,
        metric=metric,
        value=run.data.metrics.get(f"best/{metric}"),
        started=datetime.fromtimestamp(info.start_time / 1000, UTC),
        seconds=max(0.0, (end - info.start_time) / 1000),
    )


def leaderboard(store: Store, *, experiment: str | None = None, limit: int = 20) -> list[RunRow]:
    """Return the runs of an experiment: sweeps first, then by value, best first; without one last.

    Runs ranked by different metrics form groups, one per metric. Reads the 5,000 newest.

    Args:
        store: store of the runs.
        experiment: another experiment than the store's.
        limit: rows at most.

    Raises:
        MachineError: the store does not answer.
        ConfigError: no such experiment.
    """

    def rank(row: RunRow) -> tuple[bool, bool, str, float, float]:
        name, value = row.metric or "", row.value
        directed = 0.0 if value is None else value if is_lower_better(name) else -value
        return row.kind != "sweep", value is None, name, directed, -row.started.timestamp()

    if experiment in (None, store.experiment):
        identity = initialise(store)
        client = open_client(store)
    else:
        client = open_client(store)
        with server_errors(store):
            found = client.get_experiment_by_name(experiment)
            if found is None:
                names = sorted(one.name for one in client.search_experiments())
                raise ConfigError(f"no experiment {experiment}; there are {', '.join(names)}")
        identity = found.experiment_id
    with server_errors(store):
        rows = [_row(run) for run in pages(client, identity)]
    return sorted(rows, key=rank)[:limit]


def tagged_folder(store: Store, run_id: str) -> Path | None:
    """Return the folder in a run's tag `vinedresser.folder`; None without the tag.

    Args:
        store: store of the run.
        run_id: the whole id, or a beginning that only one run of the store has.

    Raises:
        ConfigError: no such run, or several.
        MachineError: the store does not answer.
    """
    client = open_client(store)
    with server_errors(store):
        if len(run_id) < RUN_ID_LENGTH:
            names = {one.experiment_id for one in client.search_experiments()}
            ids = [run.info.run_id for name in names for run in pages(client, name)]
            matches = [one for one in ids if one.startswith(run_id)]
            if len(matches) > 1:
                raise ConfigError(
                    f"run {run_id}: {len(matches)} runs begin so; give more of the id"
                )
            run_id = matches[0] if matches else run_id
        run = none_if(ABSENT, lambda: client.get_run(run_id))
        if run is None:
            raise ConfigError(f"no run {run_id} in {store.shown}")
    folder = run.data.tags.get(FOLDER)
    return Path(folder) if folder else None


def experiments(store: Store) -> list[str]:
    """Return the names of the store's experiments, without MLflow's own default.

    Raises:
        MachineError: the store does not answer.
    """
    client = open_client(store)
    with server_errors(store):
        names = [one.name for one in client.search_experiments()]
    return sorted(name for name in names if name != "Default")
