"""Decisions about slots as pure functions: which are due, which run, which are skipped and why."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile

from vinedresser.schedule.cron import cron_times
from vinedresser.schedule.definition import Schedule

# A process that starts for a slot sees a later time than the slot's: longer is a missed slot.
PUNCTUAL = timedelta(minutes=5)


def slots_after(schedule: Schedule, moment: datetime) -> Iterator[datetime]:
    """Yield the slots of a schedule after a moment, in UTC, without end."""
    if schedule.every is not None:
        yield from cron_times(schedule.every, schedule.zone, moment)
    else:
        assert schedule.interval is not None
        size = schedule.interval.total_seconds()
        number = math.floor(moment.timestamp() / size)
        while True:
            number += 1
            found = datetime.fromtimestamp(number * size, UTC)
            if found > moment:
                yield found


def next_slot(schedule: Schedule, moment: datetime) -> datetime:
    """Return the first slot after a moment."""
    return next(slots_after(schedule, moment))


def due_slots(schedule: Schedule, after: datetime, now: datetime) -> list[datetime]:
    """Return the slots after `after`, up to and including now."""
    return list(takewhile(lambda slot: slot <= now, slots_after(schedule, after)))


@dataclass(frozen=True)
class Decision:
    """Decision about one slot, or about several in a row that are skipped for one reason.

    Attributes:
        first: the first slot.
        slot: the last slot.
        count: number of slots.
        reason: reason to skip them; empty for a slot that runs.
    """

    first: datetime
    slot: datetime
    count: int
    reason: str = ""


def decided_slots(
    schedule: Schedule, due: Sequence[datetime], pending: Sequence[datetime], now: datetime
) -> list[Decision]:
    """Decide about due slots by catch-up and overlap; every slot is in exactly one decision.

    Args:
        schedule: its policies.
        due: due slots, increasing.
        pending: slots that were decided to run and have not ended, in the order of their run.
        now: the present time.
    """
    within = max(schedule.catch_up.within, PUNCTUAL)
    late = [slot for slot in due if now - slot > within]
    fresh = list(due[len(late) :])
    made = _skipped(late, "missed: no scheduler was running, and it is too late to catch up")
    if schedule.catch_up.keep == "last" and len(fresh) > 1:
        made += _skipped(fresh[:-1], "missed: no scheduler was running; the newest slot runs")
        fresh = fresh[-1:]
    if not (pending and fresh):
        return made + [Decision(slot, slot, 1) for slot in fresh]
    running, shown = pending[0], written(pending[0])
    if schedule.overlap == "queue_one" and len(pending) == 1:
        made.append(Decision(fresh[0], fresh[0], 1))
        return made + _skipped(fresh[1:], f"overlap: slot {written(fresh[0])} waits already")
    if schedule.overlap == "replace":
        made += _skipped(fresh[:-1], f"overlap: replaced by slot {written(fresh[-1])}")
        return [*made, Decision(fresh[-1], fresh[-1], 1)]
    waiting = pending[-1] if len(pending) > 1 else running
    state = "waits already" if waiting is not running else "has not ended"
    shown = written(waiting)
    return made + _skipped(fresh, f"overlap: slot {shown} {state}")


def _skipped(slots: Sequence[datetime], reason: str) -> list[Decision]:
    return [Decision(slots[0], slots[-1], len(slots), reason)] if slots else []


def written(moment: datetime) -> str:
    """Return a moment as text in UTC: 2026-11-21T03:00:00Z."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds")
    return f"{text}Z"


def retry_at(schedule: Schedule, failures: int, ended: datetime) -> datetime:
    """Return the time of the next attempt after a number of failed ones, at least one."""
    pause: timedelta = schedule.retries.backoff * 2 ** min(failures - 1, 20)
    return ended + pause


def is_overdue(schedule: Schedule, since: datetime, good: datetime | None, now: datetime) -> bool:
    """Return whether a slot has been without a good end for too long.

    Args:
        schedule: its times.
        since: the first moment at which the schedule was active.
        good: the newest slot that ended well; None if there is none.
        now: the present time.
    """
    allowed = schedule.overdue_after or schedule.deadline
    return next_slot(schedule, max(since, good) if good else since) + allowed < now
