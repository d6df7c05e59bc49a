"""Runs in a real SQLite store and on a real server on loopback, and what happens without one."""

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from tests.memory_tracker import MemoryTracker
from tests.tracked import open_run, spool_of
from vinedresser import tracking
from vinedresser.errors import BusyError, ConfigError, MachineError
from vinedresser.tracking import Store, deliver_spools, delivery, spools_of, store
from vinedresser.tracking.outbox import MlflowTracker
from vinedresser.tracking.runs import flat
from vinedresser.tracking.spool import Spool
from vinedresser.workspace.layout import SpoolFolder, Workspace
from vinedresser.workspace.process import this_process

# MLflow's own imports warn (sqlalchemy's noload, pydantic, ...); none of it is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_user_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("with space ü")


@pytest.fixture
def sqlite(workspace: Path, request: pytest.FixtureRequest, monkeypatch) -> Store:
    """A database for the module, an experiment for the test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking.store_for(workspace, request.node.name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: "subprocess.Popen[bytes]", seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"{url} did not come up")


def test_importing_tracking_imports_no_mlflow_and_no_torch() -> None:
    code = "import sys, vinedresser.tracking; print({'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_store_is_the_users_or_the_workspaces(tmp_path, monkeypatch) -> None:
    own = tracking.store_for(tmp_path, "e")
    assert own.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert own.artifacts == (tmp_path / "mlartifacts").as_uri()
    assert not any(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org:5000/x?y=1")
    users = tracking.store_for(tmp_path, "e")
    assert users.artifacts is None
    assert users.shown == "https://example.org:5000/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///mlruns")
    with pytest.raises(ConfigError, match="sqlite"):
        tracking.store_for(tmp_path, "e")


def test_params_become_dotted_keys_and_json() -> None:
    params = {
        "optim": {"lr": 1e-3, "betas": [0.9, 0.98], "none": None},
        "name": "a",
        "long": "x" * 9000,
    }
    got = dict(flat(params))
    assert got["optim.lr"] == "0.001"
    assert got["optim.betas"] == "[0.9, 0.98]"
    assert got["optim.none"] == "null"
    assert len(got.pop("long")) == 6000


def test_metrics_tags_and_artifacts_arrive_in_few_batches(sqlite: Store, monkeypatch) -> None:
    from matplotlib.figure import Figure

    tracker = open_run(sqlite, key="a", name="n", params={f"p{i}": i for i in range(250)})
    batches, open_client = [], delivery.open_client

    def counting(one: Store) -> object:
        client = open_client(one)
        send = client.log_batch
        client.log_batch = lambda run_id, metrics=(), **rest: (
            batches.append(len(metrics)), send(run_id, metrics=metrics, **rest),
        )  # fmt: skip
        return client

    monkeypatch.setattr(delivery, "open_client", counting)
    for step in range(1, 301):
        tracker.log({f"train/m{i}": step + i for i in range(10)}, step)
    tracker.log({"bad": float("nan"), "worse": float("inf"), "odd@name": 1.0}, 301)
    tracker.tag({"dataset": "d1"})
    tracker.text("hello", "notes/a.txt")
    tracker.table({"trial": [1, 2], "per": [0.5, 0.25]}, "trials.json")
    tracker.figure(Figure(), "plots/a.png")
    tracker.close("FINISHED")
    tracker.close("FAILED", "second call does not count")

    client = store.open_client(sqlite)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/m3"] == 303
    assert run.data.metrics["odd_name"] == 1.0
    assert "bad" not in run.data.metrics
    assert tracker.skipped == 2
    assert not spools_of(Workspace(sqlite.leases.parent))
    assert run.data.tags["vinedresser.skipped_metrics"] == "2"
    assert run.data.tags["dataset"] == "d1"
    assert len(run.data.params) == 250
    assert len(client.get_metric_history(tracker.run_id, "train/m0")) == 300
    assert sum(batches) == 3001
    assert max(batches) <= 1000
    assert sum(size > 0 for size in batches) <= 3001 / 200 + 2
    root = Path(sqlite.artifacts.removeprefix("file://").replace("%20", " ").replace("%C3%BC", "ü"))
    files = root / tracker.run_id / "artifacts"
    assert (files / "notes/a.txt").read_text() == "hello"
    assert json.loads((files / "trials.json").read_text())["data"] == [[1, 0.5], [2, 0.25]]
    assert (files / "plots/a.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_is_reopened_and_never_duplicated(sqlite: Store) -> None:
    first = open_run(sqlite, key="k1", name="n", params={"lr": 1, "same": 2})
    first.close("FAILED", "power cut")
    second = open_run(sqlite, key="k1", name="n", params={"lr": 3, "same": 2, "new": 4})
    client = store.open_client(sqlite)
    run = client.get_run(second.run_id)
    assert second.run_id == first.run_id
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "1", "same": "2", "new": "4"}
    assert run.data.tags["resume.1.lr"] == "3"
    assert run.data.tags["vinedresser.resumed"] == "1"
    assert "power cut" not in run.data.tags.values()
    second.close("FINISHED")
    assert len(client.search_runs([run.info.experiment_id])) == 1
    with pytest.raises(ValueError, match="run key"):
        open_run(sqlite, key="a' or '1", name="n")


def test_a_deleted_experiment_ends_no_run_and_gets_everything_once_restored(sqlite, caplog) -> None:
    client, experiment = store.open_client(sqlite), tracking.initialise(sqlite)
    client.delete_experiment(experiment)
    tracker = open_run(sqlite, key="k", name="n")
    tracker.log({"x": 1.0}, 1)
    assert tracker.run_id == ""
    tracker.close("FINISHED")
    assert "experiments restore" in caplog.text
    assert "vinedresser sync" in caplog.text
    client.restore_experiment(experiment)
    assert not deliver_spools([spool_of(sqlite, "k")], sqlite.leases.parent).left
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"x": 1.0})


def test_a_held_lock_of_the_store_does_not_end_a_run(tmp_path, monkeypatch, caplog) -> None:
    """A training was ended after 60 s of waiting for it."""
    monkeypatch.setattr(store, "CREATION_SECONDS", 0.1)
    new = tracking.store_for(tmp_path, "e")
    with store.locked(new, f"creation of {new.shown}"):
        tracker = open_run(new, key="k", name="n")
        tracker.log({"x": 1.0}, 1)
        assert tracker.run_id == ""
        assert "in use by process" in tracking.undelivered(spool_of(new, "k"))
        tracker.log({"x": 2.0}, 2)
        tracker.close("FINISHED")
    assert "in use by process" in caplog.text
    assert "the run goes on" in caplog.text


def test_openers_do_not_wait_for_each_other_where_the_store_exists(sqlite: Store) -> None:
    """Importing mlflow took seconds under one lock of the workspace."""
    identity = tracking.initialise(sqlite)
    with store.locked(sqlite, f"creation of {sqlite.shown}"):
        assert tracking.initialise(sqlite) == identity


def test_a_run_is_opened_when_there_is_something_to_deliver_or_patience_ends(tmp_path) -> None:
    away = Store("http://127.0.0.1:1", "e", None, tmp_path / ".leases")

    def opened(patience: float) -> MlflowTracker:
        opening = {"store": away.label, "experiment": "e", "parent": None, "params": {}, "tags": {}}
        return MlflowTracker(away, Spool(SpoolFolder(tmp_path), opening), patience=patience)

    silent = opened(3600)
    assert not silent.attempted.wait(0.05)
    silent.close("KILLED")
    assert silent.attempted.is_set()
    logging_one = opened(3600)
    logging_one.log({"x": 1.0}, 1)
    assert logging_one.attempted.wait(60)
    assert opened(0).attempted.wait(60)


def test_what_is_logged_before_the_run_is_open_is_delivered(sqlite: Store) -> None:
    columns = {"a": [1, 2]}
    # The creation of the database, which the tracker waits for.
    tracker = open_run(sqlite, key="early", name="early")
    tracker.log({"x": 1.0}, 1)
    tracker.table(columns, "t.json")
    tracker.tag({"k": "old"})
    columns["a"].append(3)
    assert tracker.run_id
    tracker.log({"x": 2.0}, 2)
    tracker.tag({"k": "new"})
    tracker.close("FINISHED")
    client = store.open_client(sqlite)
    history = client.get_metric_history(tracker.run_id, "x")
    assert [(point.value, point.step) for point in history] == [(1.0, 1), (2.0, 2)]
    assert client.get_run(tracker.run_id).data.tags["k"] == "new"
    path = Path(client.download_artifacts(tracker.run_id, "t.json"))
    assert json.loads(path.read_text())["data"] == [[1], [2]]


def test_leaderboard_puts_sweeps_first_then_the_best(sqlite: Store) -> None:
    def run(
        name: str, kind: str, metric: str, value: float | None, parent: str | None = None
    ) -> str:
        tags = {"vinedresser.kind": kind, "vinedresser.metric": metric}
        tracker = open_run(sqlite, key=name, name=name, parent=parent, tags=tags)
        if value is not None:
            tracker.log({f"best/{metric}": value}, 1)
        tracker.tag({"vinedresser.folder": f"/runs/{name}"})
        tracker.close("FINISHED")
        return tracker.run_id

    sweep = run("sweep", "sweep", "per", 0.2)
    run("worse", "trial", "per", 0.3, "sweep")
    best = run("better", "trial", "per", 0.2, "sweep")
    run("none", "trial", "per", None, "sweep")
    run("low", "train", "bleu", 10.0)
    run("high", "train", "bleu", 30.0)
    rows = tracking.leaderboard(sqlite)
    assert [row.name for row in rows] == ["sweep", "high", "low", "better", "worse", "none"]
    assert rows[3].parent == sweep
    assert rows[3].value == 0.2
    assert rows[3].started.tzinfo is not None
    assert 0 <= rows[3].seconds < 600
    assert len(tracking.leaderboard(sqlite, limit=2)) == 2
    assert tracking.tagged_folder(sqlite, best) == Path("/runs/better")
    with pytest.raises(ConfigError, match="no run"):
        tracking.tagged_folder(sqlite, "0" * 32)
    with pytest.raises(ConfigError, match="no experiment"):
        tracking.leaderboard(sqlite, experiment="nothing")


OPEN_AND_WAIT = """
import sys, time
from pathlib import Path
from tests.tracked import open_run
from vinedresser import tracking
store = tracking.store_for(Path(sys.argv[1]), sys.argv[2])
print(open_run(store, key="orphan", name="orphan").run_id, flush=True)
time.sleep(300)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_reap_closes_and_a_key_reopens(sqlite: Store) -> None:
    mine = open_run(sqlite, key="mine", name="mine")
    client = store.open_client(sqlite)
    foreign = client.create_run(tracking.initialise(sqlite)).info.run_id
    arguments = [sys.executable, "-c", OPEN_AND_WAIT, str(sqlite.leases.parent), sqlite.experiment]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = process.stdout.readline().strip()
        assert tracking.reap(sqlite) == []
        process.kill()
    assert client.get_run(orphan).info.status == "RUNNING"
    assert tracking.reap(sqlite) == [orphan]
    run = client.get_run(orphan)
    assert run.info.status == "KILLED"
    assert "ended without closing" in run.data.tags["vinedresser.reason"]
    assert client.get_run(mine.run_id).info.status == "RUNNING"
    assert client.get_run(foreign).info.status == "RUNNING"
    again = open_run(sqlite, key="orphan", name="orphan")
    assert again.run_id == orphan
    assert client.get_run(orphan).data.tags["vinedresser.owner"] == this_process()
    assert tracking.reap(sqlite) == []
    again.close("FINISHED")
    mine.close("FINISHED")


