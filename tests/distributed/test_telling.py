"""What a worker writes is what the waiting process is told, each log line once."""

import logging
import time
from pathlib import Path

import pytest

from vinedresser.distributed import telling
from vinedresser.distributed.telling import FileTell, relaying, write_words
from vinedresser.training.progress import Best, Progress, untold


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_EVERY", 0.002)


def wait_for(told: list[Progress], count: int) -> None:
    end = time.monotonic() + 60
    while len(told) < count and time.monotonic() < end:
        time.sleep(0.001)


def test_progress_crosses_the_folder_and_each_log_line_is_told_once(tmp_path: Path):
    told = list[Progress]()
    tell = FileTell(tmp_path)
    best = Best("per", 12.5, 2)
    sent = [
        Progress(0, 9, 0.0, 3),
        Progress(3, 9, 0.5, 2, "training", 2.25, 900.0, best),
        Progress(3, 9, 0.5, 2, "evaluating", None, None, best),
        Progress(4, 9, 0.6, 2, best=best),
        Progress(6, 9, 0.7, 2, "training", 2.0, 800.0, best),
    ]
    with relaying(tmp_path, told.append):
        for number, progress in enumerate(sent, 1):
            time.sleep(0.003)
            tell(progress)
            wait_for(told, number)
    assert told == sent
    assert list(tmp_path.iterdir()) == []


def test_a_log_line_between_two_looks_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tell = FileTell(tmp_path)
    monkeypatch.setattr(telling, "_EVERY", 1e9)
    tell(Progress(1, 9, 0.1, 1))
    tell(Progress(3, 9, 0.3, 1, "training", 2.25, 900.0))  # too early to be written
    monkeypatch.setattr(telling, "_EVERY", 0.002)
    told = list[Progress]()
    with relaying(tmp_path, told.append):
        time.sleep(0.003)
        tell(Progress(4, 9, 0.4, 1))
        wait_for(told, 1)
    assert told == [Progress(4, 9, 0.4, 1, "training", 2.25, 900.0)]


def test_what_an_older_attempt_left_is_not_told(tmp_path: Path):
    FileTell(tmp_path)(Progress(7, 9, 0.7, 1))
    told = list[Progress]()
    with relaying(tmp_path, told.append):
        time.sleep(0.05)
    assert told == []


def test_a_folder_that_takes_no_file_does_not_end_the_run(tmp_path: Path):
    FileTell(tmp_path / "gone")(Progress(7, 9, 0.7, 1))
    with relaying(tmp_path / "gone", untold):
        pass
    assert not (tmp_path / "gone").exists()


def test_words_are_heard_to_the_last_and_older_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(telling, "_EVERY", 1e9)  # the look at the end is the only one
    words, log = tmp_path / "workers.log", logging.getLogger("vinedresser")
    words.write_text('{"rank": 0, "level": 40, "text": "older"}\n')
    with caplog.at_level(logging.INFO, "vinedresser"):
        with relaying(tmp_path, untold):
            write_words(tmp_path, 1)
            log.warning("a disk is slow")
            log.removeHandler(log.handlers[-1])
            with words.open("a") as stream:
                stream.write('{"rank": 0, "lev')
        said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert said == [
        (logging.WARNING, "a disk is slow"), (logging.WARNING, "rank 1: a disk is slow")
    ]  # fmt: skip
