"""`ui`: the MLflow UI of the workspace."""

import sys
from typing import Annotated

import typer

from vinedresser.cli.arguments import HERE, WorkspaceFolder


def verb(
    port: Annotated[int, typer.Argument(help="port on loopback", min=1, max=65535)] = 5000,
    workspace: WorkspaceFolder = HERE,
) -> None:
    """Serve the MLflow UI of the workspace on loopback."""
    from vinedresser.tracking import serve_ui, store_for

    sys.stderr.write(f"MLflow at http://127.0.0.1:{port} (stop with Ctrl-C)\n")
    code = serve_ui(store_for(workspace, "Default"), port)
    if code:
        raise typer.Exit(code)
