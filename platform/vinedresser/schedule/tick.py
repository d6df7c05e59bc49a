"""Tick: everything that is due for one schedule, done once; any number may run at any time.

A tick decides about due slots by one conditional write, runs the open slots if no other process
does, stores their ends and sends their notices. Killed at any point, the next tick continues.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from vinedresser.errors import BusyError, VinedresserError
from vinedresser.schedule.child import Ended, end_session
from vinedresser.schedule.definition import Event, Schedule
from vinedresser.schedule.record import GOOD, Attempt, Ledger, Pause, Record, State, slot_name
from vinedresser.schedule.triggers import Conditions
from vinedresser.schedule.when import (
    PUNCTUAL,
    decided_slots,
    due_slots,
    is_overdue,
    retry_at,
    written,
)
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.layout import Workspace
from vinedresser.workspace.lease import Lease, leased

_log = logging.getLogger(__name__)

Clock = Callable[[], datetime]
# Times that a slot is continued after its tick was killed.
_MAX_INTERRUPTIONS = 20


def utc_now() -> datetime:
    """Return the present time in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Done:
    """End of the process of a slot.

    Attributes:
        ended: its code, cost and the reason for which it was stopped.
        table: the closing table of the pipeline, with its verdict.
        message: its last line of standard error.
    """

    ended: Ended
    table: Mapping[str, Any]
    message: str = ""


class Work(Protocol):
    """Effects of a tick: conditions of a slot, its run, and what follows its end."""

    def conditions(self, state: State, now: datetime) -> Conditions:
        """Evaluate the conditions of a due slot."""
        ...

    def run(self, record: Record, *, began: Callable[[str], None], stop: Callable[[], str]) -> Done:
        """Run the pipeline for a slot; see `child.run`."""
        ...

    def event(self, event: Event, name: str, content: Mapping[str, Any]) -> None:
        """Note an event for its receivers; one of the same name again has no effect."""
        ...


def planned(
    schedule: Schedule, state: State | None, now: datetime, *, has: Callable[[str], bool]
) -> State:
    """Return the state after the decisions about all slots that are due.

    Args:
        schedule: times and policies.
        state: present state; None before the first tick.
        now: the present time. Where the clock was set back, slots with a record stay as they are.
        has: return whether a record of a name is stored.
    """
    times = digest_of([schedule.every, written_interval(schedule), schedule.zone])
    if state is None:  # the slot for which the first tick was started counts
        last = due_slots(schedule, now - PUNCTUAL, now)[-1:]
        start = last[0] - timedelta(microseconds=1) if last else now
        state = State(since=now, through=start, times=times)
    through = min(state.through, now)
    if state.times != times:  # other slots from now on
        through = max(through, now - PUNCTUAL)
    known = {record.name for record in state.open}

    def fresh(slot: datetime) -> Record:
        return Record(schedule=schedule.name, slot=slot, first=slot, decided=now)

    found = due_slots(schedule, through, now)
    names = [slot_name(schedule.name, slot) for slot in found]
    due = [
        slot for slot, name in zip(found, names, strict=True) if name not in known and not has(name)
    ]
    state = state.change(times=times, through=found[-1] if found else through)
    if not due:
        return state
    if state.paused is not None:
        reason = f"paused since {written(state.paused.since)}: {state.paused.reason}"
        skipped = fresh(due[-1]).change(
            first=due[0], count=len(due), state="skipped", reason=reason, ended=now
        )
        return state.change(open=(*state.open, skipped))
    pending = state.pending
    for decision in decided_slots(schedule, due, [record.slot for record in pending], now):
        record = fresh(decision.slot).change(first=decision.first, count=decision.count)
        if decision.reason:
            record = record.change(state="skipped", reason=decision.reason, ended=now)
        elif schedule.overlap == "replace":
            for old in pending:
                state = state.with_record(old.change(replaced_by=decision.slot))
        state = state.change(open=(*state.open, record))
    return state


def written_interval(schedule: Schedule) -> float | None:
    """Return the interval of a schedule in seconds; None for one of cron."""
    return schedule.interval.total_seconds() if schedule.interval else None