@pytest.mark.slow
def test_four_processes_may_create_the_store_at_once(tmp_path: Path, with_database) -> None:
    # Forks of a process that has imported MLflow, for 4 s each.
    code = """
import os, sys
from pathlib import Path
from vinedresser import tracking
tracking.initialise(tracking.store_for(Path(sys.argv[1]), "warm"))
store, children = tracking.store_for(Path(sys.argv[2]), "e"), []
for _ in range(4):
    children.append(os.fork())
    if not children[-1]:
        print(tracking.initialise(store), flush=True)
        os._exit(0)
assert not any(os.waitpid(child, 0)[1] for child in children)
"""
    command = [sys.executable, "-c", code, str(with_database(tmp_path / "warm")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split()
    assert len(answers) == 4
    assert len(set(answers)) == 1


def test_a_busy_lock_ends_the_wait_with_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    one = Store("sqlite:///x", "e", None, tmp_path)
    with (
        store.locked(one, "model m"),
        pytest.raises(BusyError, match="model m"),
        store.locked(one, "model m"),
    ):
        pass


def test_an_absent_server_neither_stops_nor_blocks(tmp_path, caplog) -> None:
    absent = Store(f"http://u:secret@127.0.0.1:{free_port()}", "e", None, tmp_path / ".leases")
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "vinedresser"):
        tracker = open_run(absent, key="k", name="n")
        assert tracker.run_id == ""
        assert caplog.text.count("keeps its metrics until") == 1
        begun = time.monotonic()
        for step in range(300):
            tracker.log({"m": 1.0}, step)
        tracker.tag({"a": "b"})
        tracker.text("t", "a.txt")
        assert time.monotonic() - begun < 2
        tracker.close("FINISHED")
    assert time.monotonic() - start < 30
    assert caplog.text.count("vinedresser sync") == 1
    assert "secret" not in caplog.text
    assert "secret" not in "".join(p.read_text() for p in tmp_path.rglob("*.*") if p.is_file())
    with pytest.raises(MachineError, match="tracking store"):
        tracking.initialise(absent)


def test_memory_tracker_keeps_what_it_is_told() -> None:
    tracker = MemoryTracker()
    tracker.log({"a": 1}, 2)
    tracker.tag({"t": "u"})
    tracker.table({"x": [1]}, "x.json")
    tracker.close("KILLED", "stopped")
    tracker.close("FINISHED")
    assert tracker.metrics == [("a", 1.0, 2)]
    assert (tracker.state, tracker.reason) == ("KILLED", "stopped")


def test_ui_refuses_a_port_in_use_and_a_remote_store(sqlite: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MachineError, match="in use; name another"):
            tracking.serve_ui(sqlite, taken.getsockname()[1])
    with pytest.raises(ConfigError, match="open that address"):
        tracking.serve_ui(replace(sqlite, uri="http://example.org"), 5000)


@pytest.mark.slow
def test_ui_answers_and_ends_whole_on_interrupt(sqlite: Store) -> None:
    port = free_port()
    code = (
        "import sys; from pathlib import Path; from vinedresser import tracking;"
        "s = tracking.store_for(Path(sys.argv[1]), 'e');"
        "sys.exit(tracking.serve_ui(s, int(sys.argv[2])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(sqlite.leases.parent), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A background job of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 0
    finally:
        process.kill()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_a_server_keeps_runs_children_and_files(mlflow_server: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    there = tracking.store_for(tmp_path, "served")
    note = {"mlflow.note.content": "*why*"}
    parent = open_run(there, key="p", name="parent", tags=note)
    parent.wait_for_opening()
    child = open_run(there, key="c", name="child", parent="p")
    child.log({"dev/per": 0.5}, 1)
    child.text("hello", "notes/a.txt")
    child.close("FINISHED")
    parent.close("FAILED", "no reason")
    again = open_run(there, key="c", name="child")
    assert again.run_id == child.run_id
    again.close("FINISHED")
    client = store.open_client(there)
    run = client.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.metrics == {"dev/per": 0.5}
    assert [file.path for file in client.list_artifacts(child.run_id, "notes")] == ["notes/a.txt"]
    assert client.get_run(parent.run_id).data.tags["mlflow.note.content"] == "*why*"
