"""Runs in a real SQLite store and on a real server on loopback, and what happens without one."""

import contextlib
import json
import logging
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.memory_tracker import MemoryTracker
from vinedresser import tracking
from vinedresser.errors import BusyError, ConfigError, MachineError
from vinedresser.tracking import Store, outbox, store
from vinedresser.tracking.outbox import MlflowTracker
from vinedresser.tracking.runs import flat
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


class Relay(socketserver.ThreadingTCPServer):
    """An address that leads to a server until it is cut off; then connections are refused."""

    daemon_threads = True

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.far, self.sockets = int(url.rpartition(":")[2]), list[socket.socket]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        def copy(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while part := source.recv(1 << 16):
                    target.sendall(part)
                target.shutdown(socket.SHUT_WR)

        with socket.create_connection(("127.0.0.1", self.far)) as server:
            self.sockets += [request, server]
            answers = threading.Thread(target=copy, args=(server, request))
            answers.start()
            copy(request, server)
            answers.join()

    def cut(self) -> None:
        self.shutdown()
        self.server_close()
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


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

    tracker = tracking.open_run(sqlite, key="a", name="n", params={f"p{i}": i for i in range(250)})
    batches, open_client = [], outbox.open_client

    def counting(one: Store) -> object:
        client = open_client(one)
        send = client.log_batch
        client.log_batch = lambda run_id, metrics=(), **rest: (
            batches.append(len(metrics)), send(run_id, metrics=metrics, **rest),
        )  # fmt: skip
        return client

    monkeypatch.setattr(outbox, "open_client", counting)
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
    assert (tracker.skipped, tracker.dropped, tracker.pending) == (2, 0, 0)
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
    first = tracking.open_run(sqlite, key="k1", name="n", params={"lr": 1, "same": 2})
    first.close("FAILED", "power cut")
    second = tracking.open_run(sqlite, key="k1", name="n", params={"lr": 3, "same": 2, "new": 4})
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
        tracking.open_run(sqlite, key="a' or '1", name="n")


def test_a_run_of_a_deleted_experiment_is_refused_by_the_next_call_and_not_by_close(sqlite) -> None:
    store.open_client(sqlite).delete_experiment(tracking.initialise(sqlite))
    tracker = tracking.open_run(sqlite, key="k", name="n")
    with pytest.raises(ConfigError, match="was deleted"):
        _ = tracker.run_id
    with pytest.raises(ConfigError, match="was deleted"):
        tracker.log({"x": 1.0}, 1)
    tracker.close("FAILED")


def test_a_busy_store_does_not_end_a_training(sqlite: Store, monkeypatch, caplog) -> None:
    """It waits in the thread, and goes on without tracking."""
    tracking.initialise(sqlite)
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    with store.locked(sqlite, "run k"):
        tracker = tracking.open_run(sqlite, key="k", name="n")
        tracker.log({"x": 1.0}, 1)
        assert tracker.run_id == ""
        tracker.log({"x": 1.0}, 2)
        tracker.close("FINISHED")
    assert "in use by process" in caplog.text
    assert "the run goes on without tracking" in caplog.text


def test_openers_do_not_wait_for_each_other_where_the_store_exists(sqlite: Store) -> None:
    """Importing mlflow took seconds under one lock of the workspace."""
    identity = tracking.initialise(sqlite)
    with store.locked(sqlite, f"creation of {sqlite.shown}"):
        assert tracking.initialise(sqlite) == identity


def test_a_run_is_opened_when_there_is_something_to_deliver_or_patience_ends(tmp_path) -> None:
    opened, one = threading.Event(), Store("http://127.0.0.1:1", "e", None, tmp_path)

    def opening() -> str:
        opened.set()
        raise MachineError("away")

    silent = MlflowTracker(one, opening, patience=3600)
    assert not opened.wait(0.05)
    silent.close("KILLED")
    assert opened.is_set()
    opened.clear()
    MlflowTracker(one, opening, patience=3600).log({"x": 1.0}, 1)
    assert opened.wait(60)
    opened.clear()
    MlflowTracker(one, opening, patience=0)
    assert opened.wait(60)


def test_what_is_logged_before_the_run_is_open_is_delivered(sqlite: Store) -> None:
    gate, columns = threading.Event(), {"a": [1, 2]}

    def opening() -> str:
        gate.wait()
        client = store.open_client(sqlite)
        return str(client.create_run(tracking.initialise(sqlite)).info.run_id)

    tracker = MlflowTracker(sqlite, opening)
    tracker.log({"x": 1.0}, 1)
    tracker.table(columns, "t.json")
    tracker.tag({"k": "old"})
    columns["a"].append(3)
    gate.set()
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
        tracker = tracking.open_run(sqlite, key=name, name=name, parent=parent, tags=tags)
        if value is not None:
            tracker.log({f"best/{metric}": value}, 1)
        tracker.tag({"vinedresser.folder": f"/runs/{name}"})
        tracker.close("FINISHED")
        return tracker.run_id

    sweep = run("sweep", "sweep", "per", 0.2)
    run("worse", "trial", "per", 0.3, sweep)
    best = run("better", "trial", "per", 0.2, sweep)
    run("none", "trial", "per", None, sweep)
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
from vinedresser import tracking
store = tracking.store_for(Path(sys.argv[1]), sys.argv[2])
print(tracking.open_run(store, key="orphan", name="orphan").run_id, flush=True)
time.sleep(300)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_reap_closes_and_a_key_reopens(sqlite: Store) -> None:
    mine = tracking.open_run(sqlite, key="mine", name="mine")
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
    again = tracking.open_run(sqlite, key="orphan", name="orphan")
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


def test_an_absent_server_neither_stops_nor_blocks(tmp_path, caplog, monkeypatch) -> None:
    absent = Store(f"http://u:secret@127.0.0.1:{free_port()}", "e", None, tmp_path)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "vinedresser"):
        tracker = tracking.open_run(absent, key="k", name="n")
        assert tracker.run_id == ""
        assert caplog.text.count("without tracking") == 1
        tracker.log({"m": 1.0}, 1)
        tracker.close("FINISHED")
        assert "not delivered" not in caplog.text
        # A server that was there when the run was opened, and is not now.
        monkeypatch.setattr(outbox, "KEPT_METRICS", 50)
        orphan = MlflowTracker(absent, lambda: "0" * 32)
        assert orphan.run_id
        begun = time.monotonic()
        for step in range(300):
            orphan.log({"m": 1.0}, step)
        orphan.tag({"a": "b"})
        orphan.text("t", "a.txt")
        assert time.monotonic() - begun < 2
        orphan.close("FINISHED")
    assert time.monotonic() - start < 30
    assert orphan.pending == 50
    assert orphan.dropped == 250
    assert caplog.text.count("metrics wait in memory") == 1
    assert "secret" not in caplog.text
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
    parent = tracking.open_run(there, key="p", name="parent", tags=note)
    child = tracking.open_run(there, key="c", name="child", parent=parent.run_id)
    child.log({"dev/per": 0.5}, 1)
    child.text("hello", "notes/a.txt")
    child.close("FINISHED")
    parent.close("FAILED", "no reason")
    again = tracking.open_run(there, key="c", name="child")
    assert again.run_id == child.run_id
    again.close("FINISHED")
    client = store.open_client(there)
    run = client.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.metrics == {"dev/per": 0.5}
    assert [file.path for file in client.list_artifacts(child.run_id, "notes")] == ["notes/a.txt"]
    assert client.get_run(parent.run_id).data.tags["mlflow.note.content"] == "*why*"


@pytest.mark.slow
def test_a_server_killed_in_the_middle_stops_nothing(
    mlflow_server: str, tmp_path, monkeypatch
) -> None:
    relay = Relay(mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.url)
    tracker = tracking.open_run(tracking.store_for(tmp_path, "killed"), key="p", name="n")
    tracker.log({"m": 1.0}, 1)
    assert tracker.run_id  # the run is open
    relay.cut()
    durations = []
    for step in range(2, 500):
        start = time.monotonic()
        tracker.log({"m": 1.0}, step)
        durations.append(time.monotonic() - start)
    start = time.monotonic()
    tracker.close("FINISHED")
    assert sorted(durations)[-20] < 0.05  # the machine may pause a process now and then
    assert time.monotonic() - start < 30
    assert tracker.pending > 0
