"""`train`: training of one experiment, from its corpus to a bundle."""

import contextlib
import logging
from typing import Annotated

import typer

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    DryRun,
    Overrides,
    WorkspaceFolder,
    prepare_context,
    print_plan,
    resolve_value,
)
from vinedresser.cli.render import print_json

_log = logging.getLogger(__name__)


def verb(
    experiment: Annotated[str, typer.Argument(help="import path or file; a study gives its base")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="delete this run's checkpoints and outcome first")
    ] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train one experiment; write the best model by the decoded metric as a bundle."""
    from vinedresser.config import Experiment
    from vinedresser.config.study import Study

    value = resolve_value(experiment, [Experiment, Study], overrides, "base")
    if dry_run:
        return print_plan(value, as_json=as_json)
    from vinedresser.cli.progress import watching
    from vinedresser.cluster.connect import connect, is_named
    from vinedresser.distributed import train as distributed

    with connect() if value.compute.workers > 1 or is_named() else contextlib.nullcontext():
        context = prepare_context(value.task, workspace)
        with watching(value) as listener:
            outcome = distributed.train(
                value, context, listener=listener, from_scratch=from_scratch
            )
    if as_json:
        return print_json({"bundle": outcome.bundle, "scores": outcome.scores})
    _log.info("dev %s %.2f at step %d", value.task.metric, outcome.value, outcome.best_step)
    return print(outcome.bundle)
