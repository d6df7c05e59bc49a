"""`runs`: leaderboards of sweeps and runs, best first."""

from datetime import timedelta
from typing import Annotated

import typer

from vinedresser.cli.arguments import HERE, AsJson, WorkspaceFolder, existing_store
from vinedresser.cli.render import print_json, print_lines, print_table


def verb(
    task: Annotated[str, typer.Argument(help="name of one task; all by default")] = "",
    limit: Annotated[int, typer.Option(help="rows per task; 0 for all", min=0)] = 20,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show a leaderboard of sweeps and runs per task."""
    from vinedresser.tracking import experiments, leaderboard

    store = existing_store(workspace)
    names = [task] if task else experiments(store)
    leaderboards = {name: leaderboard(store, experiment=name, limit=limit) for name in names}
    if as_json:
        return print_json(
            {name: [vars(row) for row in rows] for name, rows in leaderboards.items()}
        )
    for name, rows in leaderboards.items():
        print_table(
            ["run", "kind", "state", "best", "time", "id"],
            [
                (
                    row.name,
                    row.kind,
                    row.state.lower(),
                    "" if row.value is None else f"{row.metric} {row.value:.2f}",
                    str(timedelta(seconds=round(row.seconds))),
                    row.run_id[:8],
                )
                for row in rows
            ],
            title=name,
        )
        print_lines("")
    return None
