"""Ticks on a real workspace, with a clock and a run that the test drives."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vinedresser.schedule.child import Ended
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.record import Record, State
from vinedresser.schedule.tick import Done, Ticker
from vinedresser.schedule.triggers import Conditions

START = datetime(2026, 11, 21, tzinfo=UTC)


class Killed(BaseException):
    """The death of a tick."""


@dataclass
class World:
    """A clock, the results of runs, and the events; `during` acts while a run is under way."""

    now: datetime = START
    codes: list[int] = field(default_factory=list)
    during: Callable[[], None] = lambda: None
    found: Conditions = field(default_factory=lambda: Conditions("met", "", "d"))
    runs: list[datetime] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)

    def conditions(self, state: State, now: datetime) -> Conditions:
        return self.found

    def run(self, record: Record, *, began: Callable[[str], None], stop: Callable[[], str]) -> Done:
        self.runs.append(record.slot)
        began("elsewhere.0~1~1")
        self.during()
        stopped = stop()
        code = -15 if stopped else self.codes.pop(0) if self.codes else 0
        table = {} if code else {"verdict": "promoted", "reason": "better"}
        return Done(Ended(code, stopped, 60.0, 30.0, 100.0), table, "it broke" if code else "")

    def event(self, event: str, name: str, content: dict[str, Any]) -> None:
        if (event, name) not in self.events:
            self.events.append((event, name))


def ticker(world: World, workspace: Path, **values: Any) -> Ticker:
    plain = {"name": "s", "pipeline": "pipelines.demo", "interval": "1h", **values}
    schedule = Schedule.from_json(plain)
    return Ticker(schedule, workspace, world, clock=lambda: world.now)


def stored(tick: Ticker) -> list[Record]:
    return [tick.ledger.record(name) for name in tick.ledger.names()]


def ends(tick: Ticker) -> list[tuple[int, str]]:
    """Hour of each record, counted from the start, and its end."""
    return [((r.slot - START) // timedelta(hours=1), r.state) for r in stored(tick)]


def test_one_run_per_slot_however_often_it_ticks(tmp_path: Path) -> None:
    world = World()
    tick = ticker(world, tmp_path)
    for minutes in range(0, 200, 7):
        world.now = START + timedelta(minutes=minutes)
        tick.tick()
        ticker(world, tmp_path).tick()
    assert world.runs == [START + timedelta(hours=h) for h in range(4)]
    assert ends(tick) == [(h, "promoted") for h in range(4)]
    assert [event for event, _ in world.events] == ["promoted"] * 4
    record = stored(tick)[0]
    assert (record.reason, record.attempts[0].seconds) == ("better", 60.0)


@pytest.mark.fault("P02")
def test_the_newest_missed_slot_runs_and_the_others_have_a_reason(tmp_path: Path) -> None:
    world = World()
    tick = ticker(world, tmp_path, catch_up={"within": "3h"})
    tick.tick()
    world.now += timedelta(hours=10, minutes=1)
    tick.tick()
    late, missed, ran = stored(tick)[1:]
    assert (late.count, late.first, late.state) == (7, START + timedelta(hours=1), "skipped")
    assert "too late" in late.reason
    assert (missed.count, missed.state) == (2, "skipped")
    assert (ran.slot, ran.state) == (START + timedelta(hours=10), "promoted")


@pytest.mark.fault("P02")
def test_all_missed_slots_run_in_their_order(tmp_path: Path) -> None:
    world = World()
    tick = ticker(world, tmp_path, catch_up={"keep": "all", "within": "12h"})
    tick.tick()
    world.now += timedelta(hours=3)
    tick.tick()
    assert ends(tick) == [(h, "promoted") for h in range(4)]


@pytest.mark.fault("P01")
@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        ("skip", [(0, "promoted"), (1, "skipped"), (2, "skipped")]),
        ("queue_one", [(0, "promoted"), (1, "promoted"), (2, "skipped")]),
        ("replace", [(0, "skipped"), (1, "skipped"), (2, "promoted")]),
    ],
)
def test_overlap(tmp_path: Path, overlap: str, expected: list[tuple[int, str]]) -> None:
    world = World()
    tick = ticker(world, tmp_path, overlap=overlap)

    def two_slots_later() -> None:
        world.during = lambda: None
        for _ in range(2):
            world.now += timedelta(hours=1)
            ticker(world, tmp_path, overlap=overlap).tick()

    world.during = two_slots_later
    tick.tick()
    assert ends(tick) == expected
    for record in stored(tick):
        assert (record.state == "skipped") == record.reason.startswith("overlap: ")


@pytest.mark.fault("P03")
def test_the_next_tick_continues_the_slot_of_a_killed_one(tmp_path: Path) -> None:
    world = World()
    tick = ticker(world, tmp_path)

    def kill() -> None:
        world.during = lambda: None
        raise Killed

    world.during = kill
    with pytest.raises(Killed):
        tick.tick()
    world.now += timedelta(minutes=2)
    ticker(world, tmp_path).tick()
    assert world.runs == [START, START]
    (record,) = stored(tick)
    assert [attempt.reason for attempt in record.attempts] == ["interrupted", ""]
    assert record.state == "promoted"


@pytest.mark.fault("P06")
def test_no_slot_runs_twice_when_the_clock_is_set_back(tmp_path: Path) -> None:
    world = World()
    tick = ticker(world, tmp_path)
    for hours in (0, 1, 2, 0.5, 1, 2, 3, 50, 3.5, 4, 5):
        world.now = START + timedelta(hours=hours)
        tick.tick()
    assert world.runs == [START + timedelta(hours=h) for h in (0, 1, 2, 3, 50, 4, 5)]


@pytest.mark.fault("P07")
def test_retries_and_pause(tmp_path: Path) -> None:
    world = World(codes=[3, 3, 4, 2, 0])
    tick = ticker(world, tmp_path, retries={"times": 2, "backoff": "5m", "pause_after": 2})
    times = []
    for minute in range(0, 250):
        world.now, before = START + timedelta(minutes=minute), len(world.runs)
        tick.tick()
        times += [minute] * (len(world.runs) - before)
    # The code 4 of the third attempt is worth no retry; neither is 2.
    assert times == [0, 5, 15, 60]
    assert ends(tick) == [
        (0, "failed"), (1, "failed"), (2, "skipped"), (3, "skipped"), (4, "skipped"),
    ]  # fmt: skip
    first, _, third = stored(tick)[:3]
    assert first.reason == "exit code 4: it broke"
    assert third.reason.startswith("paused since 2026-11-21T01:00:00Z: 2 slots in a row failed")
    assert [event for event, _ in world.events].count("paused") == 1
    state = tick.ledger.state()
    assert state is not None
    assert state.ends == {"failed": 2, "skipped": 3}


def test_unmet_conditions_end_a_slot_and_data_that_is_written_makes_it_wait(tmp_path: Path) -> None:
    world = World(found=Conditions("wait", "waits: x changed 1 s ago", "d"))
    tick = ticker(world, tmp_path)
    tick.tick()
    assert (stored(tick), world.runs) == ([], [])
    world.now, world.found = START + timedelta(minutes=1), Conditions("met", "", "d")
    tick.tick()
    world.now, world.found = START + timedelta(hours=1), Conditions("unmet", "as before", "d")
    tick.tick()
    assert ends(tick) == [(0, "promoted"), (1, "unchanged")]
    state = tick.ledger.state()
    assert state is not None
    assert (state.data, state.good) == ("d", START + timedelta(hours=1))


def test_overdue_is_an_event_once(tmp_path: Path) -> None:
    world = World(codes=[4] * 9)
    tick = ticker(world, tmp_path, deadline="2h", retries={"pause_after": 0})
    for hour in range(6):
        world.now = START + timedelta(hours=hour)
        tick.tick()
    assert [event for event, _ in world.events if event == "overdue"] == ["overdue"]


@pytest.mark.fault("P04")
def test_two_schedulers_at_once_run_each_slot_once(tmp_path: Path) -> None:
    last = START + timedelta(hours=15)
    worlds = [World(), World()]

    def serve(world: World) -> None:
        tick = ticker(world, tmp_path)
        while (state := tick.ledger.state()) is None or state.through < last or state.open:
            if state is not None:
                world.now = state.through + timedelta(hours=not state.open)
            tick.tick()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(serve, worlds))
    runs = sorted(slot for world in worlds for slot in world.runs)
    assert runs == [START + timedelta(hours=hour) for hour in range(16)]
    assert len(stored(ticker(worlds[0], tmp_path))) == 16
