"""Schedule: when and under which conditions a pipeline runs, as one value."""

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from vinedresser.config import MetricName, SafeName, Section
from vinedresser.schedule.cron import checked_cron

# One form of a model's name: the part before @ is a SafeName.
_CHAMPION = r"^models:/[A-Za-z0-9][A-Za-z0-9._-]{0,127}@champion$"
CONFIGURATION_FILES = (".yaml", ".yml", ".json")
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}

# Good ends of a slot, other ends, and the two events that belong to no end.
Event = Literal["promoted", "kept", "unchanged", "skipped", "failed", "overdue", "paused"]


def read_duration(value: Any) -> Any:
    """Return the time of `90s`, `10m`, `6h` or `30d`; another value as it is."""
    if not isinstance(value, str):
        if isinstance(value, int | float):
            raise ValueError("expected a number with a unit, as 90s, 10m, 6h or 30d")  # noqa: TRY004
        return value
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", value)
    if not found:
        raise ValueError("expected a number with a unit, as 90s, 10m, 6h or 30d")
    seconds = float(found[1]) * _UNITS[found[2]]
    if seconds > 100 * 366 * 86400:
        raise ValueError("expected 100 years at most")
    return timedelta(seconds=seconds)


def written_duration(value: timedelta) -> str:
    """Return a time in its largest whole unit: 6h, 90s."""
    seconds = value.total_seconds()
    unit = next((unit for unit, size in _UNITS.items() if seconds and seconds % size == 0), "s")
    return f"{seconds / _UNITS[unit]:g}{unit}"


Duration = Annotated[
    timedelta,
    Field(ge=timedelta(0)),
    BeforeValidator(read_duration),
    PlainSerializer(written_duration),
]


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError("no such time zone; expected one as UTC or Europe/Berlin") from None
    return name


def _from_its_folder(value: Any, info: ValidationInfo) -> Any:
    """Resolve the name of a configuration file against the folder of the schedule's file."""
    base = (info.context or {}).get("base")
    if base and isinstance(value, str) and value.endswith(CONFIGURATION_FILES):
        return str(Path(base) / value)
    return value


FileOrValue = Annotated[Any, AfterValidator(_from_its_folder)]


class CatchUp(Section):
    """Treatment of slots that passed while no scheduler was running."""

    # `last`: the newest of them runs; `all`: each runs, the oldest first.
    keep: Literal["last", "all"] = "last"
    # Slots older than this are skipped.
    within: Duration = timedelta(hours=12)


class Drift(Section):
    """Loss of quality of the champion on fresh data that is the condition of a run."""

    # The task's own metric; the model is that of the pipeline.
    metric: MetricName
    # Points of the metric, towards the worse.
    worse_by: NonNegativeFloat


class When(Section):
    """Conditions of a due slot; all of them must hold."""

    # `changed`: the corpus, the code of the pipeline or the schedule differs from the last good
    # run, by size and time of each file. `any`: every slot runs.
    data: Literal["any", "changed"] = "changed"
    # Rows more than at the last good run.
    min_new_rows: NonNegativeInt = 0
    # The newest file must be unchanged for this long.
    settle: Duration = timedelta(0)
    # A file of this name in each folder of the corpus, not older than the others in it.
    success_file: Annotated[str, Field(pattern=r"^[^/\x00]{0,255}$")] = ""
    # Measured by decoding, after all other conditions and after the first good run.
    drift: Drift | None = None


class Retries(Section):
    """Repetition of a failed run."""

    # Exit codes that are worth another attempt: 3 environment, 75 try again later.
    codes: tuple[Annotated[int, Field(ge=-64, le=255)], ...] = (3, 75)
    times: NonNegativeInt = 3
    # Before the first retry; doubles each time.
    backoff: Duration = timedelta(minutes=5)
    # Failed slots in a row after which the schedule is paused; 0 never pauses it.
    pause_after: NonNegativeInt = 3


class Notice(Section):
    """A receiver of events: a webhook, or a command that gets the event as JSON on its stdin."""

    on: tuple[Event, ...] = ("failed", "promoted", "overdue", "paused")
    # Name of the environment variable that holds the URL, which is a secret.
    url_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")] | None = None
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _has_one_receiver(self) -> Self:
        if (self.url_env is None) == (self.command is None):
            raise ValueError("give either `url_env` or `command`")
        return self


class Keep(Section):
    """Results to keep in the workspace: `gc` runs after each slot that ran, and removes others."""

    # Shard sets of each task, the last used ones.
    shard_sets: PositiveInt = 3
    # Runs outside of sweeps, and records, logs and notices of slots; at least a day.
    runs: Annotated[Duration, Field(ge=timedelta(days=1))] = timedelta(days=30)
    # Models of each sweep.
    top: PositiveInt = 10


class Place(Section):
    """Machine that runs the pipeline."""

    # `here`: a child process; `ray_job`: a Ray job, by `vinedresser submit`.
    where: Literal["here", "ray_job"] = "here"
    address: str | None = None
    image: str | None = None


class Schedule(Section):
    """A pipeline with the times and conditions of its runs."""

    name: SafeName
    # Import path or file of a pipeline, and dotted keys that replace values in it.
    pipeline: Annotated[
        str,
        Field(min_length=1, pattern=r"^[^-\x00][^\x00]*$"),
        AfterValidator(_from_its_folder),
    ]
    overrides: Mapping[str, FileOrValue] = {}
    # Either a cron expression of five fields or @daily and the like, in the time zone, ...
    every: Annotated[str, AfterValidator(checked_cron)] | None = None
    # ... or a time between slots, which are multiples of it since 1970 in UTC.
    interval: Annotated[Duration, Field(ge=timedelta(seconds=1))] | None = None
    # A time that does not exist is replaced by the next one that does; a repeated one counts once.
    zone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
    # Slots during a run: skip them, let one wait, or stop the run for the newest.
    overlap: Literal["skip", "queue_one", "replace"] = "skip"
    catch_up: CatchUp = CatchUp()
    when: When = When()
    # After the first good run: train on from the champion in the place of sweep and finalist.
    warm_start: Annotated[str, Field(pattern=_CHAMPION)] | None = None
    # Wall time of one attempt; then SIGTERM, and SIGKILL after the grace period.
    deadline: Annotated[Duration, Field(gt=timedelta(0))] = timedelta(hours=8)
    grace: Duration = timedelta(seconds=30)
    # Time without a good end after a slot, after which the schedule is overdue; the deadline by
    # default.
    overdue_after: Duration | None = None
    retries: Retries = Retries()
    run: Place = Place()
    # Names of environment variables that the run gets in addition to the allow-list.
    env: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")], ...] = ()
    notify: tuple[Notice, ...] = ()
    # Each slot is a run of the tracking store, written after a run of the pipeline.
    track: bool = True
    keep: Keep | None = None

    @model_validator(mode="after")
    def _has_one_clock(self) -> Self:
        if (self.every is None) == (self.interval is None):
            raise ValueError("give either `every` (cron) or `interval` (as 6h)")
        return self
