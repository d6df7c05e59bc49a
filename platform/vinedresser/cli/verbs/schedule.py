"""`schedule`: run pipelines at their times, one at a time; records, pauses and checks."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vinedresser.cli.arguments import HERE, AsJson, Overrides, WorkspaceFolder
from vinedresser.cli.render import print_json, print_lines, print_table
from vinedresser.config import parse_overrides, resolve
from vinedresser.errors import BusyError, ConfigError, MachineError, TrainingError
from vinedresser.workspace.layout import Workspace

if TYPE_CHECKING:
    from vinedresser.schedule.definition import Schedule
    from vinedresser.schedule.record import Ledger, Record, State

app = typer.Typer(help="Run pipelines at their times, one at a time, with a record per slot.")

ScheduleName = Annotated[
    str,
    typer.Argument(
        metavar="SCHEDULE", help="import path or file of a schedule, or its name in the workspace"
    ),
]
Moment = Annotated[str, typer.Option(help="time in UTC, as 2026-11-21T03:00")]


def _find(
    name: str, overrides: list[str] | None, workspace: Path
) -> tuple["Schedule", "Ledger", str]:
    """Return a schedule, its ledger, and its name on the command line."""
    try:
        from vinedresser.schedule.definition import Schedule
        from vinedresser.schedule.record import Ledger

        source = name
        place = Workspace(workspace.absolute())
        if place.schedule(name).state.is_file():
            state = Ledger(place.schedule(name)).state()
            source = state.source if state and state.source else name
        schedule = resolve(source, [Schedule]).override(parse_overrides(overrides or []))
    except ModuleNotFoundError as error:
        raise MachineError(
            f"schedules need {error.name}; install it with: pip install 'vinedresser[schedule]'"
        ) from None
    if Path(source).is_file():
        source = str(Path(source).resolve())
    return schedule, Ledger(place.schedule(schedule.name)), source


def _tick(schedule: "Schedule", source: str, workspace: Path) -> list["Record"]:
    from vinedresser.schedule.tick import Ticker
    from vinedresser.schedule.work import PipelineWork

    work = PipelineWork(schedule, workspace)
    records: list[Record] = []
    try:
        records = Ticker(schedule, workspace, work, source=source).tick()
    finally:
        work.after_tick(records)
    return records


@app.command()
def tick(
    schedule: ScheduleName,
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code", help="end with the code of a slot that failed now; 75 while one waits"
        ),
    ] = False,
) -> None:
    """Do once what is due for a schedule: run, retry, continue, record, notify.

    May be called at any time and by any number of processes; to be called every minute or so.
    """
    from vinedresser.cli.slots import print_records

    value, ledger, source = _find(schedule, overrides, workspace)
    records = _tick(value, source, workspace)
    print_records(records, as_json=as_json)
    if exit_code:
        state = ledger.state()
        code = BusyError.exit_code if state is not None and state.pending else 0
        for record in records:
            if record.state == "failed":  # by a signal, or without a verdict: as a failed run
                code = max(record.attempts[-1].code or 0, 0) or TrainingError.exit_code
        raise typer.Exit(code)


@app.command()
def serve(
    schedules: Annotated[list[str], typer.Argument(metavar="SCHEDULE...", help="see `tick`")],
    workspace: WorkspaceFolder = HERE,
    host: Annotated[str, typer.Option(help="address of metrics and health")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of /metrics and /health; -1 for none")] = 9464,
) -> None:
    """Tick schedules at their times until SIGTERM or Ctrl-C."""
    found = [_find(name, None, workspace) for name in schedules]
    names = [value.name for value, _, _ in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"{', '.join(sorted(names))}: a name occurs twice; rename a schedule")
    from vinedresser.schedule import serve as serving
    from vinedresser.schedule.triggers import PROGRAM

    each = serving.served([(value, source) for value, _, source in found], workspace)
    folder = str(workspace.absolute())
    server = serving.Server(each, lambda one: [*PROGRAM, "schedule", "tick", one.source,
                                               "-w", folder])  # fmt: skip
    http = serving.metrics_server(server, each, host, port) if port >= 0 else None
    if http is not None:
        print_lines(f"metrics and health on http://{host}:{http.server_port}")
        sys.stdout.flush()
    server.run()


@app.command("ls")
def list_(workspace: WorkspaceFolder = HERE, as_json: AsJson = False) -> None:
    """List the schedules of the workspace, with their last and next slots."""
    from vinedresser.cli.slots import summary_of

    rows: list[dict[str, Any]] = []
    folder = Workspace(workspace.absolute()).schedules
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        value, ledger, source = _find(path.name, None, workspace)
        state = ledger.state()
        if state is not None:
            rows.append({"schedule": value.name, "source": source, **summary_of(value, state)})
    if as_json:
        return print_json(rows)
    columns = ("schedule", "source", "state", "last_good", "next", "failures")
    return print_table(
        [column.replace("_", " ") for column in columns],
        [tuple(str(row[column] or "") for column in columns) for row in rows],
    )


@app.command()
def show(
    schedule: ScheduleName,
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    last: Annotated[int, typer.Option(min=1, help="number of records")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show the last slots of a schedule: verdict, scores, duration, cost and reason."""
    from vinedresser.cli.slots import print_slots, summary_of

    value, ledger, _ = _find(schedule, overrides, workspace)
    state = ledger.state()
    records = [ledger.record(name) for name in ledger.names()[-last:]]
    summary = summary_of(value, state) if state else {"state": "new"}
    if as_json:
        shown = [*records, *(state.open if state else ())]
        return print_json({**summary, "records": [record.to_json() for record in shown]})
    reason = f": {summary['reason']}" if summary.get("reason") else ""
    print_lines(f"{value.name}: {summary['state']}{reason}; next slot {summary.get('next', '')}")
    return print_slots([*records, *(state.open if state else ())])


