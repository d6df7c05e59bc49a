"""The leaderboard of a workspace with 5,000 runs, and of a server."""

import contextlib
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tracked import open_run
from vinedresser.errors import ConfigError
from vinedresser.tracking import leaderboard, store_for, tagged_folder

pytestmark = pytest.mark.filterwarnings("ignore")

MAIN = [sys.executable, "-c", "import sys; from vinedresser.cli.app import main; sys.exit(main())"]


def insert_runs(workspace: Path, count: int) -> None:
    """Fill a database with runs as sweeps leave them: 100 parameters each, the oldest the best."""
    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as opened, opened:
        opened.execute(
            "INSERT INTO experiments (experiment_id, name, lifecycle_stage)"
            " VALUES (7, 'big', 'active')"
        )
        names = [f"{number:032x}" for number in range(count)]
        opened.executemany(
            "INSERT INTO runs (run_uuid, name, status, start_time, end_time, lifecycle_stage,"
            " experiment_id) VALUES (?, ?, 'FINISHED', ?, ?, 'active', 7)",
            [(name, f"run {i}", 1000 * i, 1000 * i + 5000) for i, name in enumerate(names)],
        )
        tags = {"kind": "trial", "metric": "per", "folder": "/runs/x"}
        opened.executemany(
            "INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
            [(f"vinedresser.{key}", value, name) for name in names for key, value in tags.items()],
        )
        opened.executemany(
            "INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)",
            [(f"key{number}", "value", name) for name in names for number in range(100)],
        )
        opened.executemany(
            "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid)"
            " VALUES ('best/per', ?, 0, 0, 0, ?)",
            [(float(i), name) for i, name in enumerate(names)],
        )


def test_5_100_runs_are_ranked_in_2_seconds_and_none_is_overlooked(
    tmp_path: Path, with_database: Callable[[Path], Path]
) -> None:
    insert_runs(with_database(tmp_path), 5100)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*MAIN, "runs", "--workspace", str(tmp_path)],
        capture_output=True, text=True, check=True,
        env={key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "run 0 " in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    store = store_for(tmp_path, "big")
    assert [row.value for row in leaderboard(store, limit=3)] == [0, 1, 2]
    assert len(leaderboard(store, limit=0)) == 5100
    assert tagged_folder(store, f"{17:032x}") == Path("/runs/x")
    with pytest.raises(ConfigError, match="several runs"):
        tagged_folder(store, "0000")
    with pytest.raises(ConfigError, match="no run"):
        tagged_folder(store, "0' or '1")


@pytest.mark.slow
def test_a_server_sorts_as_the_workspace_does(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    there = store_for(tmp_path, "sorted")
    for number, (kind, metric) in enumerate(
        [("trial", "per"), ("sweep", "per"), ("trial", "bleu"), ("trial", "per"), ("train", "")]
    ):
        tags = {"vinedresser.kind": kind, "vinedresser.metric": metric}
        tracker = open_run(there, key=f"k{number}", name=f"run {number}", tags=tags)
        if metric:
            tracker.log({f"best/{metric}": 10.0 - number}, 1)
        tracker.close("FINISHED")
    order = ["run 1", "run 2", "run 3", "run 0", "run 4"]
    for limit in (0, 20, 3, 1):
        found = leaderboard(there, limit=limit)
        assert [row.name for row in found] == order[: limit or None]
    assert tagged_folder(there, found[0].run_id[:8]) is None
