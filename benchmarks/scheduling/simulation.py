"""Ten years of ticks on a simulated clock: restarts, clock jumps, every change of clocks.

Real ticks on a real store (tmpfs); simulated are the clock and the run, which takes up to ten
hours, during which other ticks arrive. A restart is a kill of the tick at a random write of the
ledger, before or after it, or inside the run. What must have happened is computed independently:
all slots by walking over local days.
"""

import bisect
import json
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from vinedresser.schedule import record as records
from vinedresser.schedule.child import Ended
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.record import Record, State
from vinedresser.schedule.tick import Done, Ticker
from vinedresser.schedule.triggers import Conditions
from vinedresser.workspace.storage import POSIX, PosixStorage

START, END = datetime(2024, 1, 1, tzinfo=UTC), datetime(2034, 1, 1, tzinfo=UTC)
ZONES = ("Europe/Berlin", "America/New_York")
# Hours and minutes of the local day, as cron expression and as times; policies.
CASES = (
    ("30 2 * * *", ((2, 30),), "skip", {"keep": "last", "within": "12h"}),
    ("0 */6 * * *", ((0, 0), (6, 0), (12, 0), (18, 0)), "queue_one", {"keep": "all"}),
    ("0,30 1-2 * * *", ((1, 0), (1, 30), (2, 0), (2, 30)), "replace", {"within": "5h"}),
)  # fmt: skip


class Killed(BaseException):
    """The death of a tick."""


class KillingStorage(PosixStorage):
    """Storage that kills the tick at a chosen write, before or after it."""

    def __init__(self) -> None:
        self.left = -1

    def replace(self, path: Path, content: bytes | None, *, expected: bytes | None) -> bool:
        """Replace a file; the death is before the write for an even count, else after it."""
        self.left -= 1
        if self.left == 0:
            raise Killed
        done = super().replace(path, content, expected=expected)
        if self.left == 1 and random.random() < 0.5:  # noqa: S311
            self.left = -1
            raise Killed
        return done


@dataclass
class World:
    """Clock, runs and their evidence for one schedule."""

    draw: random.Random
    now: datetime = START
    ticks: int = 0
    restarts: int = 0
    active: int = 0
    overlaps: int = 0
    started: Counter[tuple[datetime, str]] = field(default_factory=Counter)
    doubles: int = 0
    nested: Callable[[], None] = lambda: None
    kill_run: bool = False
    # Whether a slot has a stored record, which must not run again.
    has: Callable[[str], bool] = lambda _: False

    def conditions(self, _state: State, _now: datetime) -> Conditions:
        """All data is new, but for one slot in ten."""
        kind = self.draw.random()
        if kind < 0.05:
            return Conditions("unmet", "as before", "d")
        return Conditions("wait", "waits: an upload", "d") if kind < 0.1 else Conditions("met", "")

    def run(self, record: Record, *, began: Callable[[str], None], stop: Callable[[], str]) -> Done:
        """Train for some hours, in which other ticks arrive."""
        key = (record.slot, record.cause)
        self.doubles += self.has(record.name)
        self.overlaps += self.active > 0
        self.started[key] += 1
        self.active += 1
        try:
            began("elsewhere.0~1~1")
            hours = self.draw.choice((0.1, 0.5, 2, 7, 10))
            until, stopped = self.now + timedelta(hours=hours), ""
            while self.now < until and not stopped:
                self.nested()
                stopped = stop()
            if self.kill_run:
                self.kill_run = False
                raise Killed
        finally:
            self.active -= 1
        code = -15 if stopped else self.draw.choice((0, 0, 0, 0, 0, 3, 4, 75))
        verdict = self.draw.choice(("promoted", "kept", "unchanged"))
        return Done(Ended(code, stopped, 1.0, 1.0, 1.0), {} if code else {"verdict": verdict})

    def event(self, event: str, name: str, content: Any) -> None:
        """Notices are measured elsewhere."""


def expected_slots(zone: str, times: tuple[tuple[int, int], ...]) -> Iterator[datetime]:
    """Yield the moments of local times of day, over all days, without croniter and our own code.

    A time that does not exist is the first minute after it that does; of a repeated one the first.
    """
    local, day, seen = ZoneInfo(zone), date(2023, 12, 31), set[datetime]()
    while day < date(2036, 1, 1):
        for hour, minute in times:
            naive = datetime(day.year, day.month, day.day, hour, minute)
            while True:
                found = naive.replace(tzinfo=local).astimezone(UTC)
                if found.astimezone(local).replace(tzinfo=None) == naive:
                    break
                naive += timedelta(minutes=1)
            if found not in seen:
                seen.add(found)
                yield found
        day += timedelta(days=1)


