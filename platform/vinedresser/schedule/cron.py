"""Cron expressions: five fields, in a time zone, without the traps of a change of clocks."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

_FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")
_NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_NAMES = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|sun|mon|tue|wed|thu|fri|sat"
# croniter also reads random (R), hashed (H) and last (L) values, which cron has not.
_FIELD = re.compile(rf"(?:[0-9*,/-]|{_NAMES})+", re.ASCII | re.IGNORECASE)
_MAX_LENGTH = 200


def checked_cron(text: str) -> str:
    """Return an expression that has five fields and a next time.

    Raises:
        ValueError: with the field.
    """
    if text.startswith("@"):
        if text not in _NICKNAMES:
            raise ValueError(f"expected one of {', '.join(_NICKNAMES)}, or five fields of cron")
        return text
    fields = text.split()
    if len(fields) != len(_FIELDS) or len(text) > _MAX_LENGTH:
        raise ValueError(f"expected five fields ({', '.join(_FIELDS)}), as 0 3 * * *")
    for number, (field, name) in enumerate(zip(fields, _FIELDS, strict=True)):
        alone = ["*"] * len(_FIELDS)
        alone[number] = field
        if not (_FIELD.fullmatch(field) and _has_time(" ".join(alone))):
            raise ValueError(f"the field {name} is {field!r}, which is not of cron")
    if not _has_time(" ".join(fields)):
        raise ValueError("no day fits the expression, as 30 February; change day or month")
    return text


def _has_time(expression: str) -> bool:
    from croniter import croniter

    try:
        croniter(expression, datetime(2024, 1, 1)).get_next(datetime)
    except (ValueError, OverflowError, KeyError, IndexError, TypeError):
        return False
    return True


def cron_times(expression: str, zone: str, after: datetime) -> Iterator[datetime]:
    """Yield the times of an expression after a moment, increasing, in UTC.

    A local time in a gap becomes the first moment after the gap; of a repeated one the first is
    taken. Times that fall together count once.
    """
    from croniter import croniter

    local = ZoneInfo(zone)
    start = after.astimezone(local).replace(tzinfo=None)
    clock = croniter(_NICKNAMES.get(expression, expression), start)
    last = after
    while True:
        found = _first_moment(clock.get_next(datetime), local)
        if found > last:
            last = found
            yield found


def _first_moment(time: datetime, zone: ZoneInfo) -> datetime:
    """Return a local time in UTC; of one that does not exist, the end of the gap."""
    late = time.replace(tzinfo=zone).astimezone(UTC)
    if late.astimezone(zone).replace(tzinfo=None) == time:
        return late
    early = time.replace(tzinfo=zone, fold=1).astimezone(UTC)
    before = early.astimezone(zone).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + (late - early) // 2
        if middle.astimezone(zone).utcoffset() == before:
            early = middle
        else:
            late = middle
    return late.replace(microsecond=0)
