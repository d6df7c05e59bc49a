"""Records of slots, and the ledger of a schedule that holds them in the workspace.

`state.json` holds the slots that have not ended; every change of it is one conditional write, so
that of several processes one decides about a slot. An ended slot is one file under `slots/`, which
is created once and never changed.
"""

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal, Self, TypeVar

from pydantic import PositiveInt

from vinedresser.config import SafeName, Section
from vinedresser.errors import ConfigError, DamagedError
from vinedresser.schedule.when import written
from vinedresser.workspace.layout import ScheduleFolder
from vinedresser.workspace.storage import POSIX, parsed

_S = TypeVar("_S", bound=Section)

End = Literal["promoted", "kept", "unchanged", "skipped", "failed"]
GOOD: tuple[End, ...] = ("promoted", "kept", "unchanged")


def slot_name(schedule: str, slot: datetime, cause: str = "schedule") -> str:
    """Return the name of a slot's record: names sort by time, and hold a digest of all three."""
    text = written(slot)
    key = hashlib.sha256(f"{schedule} {text} {cause}".encode()).hexdigest()[:12]
    return f"{text.replace('-', '').replace(':', '')}-{key}"


class Value(Section):
    """A section of a record: copies of it differ in some fields."""

    def change(self, **values: Any) -> Self:
        """Return a copy with fields replaced by values that are valid already."""
        return self.model_copy(update=values)


class Attempt(Value):
    """One process that ran for a slot."""

    started: datetime
    # The token of the holder's lease, and the process that ran; see workspace/process.py.
    token: str = ""
    process: str = ""
    ended: datetime | None = None
    code: int | None = None
    reason: str = ""
    seconds: float = 0.0
    # Of all processes of the attempt.
    cpu_seconds: float = 0.0
    peak_mb: float = 0.0


class Record(Value):
    """One slot, or several slots in a row that were skipped for one reason.

    A decided slot is `due`; it may be `waiting` for its data or for a retry, then `running`, and
    has one end.
    """

    schedule: SafeName
    # The last slot of the record, and the first where there are several.
    slot: datetime
    first: datetime
    count: PositiveInt = 1
    cause: Literal["schedule", "manual", "backfill"] = "schedule"
    state: Literal["due", "waiting", "running"] | End = "due"
    reason: str = ""
    decided: datetime
    not_before: datetime | None = None
    ended: datetime | None = None
    attempts: tuple[Attempt, ...] = ()
    # The slot for which a run is to be stopped.
    replaced_by: datetime | None = None
    # Fingerprint of the corpus and of the code at the start of the run, and the rows.
    data: str = ""
    rows: int | None = None
    # The closing table of the pipeline.
    result: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """Identity of the record and name of its files."""
        return slot_name(self.schedule, self.slot, self.cause)

    @property
    def has_ended(self) -> bool:
        """Return True once the record is final."""
        return self.ended is not None


class Pause(Section):
    """Suspension of a schedule until it is resumed."""

    since: datetime
    reason: str


class State(Value):
    """Present state of a schedule.

    Attributes:
        source: import path or file of the schedule.
        times: digest of what defines the slots.
        since: first moment at which the schedule was active.
        through: slots up to this moment were decided.
        open: slots that were decided and are not stored yet, in the order of their run.
        failures: failed slots in a row.
        ends: number of slots per end.
        good: newest slot that ended well.
        good_at: time of the last good end.
        seconds: wall time of the last run that ended well.
        data: fingerprint of the last good run, with its rows.
    """

    source: str = ""
    times: str = ""
    since: datetime
    through: datetime
    open: tuple[Record, ...] = ()
    failures: int = 0
    ends: Mapping[str, int] = {}
    good: datetime | None = None
    good_at: datetime | None = None
    seconds: float = 0.0
    data: str = ""
    rows: int | None = None
    paused: Pause | None = None

    @property
    def has_run(self) -> bool:
        """Return True after the first run that ended well."""
        return self.seconds > 0

    @property
    def pending(self) -> list[Record]:
        """Slots that run or are to run, in their order."""
        return [record for record in self.open if not record.has_ended]

    def with_record(self, record: Record) -> "State":
        """Return the state with an open record replaced by its newer form."""
        return self.change(open=tuple(record if r.name == record.name else r for r in self.open))


class Ledger:
    """State and records of one schedule in a workspace."""

    def __init__(self, folder: ScheduleFolder) -> None:
        self.folder = folder

    def state(self) -> State | None:
        """Return the present state; None before the first tick."""
        return self._read()[0]

    def change(self, change: Callable[[State | None], State]) -> State:
        """Replace the state by a pure function of it; several processes may do so at once.

        Returns:
            The new state, which holds exactly what this call has decided.
        """
        while True:
            before, content = self._read()
            after = change(before)
            text = after.model_dump_json(indent=1) + "\n"
            if after == before or POSIX.replace(self.folder.state, text.encode(), expected=content):
                return after

    def store(self, record: Record) -> bool:
        """Store an ended record; return False if its slot has one already."""
        text = record.model_dump_json(indent=1) + "\n"
        return POSIX.replace(self.folder.slot(record.name), text.encode(), expected=None)

    def has(self, name: str) -> bool:
        """Return whether a record of this name is stored."""
        return self.folder.slot(name).exists()

    def names(self) -> list[str]:
        """Return the names of the stored records, the oldest first."""
        return sorted(path.stem for path in self.folder.slots.glob("[0-9]*.json"))

    def record(self, name: str) -> Record:
        """Read one stored record.

        Raises:
            ConfigError: there is none of this name.
            DamagedError: it is not a record.
        """
        path = self.folder.slot(name)
        content = POSIX.read(path)
        if content is None:
            raise ConfigError(f"{path}: no such record; see `vinedresser schedule show`")
        return _valid(Record, content, str(path))

    def _read(self) -> tuple[State | None, bytes | None]:
        content = POSIX.read(self.folder.state)
        found = None if content is None else _valid(State, content, str(self.folder.state))
        return found, content


def _valid(kind: type[_S], content: bytes, where: str) -> _S:
    try:
        return kind.from_json(parsed(content), where=where)
    except ConfigError as error:
        raise DamagedError(
            f"{error.args[0].splitlines()[0]}; the file is damaged, move it out of the way"
        ) from None
