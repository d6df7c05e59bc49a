"""`evaluate`: a model's scores on a split of a task's corpus."""

from typing import Annotated

import typer

from vinedresser.cli.arguments import HERE, AsJson, Model, Overrides, Workspace, open_model
from vinedresser.cli.render import print_json


def evaluate(
    model: Model,
    task: Annotated[str, typer.Argument(help="import path or file of a task")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Score a model on a task; `split=dev`, `beam=4` and `length_alpha=0.6` are its own keys."""
    from vinedresser import evaluate as scoring
    from vinedresser.cli.options import SplitOption, decoding_of, split_words
    from vinedresser.config import Decoding, Frames, Task, resolve
    from vinedresser.data.corpora.corpus import read
    from vinedresser.errors import ConfigError

    options, rest = split_words(SplitOption(), overrides or [])
    own = {key: rest.pop(key) for key in Decoding.model_fields if key in rest}
    Decoding().override(own)  # a bad option is refused before the model is read
    value = resolve(task, [Task]).override(rest)
    bundle = open_model(model, workspace)
    is_of_frames = isinstance(value.source_tokenizer, Frames)
    if is_of_frames != bool(bundle.source_tokenizer.features):
        kinds = ("recordings", "text") if is_of_frames else ("text", "recordings")
        raise ConfigError(f"{task}: its source is {kinds[0]}, the model {model} reads {kinds[1]}")
    decoding = decoding_of(bundle.experiment.decoding, own)
    rows = [(row.source, row.target) for row in read(value, options.split)]
    evaluated = scoring.evaluate(
        bundle.model,
        scoring.tokenized(rows, bundle.source_tokenizer, bundle.target_tokenizer),
        bundle.target_tokenizer,
        scoring.Scoring(value.metric, decoding, value.max_target_length),
    )
    result = {"split": options.split, "beam": decoding.beam, **evaluated.scores.to_json()}
    if as_json:
        return print_json(result)
    for key, item in result.items():
        print(f"{key:22} {item:.4f}" if isinstance(item, float) else f"{key:22} {item}")
    return None
