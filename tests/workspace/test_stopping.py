"""Time for a checkpoint after SIGTERM, and stops through a channel of another kind than files."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.stopping import grace_seconds, stop_requested, stopping_runs_first


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 20.0),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, 1.0),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "60"}, 58.0),
        ({"VINEDRESSER_GRACE_SECONDS": "120", "RAY_JOB_STOP_WAIT_TIME_S": "60"}, 118.0),
        ({"RAY_JOB_STOP_WAIT_TIME_S": "soon"}, 20.0),
    ],
)
def test_the_time_for_a_checkpoint_is_what_will_kill_the_process_less_its_end(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], seconds: float
) -> None:
    for name in (
        "VINEDRESSER_GRACE_SECONDS",
        "RAY_JOB_STOP_WAIT_TIME_S",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert grace_seconds() == seconds


class Channel:
    """Runs that confirm a while after the request, and never by their files."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.requested = names, 0.0

    def request(self) -> None:
        self.requested = time.monotonic()

    def confirmed(self) -> list[str]:
        return self.names if time.monotonic() - self.requested > 0.3 else []


def test_200_runs_are_requested_at_once_and_confirm_without_files(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / f"run-{number}") for number in range(200)]
    for folder in folders:
        folder.path.mkdir()
    channel, ended = Channel([folder.name for folder in folders]), threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        with stopping_runs_first(lambda: folders, channel):
            begun = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.is_set()
        assert channel.requested - begun < 0.5
        assert time.monotonic() - begun < 10
        assert all(map(stop_requested, folders))
    finally:
        signal.signal(signal.SIGTERM, before)