def simulate(case: int, zone: str, *, ticks: int, restarts: int, folder: Path) -> dict[str, Any]:
    """Tick one schedule over ten years; return the counts of what went wrong."""
    every, times, overlap, catch_up = CASES[case]
    plain = {
        "name": f"s{case}", "pipeline": "p", "every": every, "zone": zone, "overlap": overlap,
        "catch_up": catch_up, "retries": {"backoff": "20m", "pause_after": 4},
    }  # fmt: skip
    world = World(random.Random(f"{case} {zone}"))  # noqa: S311
    storage = KillingStorage()
    records.POSIX = storage  # the ledger's storage alone
    gap = (END - START) / ticks
    jumps = 0

    def advance() -> None:
        nonlocal jumps
        world.ticks += 1
        step = gap * world.draw.choice((0.02, 0.1, 0.5, 1, 1.5, 2.88))
        if world.draw.random() < 0.01:  # the clock is set
            jumps += 1
            step = timedelta(hours=world.draw.choice((-2, -0.5, 2, -30)))
        world.now += step

    schedule = Schedule.from_json(plain)

    def ticker() -> Ticker:
        return Ticker(schedule, folder, world, clock=lambda: world.now)

    def nested() -> None:
        advance()
        try:
            ticker().tick()
        except Killed:
            world.restarts += 1

    world.nested, world.has = nested, ticker().ledger.has
    while world.now < END and world.ticks < 4 * ticks:
        advance()
        if world.restarts < restarts * (world.ticks / ticks) and world.draw.random() < 0.3:
            if world.draw.random() < 0.4:
                world.kill_run = True
            else:
                storage.left = world.draw.randint(1, 12)
        one = ticker()
        try:
            one.tick()
        except Killed:
            world.restarts += 1
        storage.left = -1
        state = one.ledger.state()
        if state and state.paused and world.draw.random() < 0.05:
            one.ledger.change(lambda old: old.change(paused=None, failures=0))
    records.POSIX = POSIX
    return {**_judge(ticker(), world, zone, times), "jumps": jumps}


def _judge(one: Ticker, world: World, zone: str, times: Any) -> dict[str, Any]:
    stored = [one.ledger.record(name) for name in one.ledger.names()]
    state = one.ledger.state()
    assert state is not None
    every = [slot for slot in expected_slots(zone, times) if state.since < slot <= state.through]
    covered: Counter[datetime] = Counter()
    unexplained = 0
    for record in [*stored, *state.open]:
        first, last = bisect.bisect_left(every, record.first), bisect.bisect(every, record.slot)
        covered.update(every[first:last])
        if record.has_ended and not record.attempts and not record.reason:
            unexplained += 1
    # A record of something that is no slot would be as wrong.
    known = set(every) | {slot for slot in expected_slots(zone, times) if slot <= state.since}
    strange = [r for r in stored if r.slot not in known and state.since < r.slot <= state.through]
    return {
        "ticks": world.ticks,
        "restarts": world.restarts,
        "slots": len(every),
        "runs": sum(world.started.values()),
        "doubles": world.doubles,
        "overlaps": world.overlaps,
        "unexplained": unexplained + sum(not covered[slot] for slot in every) + len(strange),
        "ends": dict(Counter(record.state for record in stored)),
    }


def main(ticks: int, restarts: int) -> dict[str, Any]:
    """Simulate all cases and zones; print a line each, return the sums."""
    logging.getLogger("vinedresser").setLevel(logging.ERROR)
    total: Counter[str] = Counter()
    worlds = [(case, zone) for zone in ZONES for case in range(len(CASES))]
    for case, zone in worlds:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            found = simulate(
                case, zone, ticks=ticks // len(worlds), restarts=restarts // len(worlds),
                folder=Path(folder),
            )  # fmt: skip
        print(f"{zone:17} {CASES[case][0]:15} {CASES[case][2]:10} {json.dumps(found)}", flush=True)
        found.pop("ends")
        total.update(found)
    return dict(total)
