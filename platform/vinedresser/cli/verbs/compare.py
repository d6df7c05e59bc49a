"""`compare`: difference of models on a split of a task's corpus, with its significance."""

import itertools
from typing import Annotated, Any, Literal

import typer
from pydantic import Field

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    WorkspaceFolder,
    check_decoding,
    decoding_of,
    open_model,
    split_options,
)
from vinedresser.cli.render import print_json
from vinedresser.cli.verbs.evaluate import check_source, evaluate_rows
from vinedresser.config import Decoding, Section, Task, resolve
from vinedresser.errors import ConfigError


class Resampling(Section):
    """Options of `compare`; its other keys are those of Decoding and of the task."""

    split: Literal["train", "dev", "test"] = "test"
    # Draws of the bootstrap.
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000


def verb(
    words: Annotated[
        list[str],
        typer.Argument(help="models, a task and key=value options", metavar="MODEL... TASK"),
    ],
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Compare models with the first one, by paired bootstrap on the sentences of a split.

    A side is one model, or several of equal settings and other seeds, with commas between them.
    Options: `split=dev`, `resamples=1000`, `metric=ter`, and those of `translate`'s search.
    """
    from vinedresser.data.corpora.corpus import read
    from vinedresser.significance import paired_bootstrap

    names = [word for word in words if "=" not in word]
    if len(names) < 3:
        raise ConfigError(
            f"compare: found {', '.join(names) or 'nothing'}; expected two models or more, then a "
            "task"
        )
    *sides, task_name = names
    task = resolve(task_name, [Task])
    parts = split_options([word for word in words if "=" in word], Resampling(), Decoding(), task)
    options, task = Resampling().override(parts[0]), task.override(parts[2])
    check_decoding(parts[1])
    bundles = [[open_model(name, workspace) for name in side.split(",")] for side in sides]
    for bundle in itertools.chain(*bundles):
        check_source(bundle, task)
    rows = [(row.source, row.target) for row in read(task, options.split)]
    texts = [
        [
            evaluate_rows(
                bundle, task, rows, decoding_of(bundle.experiment.decoding, parts[1])
            ).hypotheses
            for bundle in side
        ]
        for side in bundles
    ]
    folds = any(bundle.target_tokenizer.folds_case for side in bundles for bundle in side)
    results: list[dict[str, Any]] = []
    for side, hypotheses in zip(sides[1:], texts[1:], strict=True):
        found = paired_bootstrap(
            task.metric,
            (hypotheses, texts[0]),
            [target for _, target in rows],
            folds_case=folds,
            samples=options.resamples,
        )
        low, high = found.interval()
        is_better = found.values[0] != found.values[1] and found.gains.mean() > 0
        verdict = f"not distinguishable at {options.resamples:,} resamples"
        if found.p_value < 0.05:
            verdict = f"{'better' if is_better else 'worse'}, p < 0.05"
        results.append(
            {
                "side": side, "against": sides[0], "split": options.split,
                "metric": task.metric, "value": found.values[0], "value_against": found.values[1],
                "better_by": [low, high], "p": found.p_value, "verdict": verdict,
            }
        )  # fmt: skip
    if as_json:
        return print_json(results)
    for each in results:
        low, high = each["better_by"]
        print(
            f"{each['side']}: {options.split} {task.metric} {each['value']:.2f} against "
            f"{each['value_against']:.2f} of {sides[0]}; better by {low:.2f} to {high:.2f} at 95%, "
            f"p {each['p']:.3f}: {each['verdict']}"
        )
    return None
