"""Delivery to a real server that is away at the start, in the middle, for the whole run."""

import contextlib
import random
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.tracked import open_run, spool_of
from vinedresser.tracking import (
    Store,
    Tracker,
    deliver_spools,
    outbox,
    spools_of,
    store_for,
    undelivered,
)
from vinedresser.tracking.delivery import deliver
from vinedresser.tracking.spool import starts_of
from vinedresser.tracking.store import open_client
from vinedresser.workspace.layout import Workspace

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Relay(socketserver.ThreadingTCPServer):
    """An address that leads to a server until it is cut off; then connections are refused."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, url: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.room = 1 << 60  # bytes until the link is cut
        self.far, self.sockets = int(url.rpartition(":")[2]), list[socket.socket]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        def copy(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while (part := source.recv(1 << 12)) and self.room > 0:
                    self.room -= len(part)
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


@pytest.fixture
def link(mlflow_server: str, tmp_path: Path, monkeypatch) -> "Link":
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(outbox, "BACK_OFF_SECONDS", 0.2)
    link = Link(mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{link.port}")
    return link


class Link:
    """The way to the server, at an address that stays the same."""

    def __init__(self, url: str) -> None:
        self.url, self.relay = url, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def up(self) -> None:
        self.relay = Relay(self.url, self.port)

    def down(self) -> None:
        self.relay.cut()


def log_part(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last):
        tracker.log({"loss": 1 / step, "speed": step}, step)
    tracker.tag({f"part{first}": "x"})
    tracker.text(f"{first}", f"notes/{first}.txt")


def require_whole(store: Store, key: str, parts: list[int], end: int) -> None:
    """Everything is in the store, once and in order."""
    client = open_client(store)
    experiment = client.get_experiment_by_name(store.experiment).experiment_id
    (run,) = client.search_runs([experiment], f"tags.`vinedresser.key` = '{key}'")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert "vinedresser.reason" not in run.data.tags or not run.data.tags["vinedresser.reason"]
    for name in ("loss", "speed"):
        points = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == list(range(1, end))
        assert [point.timestamp for point in points] == sorted(p.timestamp for p in points)
    assert all(run.data.tags[f"part{part}"] == "x" for part in parts)
    found = {file.path for file in client.list_artifacts(run.info.run_id, "notes")}
    assert found == {f"notes/{part}.txt" for part in parts}


@pytest.mark.parametrize("away", ["start", "middle", "whole", "end"])
def test_what_a_server_missed_arrives_once_and_in_order(
    link: Link, tmp_path: Path, away: str, caplog
) -> None:
    store = store_for(tmp_path, f"away-{away}")
    if away in ("middle", "end"):
        link.up()
    tracker = open_run(store, key="k", name="n", params={"lr": 0.1})
    log_part(tracker, 1, 300)
    assert bool(tracker.run_id) == (away in ("middle", "end"))
    if away == "start":
        link.up()
    elif away in ("middle", "end"):
        link.down()
    log_part(tracker, 300, 600)
    if away == "middle":
        assert_soon(lambda: undelivered(spool_of(store, "k")))
        link.up()
    if away in ("start", "middle"):
        assert_soon(lambda: not undelivered(spool_of(store, "k")))
    tracker.close("FINISHED")
    if away in ("whole", "end"):
        assert "`vinedresser sync` delivers it" in caplog.text
        folders = spools_of(Workspace(tmp_path))
        assert "does not answer" in str(deliver_spools(folders, tmp_path).left)
        link.up()
        done = deliver_spools(folders, tmp_path)
        assert (len(done.delivered), done.left) == (1, {})
    require_whole(store, "k", [1, 300], 600)
    assert not spools_of(Workspace(tmp_path))
    link.down()


def assert_soon(is_true: Any) -> None:
    for _ in range(600):
        if is_true():
            return
        threading.Event().wait(0.05)
    raise AssertionError


def test_starts_that_were_killed_are_delivered_before_the_next(link: Link, tmp_path: Path) -> None:
    """Two starts die with the server away; the third one delivers all three, then itself."""
    store = store_for(tmp_path, "killed")
    code = (
        "import os, sys; from pathlib import Path; from tests.tracked import open_run;"
        "from vinedresser.tracking import store_for;"
        "t = open_run(store_for(Path(sys.argv[1]), 'killed'), key='k', name='n',"
        " params={'lr': 0.1});"
        "steps = range(int(sys.argv[2]), int(sys.argv[3]));"
        "[t.log({'loss': 1 / s, 'speed': s}, s) for s in steps];"
        "os._exit(9)"
    )
    for first, last in (("1", "100"), ("100", "200")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), first, last], timeout=200, check=False
        )
        assert done.returncode == 9
    link.up()
    tracker = open_run(store, key="k", name="n", params={"lr": 0.1})
    log_part(tracker, 200, 300)
    tracker.close("FINISHED")
    require_whole(store, "k", [200], 300)
    link.down()


def test_a_delivery_that_is_cut_anywhere_and_repeated_changes_nothing(
    link: Link, tmp_path: Path
) -> None:
    """The link is cut after a random number of bytes, until a delivery gets through."""
    store, draw = store_for(tmp_path, "cut"), random.Random(0)
    tracker = open_run(store, key="k", name="n", params={"lr": 0.1})
    for first in range(1, 1001, 100):
        log_part(tracker, first, first + 100)
    tracker.close("FINISHED")
    folder, cuts = spool_of(store, "k"), 0
    while starts_of(folder):
        link.up()
        link.relay.room = draw.randrange(2_000, 60_000) * (1 + cuts)
        with contextlib.suppress(Exception):
            deliver(folder, store)
        cuts += 1
        link.down()
    assert cuts > 2
    link.up()
    require_whole(store, "k", list(range(1, 1001, 100)), 1001)
    link.down()


def test_a_child_waits_for_its_parent(link: Link, tmp_path: Path) -> None:
    store = store_for(tmp_path, "family")
    parent = open_run(store, key="p", name="parent")
    child = open_run(store, key="c", name="child", parent="p", params={"lr": 0.1})
    child.close("FINISHED")
    parent.close("FINISHED")
    link.up()
    first = deliver_spools([spool_of(store, "c")], tmp_path)
    assert "parent" in str(first.left)
    assert not deliver_spools([spool_of(store, "p"), spool_of(store, "c")], tmp_path).left
    client = open_client(store)
    runs = client.search_runs([client.get_experiment_by_name("family").experiment_id])
    ids = {run.data.tags["vinedresser.key"]: run for run in runs}
    assert ids["c"].data.tags["mlflow.parentRunId"] == ids["p"].info.run_id
    link.down()
