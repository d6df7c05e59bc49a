"""`train`: one experiment, from its corpus to a bundle."""

import contextlib
import logging
from typing import Annotated

import typer

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    DryRun,
    Overrides,
    Workspace,
    context_of,
    print_plan,
    resolve_value,
)
from vinedresser.cli.render import print_json

_log = logging.getLogger(__name__)


def train(
    experiment: Annotated[str, typer.Argument(help="import path or file; a study's base will do")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="forget this run's checkpoints and outcome")
    ] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train one experiment and leave its best model, by the decoded metric, as a bundle."""
    from vinedresser.config import Experiment
    from vinedresser.config.study import Study

    value = resolve_value(experiment, [Experiment, Study], overrides, "base")
    if dry_run:
        return print_plan(value, as_json=as_json)
    from vinedresser.cli.progress import watching
    from vinedresser.cluster import connect
    from vinedresser.data import shards
    from vinedresser.distributed import train as distributed
    from vinedresser.workspace import layout

    with connect() if value.compute.workers > 1 else contextlib.nullcontext():
        prepared = shards.prepare(value.task, layout.Workspace(workspace).shards)
        context = context_of(prepared, workspace)
        with watching(value) as listener:
            outcome = distributed.train(
                value, context, listener=listener, from_scratch=from_scratch
            )
    if as_json:
        return print_json({"bundle": outcome.bundle, "scores": outcome.scores})
    _log.info("dev %s %.2f at step %d", value.task.metric, outcome.value, outcome.best_step)
    return print(outcome.bundle)
