"""`sweep`: a search over a study's space, and the table of its trials."""

import math
from pathlib import Path
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
from vinedresser.cli.render import print_json, print_table


def verb(
    study: Annotated[str, typer.Argument(help="import path or file; a pipeline gives its study")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Search a study's space with Ray Tune and Optuna, ranked by the decoded metric."""
    from vinedresser.config.study import Study
    from vinedresser.pipeline import Pipeline

    value = resolve_value(study, [Study, Pipeline], overrides, "study")
    if dry_run:
        return print_plan(value, as_json=as_json)
    from vinedresser import sweep as search
    from vinedresser.cluster.connect import connect

    with connect(dashboard=value.base.compute.workers > 1, search=True):
        context = prepare_context(value.base.task, workspace, kind="trial")
        outcome = search.sweep(value, context)
    if as_json:
        trials = [vars(trial) for trial in outcome.trials]
        return print_json({"folder": outcome.folder, "trials": trials})
    return print_table(
        ["trial", "state", *outcome.objectives, "parameters"],
        [
            (
                str(trial.number),
                trial.state,
                *("" if math.isnan(v) else f"{v:.2f}" for v in trial.values.values()),
                search.short_params(trial.params),
            )
            for trial in outcome.trials
        ],
        title=Path(outcome.folder).name,
    )
