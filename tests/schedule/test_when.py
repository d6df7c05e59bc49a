"""Times of slots and decisions about them, as pure functions."""

import json
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vinedresser.config import resolve
from vinedresser.errors import ConfigError
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.when import (
    decided_slots,
    due_slots,
    is_overdue,
    next_slot,
    retry_at,
    slots_after,
)

ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
DAY = datetime(2026, 11, 21, tzinfo=UTC)


def schedule(**values: object) -> Schedule:
    times = {} if "interval" in values else {"every": "0 3 * * *"}
    return Schedule.from_json({"name": "s", "pipeline": "pipelines.demo", **times, **values})


def local(moment: datetime, zone: str) -> str:
    return moment.astimezone(ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M %z")


@pytest.mark.fault("P05")
@pytest.mark.parametrize(
    ("zone", "every", "after", "expected"),
    [
        # The gap: 02:30 does not exist on this day; it runs once, at the first valid time.
        ("Europe/Berlin", "30 2 * * *", "2026-03-28T12:00", "2026-03-29 03:00 +0200"),
        ("America/New_York", "30 2 * * *", "2026-03-07T12:00", "2026-03-08 03:00 -0400"),
        # The repeat: 02:30 exists twice on this day; the first counts.
        ("Europe/Berlin", "30 2 * * *", "2026-10-24T12:00", "2026-10-25 02:30 +0200"),
        ("America/New_York", "30 1 * * *", "2026-10-31T12:00", "2026-11-01 01:30 -0400"),
    ],
)
def test_changes_of_clocks(zone: str, every: str, after: str, expected: str) -> None:
    value = schedule(every=every, zone=zone)
    first, second = islice(slots_after(value, datetime.fromisoformat(after + "+00:00")), 2)
    assert local(first, zone) == expected
    day = first.astimezone(ZoneInfo(zone)).date()
    assert second.astimezone(ZoneInfo(zone)).date() == day + timedelta(days=1)


@pytest.mark.fault("P05")
@pytest.mark.parametrize("zone", ZONES)
def test_one_slot_per_local_day_over_ten_years(zone: str) -> None:
    start = datetime(2024, 1, 1, tzinfo=ZoneInfo(zone))
    slots = due_slots(schedule(every="30 2 * * *", zone=zone), start, start.replace(year=2034))
    days = [slot.astimezone(ZoneInfo(zone)).date() for slot in slots]
    assert all(b - a == timedelta(days=1) for a, b in pairwise(days))
    assert len(days) == 3653


crons = st.sampled_from(
    [
        "*/5 * * * *",
        "0 * * * *",
        "30 2 * * *",
        "*/30 1-3 * * *",
        "0 3 1 * 1",
        "@weekly",
        "7 2 * * 0",
    ]
)
moments = st.datetimes(datetime(2024, 1, 1), datetime(2034, 1, 1)).map(
    lambda found: found.replace(tzinfo=UTC)
)


@settings(max_examples=150)
@given(every=crons, zone=st.sampled_from(ZONES), after=moments)
def test_slots_increase_and_do_not_depend_on_where_the_search_starts(
    every: str, zone: str, after: datetime
) -> None:
    value = schedule(every=every, zone=zone)
    slots = list(islice(slots_after(value, after), 8))
    assert all(a < b for a, b in pairwise([after, *slots]))
    for a, b in pairwise(slots):
        assert next_slot(value, a) == b
        assert next_slot(value, a + (b - a) / 2) == b


@settings(max_examples=50)
@given(seconds=st.integers(1, 10**7), after=moments)
def test_slots_of_an_interval_are_its_multiples(seconds: int, after: datetime) -> None:
    first, second = islice(slots_after(schedule(interval=f"{seconds}s"), after), 2)
    assert first > after >= first - timedelta(seconds=seconds)
    assert (second - first).total_seconds() == seconds
    assert first.timestamp() % seconds == 0


@settings(max_examples=300)
@given(
    overlap=st.sampled_from(["skip", "queue_one", "replace"]),
    keep=st.sampled_from(["last", "all"]),
    within=st.integers(0, 60),
    ages=st.lists(st.integers(0, 100), max_size=12, unique=True),
    pending=st.integers(0, 2),
)
def test_every_due_slot_is_in_one_decision(
    overlap: str, keep: str, within: int, ages: list[int], pending: int
) -> None:
    value = schedule(
        interval="1h", overlap=overlap, catch_up={"keep": keep, "within": f"{within}h"}
    )
    due = [DAY - timedelta(hours=age) for age in sorted(ages, reverse=True)]
    running = [DAY - timedelta(hours=200 - i) for i in range(pending)]
    decisions = decided_slots(value, due, running, DAY)
    spans = sorted((d.first, d.slot) for d in decisions)
    covered = [slot for slot in due for first, last in spans if first <= slot <= last]
    assert covered == due
    assert sum(d.count for d in decisions) == len(due)
    runs = [d.slot for d in decisions if not d.reason]
    assert all(DAY - slot <= max(timedelta(hours=within), timedelta(minutes=5)) for slot in runs)
    if keep == "last" or pending:
        assert len(runs) <= 1
    if pending and overlap == "skip":
        assert not runs
    if pending == 2 and overlap == "queue_one":
        assert not runs
    if runs and (keep == "last" or (pending and overlap == "replace")):
        assert runs[-1] == max(due)


def test_retries_wait_twice_as_long_each_time() -> None:
    value = schedule(retries={"backoff": "5m"})
    waits = [(retry_at(value, n, DAY) - DAY).total_seconds() / 60 for n in (1, 2, 3)]
    assert waits == [5, 10, 20]


def test_overdue() -> None:
    value = schedule(deadline="2h")
    three = DAY + timedelta(hours=3)
    assert not is_overdue(value, DAY, None, three + timedelta(hours=1))
    assert is_overdue(value, DAY, None, three + timedelta(hours=2, seconds=1))
    assert not is_overdue(value, DAY, three, three + timedelta(hours=25))
    assert is_overdue(value, DAY, three, three + timedelta(hours=27))


@pytest.mark.fault("P13")
@pytest.mark.parametrize(
    ("every", "named"),
    [
        ("61 3 * * *", "minute"), ("0 24 * * *", "hour"), ("0 3 32 * *", "day of the month"),
        ("0 3 * 13 *", "month"), ("0 3 * * 8", "day of the week"), ("* * * *", "five fields"),
        ("0 0 3 * * *", "five fields"), ("*/0 * * * *", "minute"), ("H 3 * * *", "minute"),
        ("0 3 L * *", "day of the month"), ("0 3 30 2 *", "no day fits"), ("@nightly", "@daily"),
        ("0 3 * * funday", "day of the week"), ("", "five fields"), ("a b c d e", "minute"),
        ("0 3 1,, * *", "day of the month"), ("０ 3 * * *", "minute"), ("R * * * *", "minute"),
    ],
)  # fmt: skip
def test_bad_expressions_are_refused_with_their_field(every: str, named: str) -> None:
    with pytest.raises(ConfigError, match="every: ") as found:
        schedule(every=every)
    assert named in str(found.value)


@pytest.mark.fault("P13")
@settings(max_examples=200)
@given(st.text(alphabet="0123456789*/,-LHR@#?janmo \n", max_size=24))
def test_any_text_is_an_expression_with_a_next_time_or_refused(text: str) -> None:
    try:
        value = schedule(every=text)
    except ConfigError:
        return
    assert next_slot(value, DAY) > DAY


def test_a_schedule_is_equal_after_a_round_trip() -> None:
    value = schedule(
        zone="Europe/Berlin", deadline="90m", when={"settle": "10m", "success_file": "_SUCCESS"},
        notify=[{"on": ["failed"], "url_env": "HOOK"}, {"command": ["mail", "x"]}],
    )  # fmt: skip
    assert Schedule.from_json(value.to_json()) == value
    assert value.to_json()["deadline"] == "90m"


def test_files_are_named_from_the_folder_of_the_schedule(tmp_path: Path) -> None:
    plain = {"pipeline": "p.yaml", "overrides": {"task": "t.json", "seed": 3, "x": "y"}}
    text = json.dumps({"name": "s", "every": "@daily", **plain})
    (tmp_path / "s.json").write_text(text)
    found = resolve(str(tmp_path / "s.json"), [Schedule])
    assert found.pipeline == str(tmp_path / "p.yaml")
    assert found.overrides == {"task": str(tmp_path / "t.json"), "seed": 3, "x": "y"}
    assert found.override({}) == Schedule.from_json(found.to_json())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"every": "@daily", "interval": "6h"}, "either `every`"),
        ({"deadline": 8}, "a number with a unit"), ({"deadline": "0s"}, "deadline"),
        ({"interval": "1ms"}, "interval"), ({"zone": "Europe/Berln"}, "no such time zone"),
        ({"zone": "../etc"}, "no such time zone"), ({"pipeline": "--help"}, "pipeline"),
        ({"notify": [{"on": ["failed"]}]}, "either `url_env` or `command`"),
        ({"when": {"success_file": "../x"}}, "success_file"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as found:
        schedule(**values)
    assert named in str(found.value)
