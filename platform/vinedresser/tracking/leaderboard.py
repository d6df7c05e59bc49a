"""The leaderboard: runs as plain rows, the best first; and where a run keeps its files."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vinedresser.errors import ConfigError
from vinedresser.tracking.runs import pages
from vinedresser.tracking.store import Store, connect, initialise, server_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Metrics that count errors or surprise; all others grow with quality.
LOWER_IS_BETTER = frozenset({"per", "wer", "cer", "ter", "nats"})
RUN_ID_LENGTH = 32
FOLDER, KIND, METRIC = "vinedresser.folder", "vinedresser.kind", "vinedresser.metric"


@dataclass(frozen=True)
class RunRow:
    """One run as a leaderboard shows it.

    Attributes:
        parent: run id of the parent, if any.
        kind: sweep, trial, train, prune or pipeline; empty for a run of somebody else.
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


def leaderboard(
    store: Store,
    *,
    experiment: str | None = None,
    limit: int = 20,
    lower_is_better: frozenset[str] = LOWER_IS_BETTER,
) -> list[RunRow]:
    """An experiment's runs: sweeps first, then the rest, each best first; no value comes last.

    Runs ranked by different metrics stand in groups, one a metric. Looks at the 5,000 newest.

    Args:
        store: where.
        experiment: another experiment than the store's.
        limit: rows at most.
        lower_is_better: names (without `dev/` or the like) of metrics where less is better.

    Raises:
        MachineError: the store does not answer.
        ConfigError: no such experiment.
    """

    def rank(row: RunRow) -> tuple[bool, bool, str, float, float]:
        name, value = row.metric or "", row.value
        is_lower = name.rpartition("/")[2] in lower_is_better
        directed = 0.0 if value is None else value if is_lower else -value
        return row.kind != "sweep", value is None, name, directed, -row.started.timestamp()

    if experiment in (None, store.experiment):
        identity = initialise(store)
        client = connect(store)
    else:
        client = connect(store)
        with server_errors(store):
            found = client.get_experiment_by_name(experiment)
            if found is None:
                names = sorted(one.name for one in client.search_experiments())
                raise ConfigError(f"no experiment {experiment}; there are {', '.join(names)}")
        identity = found.experiment_id
    with server_errors(store):
        rows = [_row(run) for run in pages(client, identity)]
    return sorted(rows, key=rank)[:limit]


def run_folder(store: Store, run_id: str) -> Path | None:
    """The folder that a run wrote into its tag `vinedresser.folder`; None if it wrote none.

    Args:
        store: where.
        run_id: the whole id, or its beginning where that names one run of the store.

    Raises:
        ConfigError: no such run, or several.
        MachineError: the store does not answer.
    """
    client = connect(store)
    from mlflow.exceptions import MlflowException

    with server_errors(store):
        if len(run_id) < RUN_ID_LENGTH:
            run_id = _completed(client, run_id)
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ConfigError(f"no run {run_id} in {store.shown}") from None
    folder = run.data.tags.get(FOLDER)
    return Path(folder) if folder else None


def _completed(client: "MlflowClient", beginning: str) -> str:
    names = {one.experiment_id for one in client.search_experiments()}
    ids = [run.info.run_id for name in names for run in pages(client, name)]
    found = [run_id for run_id in ids if run_id.startswith(beginning)]
    if len(found) > 1:
        raise ConfigError(f"run {beginning}: {len(found)} runs begin so; give more of the id")
    return found[0] if found else beginning


def experiments(store: Store) -> list[str]:
    """Names of the store's experiments that hold runs or may; MLflow's own default is left out.

    Raises:
        MachineError: the store does not answer.
    """
    client = connect(store)
    with server_errors(store):
        names = [one.name for one in client.search_experiments()]
    return sorted(name for name in names if name != "Default")
