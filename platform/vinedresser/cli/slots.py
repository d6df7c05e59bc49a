"""Slots of schedules as a person reads them: tables, JSON, and runs of the tracking store."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vinedresser.cli.progress import duration
from vinedresser.cli.render import print_json, print_table
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.record import Ledger, Record, State
from vinedresser.schedule.when import is_overdue, next_slot, written
from vinedresser.schedule.work import untracked
from vinedresser.workspace.layout import SpoolFolder, Workspace


def print_records(records: Sequence[Record], *, as_json: bool) -> None:
    """Print records as JSON or as a table."""
    if as_json:
        return print_json([record.to_json() for record in records])
    return print_slots(records)


def summary_of(schedule: Schedule, state: State) -> dict[str, Any]:
    """Return the present state of a schedule as plain JSON."""
    now = datetime.now(UTC)
    first = next(iter(state.pending), None)
    is_late = is_overdue(schedule, state.since, state.good, now)
    word = "paused" if state.paused else first.state if first else "overdue" if is_late else "idle"
    return {
        "state": word,
        "reason": state.paused.reason if state.paused else first.reason if first else "",
        "slot": written(first.slot) if first else None,
        "last_good": written(state.good) if state.good else None,
        "next": written(next_slot(schedule, now)),
        "failures": state.failures,
        "overdue": is_late,
        "ends": dict(state.ends),
    }


def print_slots(records: Sequence[Record]) -> None:
    """Print a table of records."""
    rows = []
    for record in records:
        seconds = sum(attempt.seconds for attempt in record.attempts)
        cpu = sum(attempt.cpu_seconds for attempt in record.attempts)
        count = f" ({record.count} slots)" if record.count > 1 else ""
        rows.append((
            f"{written(record.slot)}{count}", record.state, _scores(record),
            duration(seconds) if record.attempts else "",
            duration(cpu) if record.attempts else "",
            str(len(record.attempts) or ""), record.reason,
        ))  # fmt: skip
    columns = ["slot", "end", "score (champion)", ">time", ">CPU", ">tries", "reason"]
    print_table(columns, rows)


def _scores(record: Record) -> str:
    """Return the challenger's score with the champion's, as `per 12.34 (12.50)`."""
    table = record.result
    scores = table.get("scores")
    if not isinstance(scores, dict) or scores.get("challenger") is None:
        return ""
    champion = scores.get("champion")
    behind = f" ({champion:.2f})" if isinstance(champion, int | float) else ""
    return f"{table.get('metric', '')} {scores['challenger']:.2f}{behind}"


def track_slots(schedule: Schedule, ledger: Ledger, workspace: Path) -> None:
    """Write the records that are not in the tracking store to it."""
    from vinedresser.tracking import initialise, open_run, store_for

    store = store_for(workspace, "schedules")
    initialise(store)
    for record in untracked(ledger):
        tracker = open_run(
            store,
            SpoolFolder(Workspace(workspace.absolute()).tracking / f"slot-{record.name}"),
            key=f"slot-{record.name}",
            params={"pipeline": schedule.pipeline, "overrides": dict(schedule.overrides)},
            tags={
                "mlflow.runName": f"{schedule.name} {written(record.slot)}",
                "vinedresser.kind": "slot",
                "vinedresser.schedule": schedule.name,
                "vinedresser.verdict": record.state,
                "mlflow.note.content": f"{record.state}: {record.reason}",
            },
        )
        numbers = {
            key: float(number)
            for key, number in {**record.result, **_compared(record)}.items()
            if isinstance(number, int | float)
        }
        costs = {
            "wall_seconds": sum(attempt.seconds for attempt in record.attempts),
            "cpu_seconds": sum(attempt.cpu_seconds for attempt in record.attempts),
            "attempts": len(record.attempts),
        }
        tracker.log({**numbers, **costs}, 1)
        tracker.text(json.dumps(record.to_json(), indent=1) + "\n", "slot.json")
        tracker.close("FAILED" if record.state == "failed" else "FINISHED", record.reason)
        # What the store did not take waits in the spool.
        ledger.folder.tracked(record.name).touch()


def _compared(record: Record) -> dict[str, Any]:
    """Return the scores that the gate compared, by name."""
    scores = record.result.get("scores")
    names = ("challenger", "champion")
    return {f"score/{k}": scores.get(k) for k in names} if isinstance(scores, dict) else {}
