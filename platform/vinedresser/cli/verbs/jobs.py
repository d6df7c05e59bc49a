"""`jobs`: list, logs and stop of submitted jobs."""

import dataclasses
import sys
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Column

from vinedresser.cli.arguments import AsJson
from vinedresser.cli.render import print_json, print_table
from vinedresser.cli.verbs.submit import Address, require_address

JobId = Annotated[str, typer.Argument(help="id of the job", metavar="ID")]

app = typer.Typer(help="Submitted jobs of a cluster: list, logs, stop.")


@app.command("ls")
def list_(address: Address = "", as_json: AsJson = False) -> None:
    """List the submitted jobs, the latest first."""
    require_address(address)
    from vinedresser.cluster.jobs import Jobs

    rows = Jobs(address).rows()
    if as_json:
        return print_json([dataclasses.asdict(row) for row in rows])
    return print_table(
        [Column("id", no_wrap=True), "status", ">exit", "started", ">seconds", "command"],
        [
            (
                row.id,
                row.status,
                "" if row.exit_code is None else str(row.exit_code),
                f"{datetime.fromtimestamp(row.started):%Y-%m-%d %H:%M:%S}" if row.started else "",
                "" if row.seconds is None else f"{row.seconds:.0f}",
                row.command,
            )
            for row in rows
        ],
    )


@app.command("logs")
def logs(
    job_id: JobId,
    address: Address = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="until the job ends; exit with its exit code")
    ] = False,
) -> None:
    """Print what a job has printed."""
    require_address(address)
    from vinedresser.cluster.jobs import Jobs

    if follow:
        raise typer.Exit(Jobs(address).follow(job_id, sys.stdout))
    print(Jobs(address).logs(job_id), end="")


@app.command("stop")
def stop(job_id: JobId, address: Address = "") -> None:
    """Stop a job after a checkpoint; the same `submit` resumes it."""
    require_address(address)
    from vinedresser.cluster.jobs import Jobs

    row = Jobs(address).stop(job_id)
    print(f"{row.id}: {row.status}, exit code {row.exit_code}")
