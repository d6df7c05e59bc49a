"""Notices: each event once, with a receiver that is dead, slow or a command."""

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.notify import deliver_notices, enqueue, waiting_notices
from vinedresser.workspace.layout import ScheduleFolder

NOW = datetime(2026, 11, 21, tzinfo=UTC)
CANARY = "canary-4711"


class Receiver:
    """An HTTP server that keeps what it gets; `code` is its answer."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.code = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.code == 200:
                    outer.events.append(json.loads(body))
                self.send_response(outer.code)
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{CANARY}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def schedule(*notices: dict[str, Any]) -> Schedule:
    plain = {"name": "s", "pipeline": "pipelines.demo", "every": "@daily", "notify": list(notices)}
    return Schedule.from_json(plain)


def events(receiver: Receiver) -> list[tuple[str, str]]:
    return [(event["event"], event["name"]) for event in receiver.events]


def test_each_event_arrives_once(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", receiver.url)
    value, folder = schedule({"on": ["failed", "promoted"], "url_env": "HOOK"}), tmp_path / "s"
    place = ScheduleFolder(folder)
    for name in ("a", "b"):
        for _ in range(2):
            enqueue(value, place, "failed", name, {"reason": "it broke"})
            enqueue(value, place, "kept", name, {})
    ticks = [threading.Thread(target=deliver_notices, args=(value, place, NOW)) for _ in range(4)]
    for tick in ticks:
        tick.start()
    for tick in ticks:
        tick.join()
    enqueue(value, place, "failed", "a", {"reason": "it broke"})
    deliver_notices(value, place, NOW)
    assert sorted(events(receiver)) == [("failed", "a"), ("failed", "b")]
    assert receiver.events[0]["text"] == "s: failed: it broke"
    assert len({event["id"] for event in receiver.events}) == 2
    assert waiting_notices(place, NOW) == 0


@pytest.mark.parametrize("code", [500, 302])
def test_a_refused_event_is_sent_again_later(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setenv("HOOK", receiver.url)
    value, place = schedule({"on": ["failed"], "url_env": "HOOK"}), ScheduleFolder(tmp_path)
    enqueue(value, place, "failed", "a", {})
    receiver.code = code
    deliver_notices(value, place, NOW)
    receiver.code = 200
    deliver_notices(value, place, NOW)  # too early
    assert events(receiver) == []
    deliver_notices(value, place, NOW + timedelta(minutes=1))
    assert events(receiver) == [("failed", "a")]


def test_a_dead_receiver_delays_no_other_and_its_secret_is_nowhere(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        dead = f"http://127.0.0.1:{silent.getsockname()[1]}/{CANARY}"
        monkeypatch.setenv("DEAD", dead)
        monkeypatch.setenv("BAD", f"ftp://{CANARY}")
        monkeypatch.setenv("HOOK", receiver.url)
        names = ("DEAD", "BAD", "GONE", "HOOK")
        value = schedule(*({"on": ["failed"], "url_env": name} for name in names))
        place = ScheduleFolder(tmp_path)
        for name in "ab":
            enqueue(value, place, "failed", name, {})
        started = time.monotonic()
        deliver_notices(value, place, NOW, patience=2.0)
        assert time.monotonic() - started < 5
    assert events(receiver) == [("failed", "a"), ("failed", "b")]
    assert "the environment variable GONE holds no http(s) URL" in caplog.text
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "TimeoutError" in caplog.text + written
    assert CANARY not in caplog.text + written


def test_a_command_gets_the_event_on_its_input(tmp_path: Path) -> None:
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    command = [sys.executable, "-c", code, str(tmp_path / "got")]
    value, place = schedule({"on": ["paused"], "command": command}), ScheduleFolder(tmp_path / "s")
    enqueue(value, place, "paused", "x", {"reason": "why"})
    deliver_notices(value, place, NOW, patience=20.0)
    assert json.loads((tmp_path / "got").read_text())["reason"] == "why"