@app.command()
def pause(
    schedule: ScheduleName,
    workspace: WorkspaceFolder = HERE,
    reason: Annotated[str, typer.Option(help="for the records")] = "by command",
) -> None:
    """Skip the slots of a schedule until `resume`; a running slot continues."""
    from vinedresser.schedule.record import Pause

    value, ledger, _ = _find(schedule, None, workspace)
    since = datetime.now(UTC)
    ledger.change(lambda old: _known(old, value).change(paused=Pause(since=since, reason=reason)))
    print_lines(f"{value.name}: paused")


@app.command()
def resume(schedule: ScheduleName, workspace: WorkspaceFolder = HERE) -> None:
    """End a pause; slots that passed meanwhile stay skipped."""
    value, ledger, _ = _find(schedule, None, workspace)
    ledger.change(lambda old: _known(old, value).change(paused=None, failures=0))
    print_lines(f"{value.name}: resumed")


def _known(state: "State | None", schedule: "Schedule") -> "State":
    if state is None:
        raise ConfigError(
            f"{schedule.name}: has no state in this workspace; run `vinedresser schedule tick`"
        )
    return state


@app.command("run-now")
def run_now(
    schedule: ScheduleName,
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Run a schedule's pipeline now, whatever its times and conditions."""
    now = datetime.now(UTC).replace(microsecond=0)
    _run_slots(schedule, overrides, workspace, lambda _: [now], cause="manual", as_json=as_json)


@app.command()
def backfill(
    schedule: ScheduleName,
    start: Annotated[str, typer.Option("--from", help="time in UTC, as 2026-11-21T03:00")],
    end: Annotated[str, typer.Option("--to", help="time in UTC; included")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
) -> None:
    """Run the slots of a span of time that have no run, whatever their conditions."""
    first, last = (_moment(text) for text in (start, end))

    def slots(value: "Schedule") -> list[datetime]:
        from vinedresser.schedule.when import due_slots

        if last > datetime.now(UTC) or first > last:
            raise ConfigError(f"--from {start} --to {end}: expected a span of the past")
        return due_slots(value, first - timedelta(microseconds=1), last)

    _run_slots(schedule, overrides, workspace, slots, cause="backfill", as_json=False)


def _moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{text}: expected a time, as 2026-11-21T03:00") from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _run_slots(
    name: str,
    overrides: list[str] | None,
    workspace: Path,
    slots: Any,
    *,
    cause: Any,
    as_json: bool,
) -> None:
    """Add slots to the open ones and tick."""
    from vinedresser.cli.slots import print_records
    from vinedresser.schedule.record import Record
    from vinedresser.schedule.when import written

    value, ledger, source = _find(name, overrides, workspace)
    now = datetime.now(UTC)
    wanted = [
        Record(schedule=value.name, slot=slot, first=slot, cause=cause, decided=now)
        for slot in slots(value)
    ]
    new = [
        record for record in wanted if not ledger.has(record.name) and not _has_run(ledger, record)
    ]

    def with_slots(old: "State | None") -> "State":
        from vinedresser.schedule.tick import planned

        state = planned(value, old, now, has=ledger.has)
        if cause == "manual" and state.pending:
            busy = state.pending[0]
            raise BusyError(f"{value.name}: slot {written(busy.slot)} is {busy.state}; wait for it")
        names = {record.name for record in state.open}
        return state.change(
            source=source, open=(*state.open, *(r for r in new if r.name not in names))
        )

    if new:
        ledger.change(with_slots)
    print_records(_tick(value, source, workspace), as_json=as_json)


def _has_run(ledger: "Ledger", record: "Record") -> bool:
    """Return whether the slot of a record ran at its own time."""
    own = record.change(cause="schedule")
    return ledger.has(own.name) and bool(ledger.record(own.name).attempts)


@app.command()
def check(
    schedules: Annotated[list[str], typer.Argument(metavar="SCHEDULE...", help="see `tick`")],
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """End with code 4 if a schedule is overdue or was paused by failures; for a monitor."""
    from vinedresser.cli.slots import summary_of

    rows = []
    for name in schedules:
        value, ledger, _ = _find(name, None, workspace)
        state = ledger.state()
        summary = summary_of(value, state) if state else {"state": "new", "overdue": True}
        rows.append({"schedule": value.name, **summary})
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            good = f"last good slot {row['last_good']}" if row.get("last_good") else "no good slot"
            print_lines(f"{row['schedule']}: {row['state']}, {good}")
    if any(row["overdue"] or (row["state"] == "paused" and row["failures"]) for row in rows):
        raise typer.Exit(4)


@app.command()
def track(schedule: ScheduleName, workspace: WorkspaceFolder = HERE) -> None:
    """Write ended slots to the tracking store, one run per slot; a tick does it after a run."""
    from vinedresser.cli.slots import track_slots

    value, ledger, _ = _find(schedule, None, workspace)
    track_slots(value, ledger, workspace)


@app.command()
def emit(
    schedule: ScheduleName,
    pods: Annotated[
        list[str] | None,
        typer.Argument(help="key=value options of pods, as image=", metavar="[KEY=VALUE]..."),
    ] = None,
    target: Annotated[
        Literal["cron", "systemd", "airflow", "k8s", "rayjob", "raycronjob"],
        typer.Option(help="scheduler that calls `schedule tick`"),
    ] = "cron",
    workspace: WorkspaceFolder = HERE,
    into: Annotated[
        Path | None, typer.Option(help="folder for the files; printed by default")
    ] = None,
) -> None:
    """Print what another scheduler needs to tick a schedule: a line, units, manifests, a DAG file.

    Overlap, catch-up, triggers and retries stay those of the schedule.
    """
    from vinedresser.cluster.emit import TARGETS, Host, tick_of
    from vinedresser.cluster.manifests import Pods

    value, _, source = _find(schedule, None, workspace)
    program = Path(sys.executable).parent / "vinedresser"
    options = {
        **({"image": value.run.image} if value.run.image else {}),
        **parse_overrides(pods or []),
    }
    files = TARGETS[target](
        tick_of(value, source, workspace.absolute()),
        Host(program, Path.cwd()),
        Pods.from_json(options) if options else None,
    )
    for name, text in files.items():
        if into is None:
            print_lines(*([f"# {name}"] if len(files) > 1 else []), text.rstrip())
        else:
            into.mkdir(parents=True, exist_ok=True)
            (into / name).write_text(text)
            print_lines(str(into / name))
