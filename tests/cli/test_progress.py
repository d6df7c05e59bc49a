"""The bar and the lines of a run, on a clock that the test turns."""

import io
import logging
import math
import sys

import pytest
from rich.console import Console, RenderableType

from vinedresser.cli.progress import (
    Bar,
    LogLines,
    TimeLeft,
    duration,
    quantity,
    sparkline,
    watching,
)
from vinedresser.config import Experiment
from vinedresser.training.listener import Best, Progress

CORPUS = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
TASK = {"name": "t", "corpus": CORPUS, "tokenizer": {"kind": "symbols"}, "metric": "per"}
RUN = Experiment.from_json({"task": TASK, "model": {"kind": "transformer"}})


class Hand:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_time_left_counts_updates_and_evaluations_apart():
    hand = Hand()
    clock = TimeLeft(hand)
    assert math.isnan(clock.seconds)
    clock.add(Progress(0, 100, 0.0, 4))
    hand.time += 60  # compilation
    clock.add(Progress(1, 100, 0.0, 4))
    assert math.isnan(clock.seconds)
    for step in range(2, 26):
        hand.time += 2
        clock.add(Progress(step, 100, 0.0, 4))
        wanted = 2 * (100 - step) if step > 5 else math.nan
        assert clock.seconds == pytest.approx(wanted, nan_ok=True)
    clock.add(Progress(25, 100, 0.0, 4, phase="evaluating"))
    hand.time += 10
    clock.add(Progress(25, 100, 0.0, 3))
    assert clock.seconds == pytest.approx(2 * 75 + 3 * 10)
    hand.time += 2
    clock.add(Progress(26, 100, 0.0, 3))
    assert clock.seconds == pytest.approx(2 * 74 + 3 * 10)


def test_time_left_follows_the_last_minute():
    hand = Hand()
    clock = TimeLeft(hand)
    clock.add(Progress(0, 1000, 0.0, 0))
    for step in range(1, 301):
        hand.time += 4 if step <= 200 else 1
        clock.add(Progress(step, 1000, 0.0, 0))
    assert clock.seconds == pytest.approx(700)


def test_a_resumed_run_is_not_faster_for_what_was_done_before():
    hand = Hand()
    clock = TimeLeft(hand)
    clock.add(Progress(900, 1000, 9.0, 1))
    assert math.isnan(clock.seconds)
    for step in (901, 902, 903):
        hand.time += 11
        clock.add(Progress(step, 1000, 9.0, 1))
    assert clock.seconds == pytest.approx(11 * 97)


def test_lines_at_log_lines_five_seconds_apart(caplog):
    caplog.set_level(logging.INFO)
    hand = Hand()
    lines = LogLines(RUN, now=hand)
    lines.progress(Progress(0, 900, 0.0, 2))
    for step in range(1, 121):
        hand.time += 0.125
        loss = 4 - step / 100 if step % 10 == 0 else None
        best = Best("per", 12.34, 80) if step > 80 else None
        lines.progress(Progress(step, 900, step / 100, 1, "training", loss, 11_234.0, best))
    assert caplog.messages == [
        "step 10/900  epoch 0.10  loss 3.90  11.2k tok/s  ETA 1:51",
        "step 50/900  epoch 0.50  loss 3.50  11.2k tok/s  ETA 1:46",
        "step 90/900  epoch 0.90  loss 3.10  11.2k tok/s  ETA 1:41  best per 12.34 (step 80)",
    ]


def rendered(picture: RenderableType, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(picture)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_the_bar_keeps_its_two_lines_at_any_width(width):
    hand, pictures = Hand(), list[RenderableType]()
    bar = Bar(RUN, pictures.append, now=hand)
    bar.progress(Progress(0, 900, 0.0, 2))
    for step in range(1, 451):
        hand.time += 0.125
        loss = 9 - step / 100 if step % 10 == 0 else None
        bar.progress(
            Progress(step, 900, step / 100, 1, "training", loss, 11_234.0, Best("per", 12.34, 100))
        )
    # Every second update ends a quarter of a second.
    assert len(pictures) == 1 + 225
    first, last = rendered(pictures[0], width), rendered(pictures[-1], width)
    assert len(first) == len(last) == 2
    assert all(len(line) <= width for line in first + last)
    assert "450/900  epoch 4.5  ETA 0:56" in last[0] or width == 30
    if width >= 80:
        assert "loss 4.50" in last[1]
        assert "11.2k tok/s  best per 12.34 (step 100)" in last[1]
        assert last[0].count("━") > 20


def test_an_evaluation_is_shown_at_once():
    hand, pictures = Hand(), list[RenderableType]()
    bar = Bar(RUN, pictures.append, now=hand)
    bar.progress(Progress(10, 90, 0.1, 2))
    bar.progress(Progress(10, 90, 0.1, 2, phase="evaluating"))
    assert "evaluating" in rendered(pictures[-1], 80)[0]
    bar.progress(Progress(10, 90, 0.1, 1))
    assert "ETA -:--" in rendered(pictures[-1], 80)[0]
    assert len(pictures) == 3


def test_no_bar_where_there_is_no_terminal(caplog):
    caplog.set_level(logging.INFO)
    for console in (
        Console(file=io.StringIO()),
        Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}),
        Console(file=io.TextIOWrapper(io.BytesIO(), "latin-1"), force_terminal=True),
    ):
        with watching(RUN, console=console) as shown:
            assert isinstance(shown, LogLines)
            shown.progress(Progress(3, 9, 0.5, 1, "training", 2.0, 900.0))
    assert caplog.messages == ["step 3/9  epoch 0.50  loss 2.00  900 tok/s"] * 3


def test_what_is_written_meanwhile_stands_above_the_bar(monkeypatch, capsys):
    file = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stderr", file)
    console = Console(
        file=file, force_terminal=True, width=60, _environ={"TERM": "xterm"}, color_system=None
    )
    with watching(RUN, console=console) as shown:
        shown.progress(Progress(3, 9, 0.5, 1, "training", 2.0, 900.0))
        sys.stderr.write("a warning [bold] of 3 lines\n")
        sys.stderr.flush()
        sys.stdout.write("a result\n")
    assert capsys.readouterr().out == "a result\n"
    assert sys.stderr is file
    file.flush()
    written = file.buffer.getvalue().decode()  # type: ignore[attr-defined]
    # The bar is wiped, the line written, and the bar drawn anew below it.
    before, after = written.split("a warning [bold] of 3 lines")
    assert "3/9" in before
    assert before.endswith("\x1b[2K")
    assert "3/9" in after
    assert written.endswith("\x1b[?25h") or written.rstrip("\r\n").endswith("\x1b[2K")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (987.4, "987"), (999.6, "1.00k"), (11_234, "11.2k"), (112_340, "112k"),
     (1_049_000, "1.05M"), (25e6, "25.0M")],
)  # fmt: skip
def test_quantities_have_three_digits(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (92.4, "1:32"), (3599.7, "1:00:00"), (7510, "2:05:10"), (360_000, "4d 04h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sparklines():
    assert sparkline([]) == ""
    assert sparkline([3.0]) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0, math.nan, 0.0]) == "█?▁"
    assert sparkline([float(i) for i in range(320)], width=8) == "▁▂▃▄▅▆▇█"
