"""`sync`: delivery of what runs could not deliver while their tracking store was away."""

from typing import Annotated

import typer

from vinedresser.cli.arguments import HERE, AsJson, WorkspaceFolder
from vinedresser.cli.render import print_json
from vinedresser.errors import BusyError


def verb(
    workspace: WorkspaceFolder = HERE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what waits, then exit; deliver nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Deliver metrics, tags and artifacts that the tracking store has not taken yet."""
    from vinedresser.tracking import deliver_spools, spools_of
    from vinedresser.workspace import layout

    folders = spools_of(layout.Workspace(workspace.absolute()))
    if dry_run:
        waiting = [str(folder.path) for folder in folders]
        return print_json({"waiting": waiting}) if as_json else print("\n".join(waiting))
    done = deliver_spools(folders, workspace)
    if as_json:
        left = {str(folder): reason for folder, reason in done.left.items()}
        print_json({"delivered": [str(folder) for folder in done.delivered], "left": left})
    else:
        print(f"delivered {len(done.delivered)} runs")
    if done.left:
        folder, reason = next(iter(done.left.items()))
        raise BusyError(
            f"{len(done.left)} runs are not delivered, the first is {folder}: {reason}; run the "
            "same command later"
        )
    return None
