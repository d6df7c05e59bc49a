"""`export`: registration of a bundle, with a gate before promotion."""

from typing import Annotated

import typer

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    ModelName,
    Overrides,
    WorkspaceFolder,
    open_model,
)
from vinedresser.cli.render import print_json


def verb(
    model: ModelName,
    name: Annotated[str, typer.Argument(help="name of the registered model")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Register a bundle and promote it if it passes the gate.

    Its options are `split`, `max_regression` and `confidence`.
    """
    from vinedresser.config import parse_overrides
    from vinedresser.data.shards import prepare
    from vinedresser.registry.gate import Gate
    from vinedresser.registry.registration import register
    from vinedresser.tracking import store_for
    from vinedresser.workspace.layout import Workspace

    gate = Gate().override(parse_overrides(overrides or []))
    bundle = open_model(model, workspace)
    store = store_for(workspace, bundle.experiment.task.name)
    registered = register(
        bundle.manifest,
        name=name,
        store=store,
        gate=gate,
        data=lambda: prepare(bundle.experiment.task, Workspace(workspace.absolute()).shards),
    )
    if as_json:
        return print_json(vars(registered))
    return print(f"{name} version {registered.version}: {registered.verdict}, {registered.reason}")