def after_process(schedule: Schedule, record: Record, done: Done, now: datetime) -> Record:
    """Return a running record after its process has ended: its end, or the time of a retry."""
    ended = done.ended
    attempt = record.attempts[-1].change(
        ended=now, code=ended.code, seconds=round(ended.seconds, 3),
        cpu_seconds=round(ended.cpu_seconds, 3), peak_mb=round(ended.peak_mb, 1),
        reason=ended.stopped or done.message,
    )  # fmt: skip
    record = record.change(attempts=(*record.attempts[:-1], attempt), result=dict(done.table))
    verdict = done.table.get("verdict")
    if ended.code == 0 and verdict in GOOD:
        return record.change(state=verdict, reason=str(done.table.get("reason", "")), ended=now)
    if record.replaced_by is not None and ended.stopped:
        reason = f"overlap: stopped for slot {written(record.replaced_by)}"
        return record.change(state="skipped", reason=reason, ended=now)
    if ended.code == 0:
        reason = "the pipeline ended without a verdict; see its output"
    else:
        reason = ended.stopped or f"exit code {ended.code}: {done.message or 'no message'}"
    failures = sum(1 for old in record.attempts if old.code not in (None, 0))
    is_worth_it = ended.code in schedule.retries.codes and not ended.stopped
    if is_worth_it and failures <= schedule.retries.times:
        again = retry_at(schedule, failures, now)
        return record.change(state="waiting", reason=reason, not_before=again)
    return record.change(state="failed", reason=reason, ended=now)


def closed(schedule: Schedule, state: State, record: Record) -> State:
    """Return the state without an ended record, which is stored; a row of failures pauses it."""
    ends = {**state.ends, record.state: state.ends.get(record.state, 0) + record.count}
    state = state.change(open=tuple(r for r in state.open if r.name != record.name), ends=ends)
    if record.state in GOOD:
        good = max(filter(None, (state.good, record.slot)))
        state = state.change(failures=0, good=good, good_at=record.ended)
        if record.attempts:
            seconds = sum(attempt.seconds for attempt in record.attempts)
            state = state.change(data=record.data, rows=record.rows, seconds=seconds)
    if record.state == "failed":
        state = state.change(failures=state.failures + 1)
        limit = schedule.retries.pause_after
        if limit and state.failures >= limit and state.paused is None and record.ended:
            reason = f"{state.failures} slots in a row failed; the last: {record.reason}"
            state = state.change(paused=Pause(since=record.ended, reason=reason))
    return state


