"""`prepare`: verified shards of a corpus."""

from typing import Annotated, Literal

import typer

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    DryRun,
    Overrides,
    WorkspaceFolder,
    resolve_value,
)
from vinedresser.cli.render import print_json


def verb(
    task: Annotated[str, typer.Argument(help="import path or YAML/JSON file of a task")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    executor: Annotated[
        Literal["auto", "in_process", "ray"],
        typer.Option(help="auto: Ray for a large corpus; the output is the same"),
    ] = "auto",
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Convert a corpus to length-bucketed, verified Parquet shards."""
    from vinedresser.config import Task

    value = resolve_value(task, [Task], overrides)
    if dry_run:
        return print_json(value.to_json())
    from vinedresser.cluster.connect import connect
    from vinedresser.data import shards
    from vinedresser.workspace import layout

    made = shards.prepare(
        value, layout.Workspace(workspace).shards, executor=executor, connect=connect
    )
    if as_json:
        counts = dict(made.counts)
        return print_json({"folder": str(made.folder), "digest": made.digest, "counts": counts})
    return print(made.folder)
