"""What a worker writes reaches the listener of the waiting process, each log line once."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vinedresser.distributed import relay
from vinedresser.distributed.relay import GroupListener, logging_to, relaying
from vinedresser.training.listener import Best, Listener, Progress
from vinedresser.workspace.layout import RunFolder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_EVERY", 0.002)


class Seen(Listener):
    def __init__(self, progress: list[Progress], reports: list[object] | None = None) -> None:
        self.progress = progress.append  # type: ignore[method-assign]
        self.reports = [] if reports is None else reports
        self.final = list[object]()

    def evaluated(self, report: Mapping[str, Any]) -> None:
        self.reports.append(report)

    def finished(self, report: Mapping[str, Any]) -> None:
        self.final.append(report)


@pytest.mark.parametrize("in_trial", [False, True])
def test_evaluations_cross_too_unless_ray_forwards_them(tmp_path: Path, in_trial: bool):
    seen, handed = Seen([]), []
    worker = GroupListener(RunFolder(tmp_path), handed.append)
    folder = RunFolder(tmp_path)
    with relaying(folder, seen, reports=not in_trial), logging_to(folder, 0):
        worker.evaluated({"dev/per": 12.5, "step": 8.0})
        worker.evaluated({})
        worker.finished({"dev/per": 12.5, "is_last": 1.0})
    assert handed == [{"dev/per": 12.5, "step": 8.0}, {}, {"dev/per": 12.5, "is_last": 1.0}]
    assert seen.reports == ([] if in_trial else handed[:1])
    assert seen.final == ([] if in_trial else handed[2:])


def wait_for(told: list[Progress], count: int) -> None:
    end = time.monotonic() + 20
    while len(told) < count and time.monotonic() < end:
        time.sleep(0.001)


def test_progress_crosses_the_folder_and_each_log_line_is_told_once(tmp_path: Path):
    told = list[Progress]()
    worker = GroupListener(RunFolder(tmp_path), lambda _: None)
    best = Best("per", 12.5, 2)
    sent = [
        Progress(0, 9, 0.0, 3),
        Progress(3, 9, 0.5, 2, "training", 2.25, 900.0, best),
        Progress(3, 9, 0.5, 2, "evaluating", None, None, best),
        Progress(4, 9, 0.6, 2, best=best),
        Progress(6, 9, 0.7, 2, "training", 2.0, 800.0, best),
    ]
    with relaying(RunFolder(tmp_path), Seen(told), reports=True):
        for number, progress in enumerate(sent, 1):
            time.sleep(0.003)
            worker.progress(progress)
            wait_for(told, number)
    assert told == sent
    assert list(tmp_path.iterdir()) == []


def test_a_log_line_between_two_looks_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    worker = GroupListener(RunFolder(tmp_path), lambda _: None)
    monkeypatch.setattr(relay, "_EVERY", 1e9)
    worker.progress(Progress(1, 9, 0.1, 1))
    worker.progress(Progress(3, 9, 0.3, 1, "training", 2.25, 900.0))  # too early to be written
    monkeypatch.setattr(relay, "_EVERY", 0.002)
    told = list[Progress]()
    with relaying(RunFolder(tmp_path), Seen(told), reports=True):
        time.sleep(0.003)
        worker.progress(Progress(4, 9, 0.4, 1))
        wait_for(told, 1)
    assert told == [Progress(4, 9, 0.4, 1, "training", 2.25, 900.0)]


def test_what_an_older_attempt_left_is_not_told(tmp_path: Path):
    GroupListener(RunFolder(tmp_path), lambda _: None).progress(Progress(7, 9, 0.7, 1))
    told = list[Progress]()
    with relaying(RunFolder(tmp_path), Seen(told), reports=True):
        time.sleep(0.05)
    assert told == []


def test_a_folder_that_takes_no_file_does_not_end_the_run(tmp_path: Path):
    GroupListener(RunFolder(tmp_path / "gone"), lambda _: None).progress(Progress(7, 9, 0.7, 1))
    with relaying(RunFolder(tmp_path / "gone"), Listener(), reports=True):
        pass
    assert not (tmp_path / "gone").exists()


def test_words_are_heard_to_the_last_and_older_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(relay, "_EVERY", 1e9)  # the look at the end is the only one
    words, log = tmp_path / "workers.log", logging.getLogger("vinedresser")
    words.write_text('{"rank": 0, "level": 40, "text": "older"}\n')
    with caplog.at_level(logging.INFO, "vinedresser"):
        with relaying(RunFolder(tmp_path), Listener(), reports=True):
            with logging_to(RunFolder(tmp_path), 1):
                log.warning("a disk is slow")
            with words.open("a") as stream:
                stream.write('{"rank": 0, "lev')
        said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert said == [
        (logging.WARNING, "a disk is slow"), (logging.WARNING, "rank 1: a disk is slow")
    ]  # fmt: skip
