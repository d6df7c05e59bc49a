"""`evaluate`: scores of a model on a split of a task's corpus."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    ModelName,
    Overrides,
    SplitOption,
    WorkspaceFolder,
    check_decoding,
    decoding_of,
    open_model,
    split_options,
)
from vinedresser.cli.render import print_json
from vinedresser.config import Decoding, Frames, Task, resolve
from vinedresser.errors import ConfigError

if TYPE_CHECKING:
    from vinedresser.bundle import Bundle
    from vinedresser.data.corpora.row import SourceItem
    from vinedresser.evaluate import Evaluated


def verb(
    model: ModelName,
    task: Annotated[str, typer.Argument(help="import path or file of a task")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Score a model on a task. Its options are `split=dev` and those of `translate`'s search.

    With --json, the errors by target position and the scores by length are printed too.
    """
    from vinedresser.breakdown import by_length, by_position
    from vinedresser.data.corpora.corpus import read

    value = resolve(task, [Task])
    parts = split_options(overrides or [], SplitOption(), Decoding(), value)
    options, value = SplitOption().override(parts[0]), value.override(parts[2])
    check_decoding(parts[1])
    bundle = open_model(model, workspace)
    check_source(bundle, value)
    rows = [(row.source, row.target) for row in read(value, options.split)]
    decoding = decoding_of(bundle.experiment.decoding, parts[1])
    evaluated = evaluate_rows(bundle, value, rows, decoding)
    result = {"split": options.split, "beam": decoding.beam, **evaluated.scores.to_json()}
    if as_json:
        parts_of = {"by_position": by_position(evaluated), "by_length": by_length(evaluated)}
        return print_json(result | parts_of)
    for key, item in result.items():
        print(f"{key:22} {item:.4f}" if isinstance(item, float) else f"{key:22} {item}")
    return None


def check_source(bundle: "Bundle", task: Task) -> None:
    """Raise a ConfigError if one of task and bundle is of recordings, the other of text."""
    is_of_frames = isinstance(task.source_tokenizer, Frames)
    if is_of_frames != bool(bundle.source_tokenizer.features):
        kinds = ("recordings", "text") if is_of_frames else ("text", "recordings")
        raise ConfigError(
            f"{task.name}: the source is {kinds[0]}, the input of model {bundle.folder} is "
            f"{kinds[1]}"
        )


def evaluate_rows(
    bundle: "Bundle", task: Task, rows: "Sequence[tuple[SourceItem, str]]", decoding: Decoding
) -> "Evaluated":
    """Decode and score the rows of a task's split."""
    from vinedresser.evaluate import Scoring, evaluate, tokenized

    return evaluate(
        bundle.model,
        tokenized(rows, bundle.source_tokenizer, bundle.target_tokenizer),
        bundle.target_tokenizer,
        Scoring(task.metric, decoding, task.max_target_length),
    )
