"""`prune`: a smaller model with a parity certificate."""

from typing import Annotated

import typer

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    DryRun,
    ModelName,
    Overrides,
    WorkspaceFolder,
    open_model,
    prepare_context,
    print_plan,
    resolve_value,
)
from vinedresser.cli.render import print_json, print_table

_DEFAULT = "search_spaces.heads"


def verb(
    model: ModelName,
    pruning: Annotated[str, typer.Argument(help="import path or file of a pruning")] = _DEFAULT,
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Close attention heads of a trained model, remove them, and certify parity."""
    from vinedresser.pruning.search import Pruner, Pruning

    words = overrides or []
    if "=" in pruning:
        pruning, words = _DEFAULT, [pruning, *words]
    value = resolve_value(pruning, [Pruning], words)
    if dry_run:
        return print_plan(value, as_json=as_json)
    from vinedresser.cluster.connect import connect

    whole = open_model(model, workspace)
    experiment = whole.experiment
    with connect(search=True):
        context = prepare_context(experiment.task, workspace, kind="prune")
        small = Pruner(experiment.name, value, whole, context=context).run()
    scores, metric = small.scores, small.scores["metric"]
    if as_json:
        return print_json({"bundle": str(small.folder), "scores": dict(scores)})
    split = "test" if "test" in scores else "dev"
    before, after = scores["parameters"]
    slow, fast = scores["sentences_per_second"]
    found = (scores["finalist"][metric], scores[split][metric])
    heads = [
        (f"heads, {kind}", str(own["total"]), str(own["kept"]))
        for kind, own in scores["heads"].items()
    ]
    print_table(
        ["", "whole", "pruned"],
        [
            (f"{split} {metric}", f"{found[0]:.2f}", f"{found[1]:.2f}"),
            *heads,
            ("parameters", f"{before:,}", f"{after:,}"),
            ("greedy sentences/s", f"{slow:,.0f}", f"{fast:,.0f}"),
            ("parity, log-probabilities", "", f"{scores['parity_max_abs']:.1e}"),
        ],
        title=small.folder.name,
    )
    return print(small.folder)