class Ticker:
    """Ticks of one schedule in a workspace."""

    def __init__(
        self,
        schedule: Schedule,
        workspace: Path,
        work: Work,
        *,
        source: str = "",
        clock: Clock = utc_now,
    ) -> None:
        """Args: the schedule with its name on the command line, effects, and a clock."""
        self.schedule, self.work, self.clock, self._source = schedule, work, clock, source
        self.ledger = Ledger(Workspace(workspace.absolute()).schedule(schedule.name))

    def tick(self) -> list[Record]:
        """Decide, run and store; return the records that this call has stored."""
        state = self.ledger.state()
        now = self.clock()
        after = planned(self.schedule, state, now, has=self.ledger.has)
        if after != state or self._source != after.source:
            after = self.ledger.change(
                lambda old: planned(self.schedule, old, now, has=self.ledger.has).change(
                    source=self._source or (old.source if old else "")
                )
            )
        stored: list[Record] = []
        self._store(after, stored)
        if any(record.has_ended for record in after.open):
            after = _existing(self.ledger.state())
        # A slot may be decided between the end of the last run and the release of the lease.
        while self._next(after) is not None:
            try:
                with leased(self.ledger.folder.lease, f"schedule {self.schedule.name}") as lease:
                    while record := self._next(self.ledger.state()):
                        self._advance(record, lease)
                        self._store(self.ledger.state(), stored)
            except BusyError:
                break  # its holder runs the slots
            after = _existing(self.ledger.state())
        self._alert(after)
        return stored

    def _alert(self, state: State) -> None:
        """Note the events that belong to no slot."""
        if state.paused:
            since = written(state.paused.since)
            self.work.event("paused", since, {"since": since, "reason": state.paused.reason})
        if is_overdue(self.schedule, state.since, state.good, self.clock()):
            good = written(state.good or state.since)
            self.work.event("overdue", good, {"reason": f"no slot after {good} has ended well"})

    def _next(self, state: State | None) -> Record | None:
        """Return the first open slot if it can go on now: slots run in their order."""
        first = next(iter(state.pending if state else ()), None)
        if first is None or first.replaced_by is not None or first.not_before is None:
            return first
        return first if first.not_before <= self.clock() else None

    def _update(self, record: Record) -> None:
        self.ledger.change(lambda state: _existing(state).with_record(record))

    def _advance(self, record: Record, lease: Lease) -> None:
        """Bring the first open slot one step further, as the holder of the lease."""
        now = self.clock()
        if record.state == "running":  # by a process that died
            record = self._interrupted(record, now)
        if record.replaced_by is not None:
            reason = f"overlap: replaced by slot {written(record.replaced_by)}"
            return self._update(record.change(state="skipped", reason=reason, ended=now))
        if len(record.attempts) > _MAX_INTERRUPTIONS + self.schedule.retries.times:
            reason = f"interrupted {_MAX_INTERRUPTIONS} times; see the log of the slot"
            return self._update(record.change(state="failed", reason=reason, ended=now))
        try:
            found = self.work.conditions(_existing(self.ledger.state()), now)
        except VinedresserError as error:
            return self._unreadable(record, error, now)
        is_first = record.cause == "schedule" and not record.attempts
        if is_first and found.state == "unmet":
            ended = record.change(state="unchanged", reason=found.reason, ended=now)
            return self._update(ended)
        if is_first and found.state == "wait":
            return self._update(self._waiting(record, found.reason, now))
        attempt = Attempt(started=now, token=lease.token)
        record = record.change(
            state="running", reason="", not_before=None, data=found.data, rows=found.rows,
            attempts=(*record.attempts, attempt),
        )  # fmt: skip
        self._update(record)
        return self._run(record, lease)

    def _run(self, record: Record, lease: Lease) -> None:
        attempt = record.attempts[-1]
        _log.info("%s: slot %s runs", self.schedule.name, written(record.slot))

        def began(process: str) -> None:
            self._update(
                record.change(attempts=(*record.attempts[:-1], attempt.change(process=process)))
            )

        def present() -> Record:
            return next(r for r in _existing(self.ledger.state()).open if r.name == record.name)

        def stop() -> str:
            replaced = present().replaced_by
            if not lease.is_current():
                return "another process has taken the schedule over"
            return f"replaced by slot {written(replaced)}" if replaced else ""

        done = self.work.run(record, began=began, stop=stop)
        lease.require_current()
        self._update(after_process(self.schedule, present(), done, self.clock()))

    def _interrupted(self, record: Record, now: datetime) -> Record:
        """Note that the tick of a running slot died, and end what is left of its session."""
        last = record.attempts[-1]
        end_session(last.process, grace=0.0)
        _log.info("%s: slot %s continues", self.schedule.name, written(record.slot))
        last = last.change(ended=now, reason="interrupted")
        return record.change(attempts=(*record.attempts[:-1], last))

    def _waiting(self, record: Record, reason: str, now: datetime) -> Record:
        """Return a slot that waits for its data, or its end after the catch-up window."""
        if now - record.slot > max(self.schedule.catch_up.within, PUNCTUAL):
            return record.change(state="skipped", reason=reason, ended=now)
        pause = min(timedelta(seconds=10), self.schedule.when.settle or timedelta(seconds=10))
        return record.change(state="waiting", reason=reason, not_before=now + pause)

    def _unreadable(self, record: Record, error: VinedresserError, now: datetime) -> None:
        """End an attempt whose conditions cannot be evaluated, as its process would end."""
        attempts = (*record.attempts, Attempt(started=now))
        done = Done(Ended(error.exit_code, "", 0.0, 0.0, 0.0), {}, error.args[0].splitlines()[0])
        self._update(after_process(self.schedule, record.change(attempts=attempts), done, now))

    def _store(self, state: State | None, stored: list[Record]) -> None:
        """Store ended records, act on their ends, and remove them from the state."""
        for record in state.open if state else ():
            if record.has_ended:
                if self.ledger.store(record):
                    stored.append(record)
                    _log.info(
                        "%s: slot %s %s%s", record.schedule, written(record.slot), record.state,
                        f": {record.reason}" if record.reason else "",
                    )  # fmt: skip
                self.work.event(record.state, record.name, record.to_json())  # type: ignore[arg-type] # an ended record's state is an event
                self._close(record)

    def _close(self, record: Record) -> None:
        """Remove a stored record from the state, unless another process has done so."""

        def without(state: State | None) -> State:
            found = _existing(state)
            is_open = any(r.name == record.name for r in found.open)
            return closed(self.schedule, found, record) if is_open else found

        self.ledger.change(without)


def _existing(state: State | None) -> State:
    assert state is not None  # it is written before anything runs, and never removed
    return state
