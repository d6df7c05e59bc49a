"""Effects of a tick for real: files of the corpus, `retrain` as a child process, notices."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vinedresser.errors import ConfigError, MachineError
from vinedresser.schedule import child
from vinedresser.schedule.definition import Drift, Event, Schedule
from vinedresser.schedule.notify import deliver_notices, enqueue
from vinedresser.schedule.record import Ledger, Record, State
from vinedresser.schedule.tick import Done
from vinedresser.schedule.triggers import (
    PROGRAM,
    Conditions,
    conditions,
    retrain_words,
    warm_start_overrides,
)
from vinedresser.schedule.when import written
from vinedresser.workspace.layout import Workspace
from vinedresser.workspace.storage import POSIX, parsed_object

_log = logging.getLogger(__name__)

_TAIL_BYTES = 4096
_TRACKED_AT_ONCE = 100
# Limit of a process that tidies up after a slot.
_AFTER_SECONDS = 600.0


class PipelineWork:
    """Conditions, runs and notices of one schedule."""

    def __init__(
        self, schedule: Schedule, workspace: Path, *, words: Sequence[str] | None = None
    ) -> None:
        """Args: the schedule, the workspace, and a command other than `retrain` (benchmarks)."""
        self._schedule, self._workspace = schedule, workspace.absolute()
        self._folder = Workspace(self._workspace).schedule(schedule.name)
        self._words = words

    def conditions(self, state: State, now: datetime) -> Conditions:
        """See `Work.conditions`."""
        found = conditions(self._schedule, state, self._folder, self._workspace, now)
        drift = self._schedule.when.drift
        if found.state != "met" or drift is None or not state.has_run:
            return found
        reason = self._small_drift(drift)
        return replace(found, state="unmet", reason=reason) if reason else found

    def run(self, record: Record, *, began: Callable[[str], None], stop: Callable[[], str]) -> Done:
        """See `Work.run`."""
        child.adopt_orphans()
        environment = child.allowed_environment(self._schedule.env)
        environment |= {
            "VINEDRESSER_SLOT": written(record.slot),
            "VINEDRESSER_SCHEDULE": self._schedule.name,
        }
        command = child.Command(
            words=self._words or run_words(self._schedule, self._workspace, record),
            environment=environment,
            output=self._folder.result(record.name),
            log=self._folder.log(record.name),
            deadline=self._schedule.deadline.total_seconds(),
            grace=self._schedule.grace.total_seconds(),
        )
        ended = child.run(command, began=began, stop=stop)
        return Done(ended, _table(command.output), "" if ended.code == 0 else _last(command.log))

    def _small_drift(self, drift: Drift) -> str:
        """Measure the champion on the present corpus; return a reason if it is not much worse."""
        steps = {"steps": ["prepare", "evaluate"]}
        words = retrain_words(self._schedule, self._workspace, changes=steps)
        done = self._child("drift", words, self._schedule.deadline.total_seconds())
        table = _table(self._folder.result("drift"))
        if done.code:
            raise MachineError(f"drift: {self._said('drift')}")
        metric = table.get("scores", {}).get("metric")
        if metric != drift.metric:
            raise ConfigError(f"when.drift.metric: {drift.metric}, the task is scored by {metric}")
        if table["drift"] >= drift.worse_by:
            return ""
        return f"{table['reason']}; a run needs {drift.worse_by:g} points of {metric}"

    def _child(self, name: str, words: Sequence[str], deadline: float) -> child.Ended:
        """Run a command whose output and log have a name, and nothing to stop it early."""
        command = child.Command(
            words=words,
            environment=child.allowed_environment(self._schedule.env),
            output=self._folder.result(name),
            log=self._folder.log(name),
            deadline=deadline,
            grace=self._schedule.grace.total_seconds(),
        )
        return child.run(command, began=lambda _: None, stop=lambda: "")

    def event(self, event: Event, name: str, content: Mapping[str, Any]) -> None:
        """See `Work.event`."""
        enqueue(self._schedule, self._folder, event, name, content)

    def after_tick(self, records: Sequence[Record]) -> None:
        """Send the notices, write slots to the tracking store, and remove what is not kept.

        Args:
            records: slots that the tick has stored.
        """
        now, ledger, keep = datetime.now(UTC), Ledger(self._folder), self._schedule.keep
        deliver_notices(self._schedule, self._folder, now)
        place = ("-w", str(self._workspace))
        if self._schedule.track and not self._words and any(r.attempts for r in untracked(ledger)):
            # In a process of its own: MLflow takes seconds to import.
            words = [*PROGRAM, "schedule", "track", self._schedule.name, *place]
            if self._child("tracking", words, _AFTER_SECONDS).code:
                _log.warning("tracking: %s; a later tick tries again", self._said("tracking"))
        if keep is None:
            return
        if any(record.attempts for record in records):
            days = f"days={keep.runs.days}"
            amounts = (f"top={keep.top}", f"shard_sets={keep.shard_sets}", days)
            if self._child("gc", [*PROGRAM, "gc", *place, *amounts], _AFTER_SECONDS).code:
                _log.warning("gc: %s", self._said("gc"))
        self._forget(ledger, now - keep.runs)

    def _said(self, name: str) -> str:
        return _last(self._folder.log(name))

    def _forget(self, ledger: Ledger, oldest: datetime) -> None:
        """Remove the files of the records of older slots."""
        limit = written(oldest).replace("-", "").replace(":", "")
        for name in ledger.names():
            if name >= limit:
                break
            for folder in (self._folder.slots, self._folder.logs, self._folder.sent):
                for path in (*folder.glob(f"*{name}.*"), folder / f".{name}.json.guard"):
                    path.unlink(missing_ok=True)


def run_words(schedule: Schedule, workspace: Path, record: Record) -> list[str]:
    """Return the command of a slot: `retrain` here, or the same submitted to a cluster.

    A job is named by its slot: a tick that continues after another was killed attaches to it.
    """
    state = Ledger(Workspace(workspace).schedule(schedule.name)).state()
    changes = warm_start_overrides(schedule, state) if state else {}
    words = retrain_words(schedule, workspace, changes=changes)
    if schedule.run.where == "here":
        return words
    place = ["--address", schedule.run.address] if schedule.run.address else []
    slot = f"{schedule.name} {written(record.slot)}"
    return [*PROGRAM, "submit", *place, "--slot", slot, "--", *words[len(PROGRAM) :]]


def untracked(ledger: Ledger) -> list[Record]:
    """Return the newest records that are not in the tracking store, the oldest first."""
    names = [name for name in ledger.names() if not ledger.folder.tracked(name).exists()]
    return [ledger.record(name) for name in names[-_TRACKED_AT_ONCE:]]


def _table(path: Path) -> dict[str, Any]:
    """Return the JSON object of a command's output: all of it, its last line or its last part.

    The log of a job holds messages before the object.
    """
    content = (POSIX.read(path) or b"").strip()
    starts = (0, content.rfind(b"\n") + 1, content.rfind(b"\n{\n") + 1)
    return next(filter(None, (parsed_object(content[start:]) for start in starts)), {})


def _last(path: Path) -> str:
    """Return the last line of a log, of 300 characters at most."""
    with path.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(stream.tell() - _TAIL_BYTES, 0))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return " ".join(lines[-1].split())[:300] if lines else ""
