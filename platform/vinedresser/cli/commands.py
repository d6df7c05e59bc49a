"""The verbs as they are typed. Imports of torch, ray and mlflow wait for a verb."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    help="Train and prune sequence-to-sequence models, selected on decoded quality.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted key=value words", metavar="[KEY=VALUE]...")
]
Workspace = Annotated[
    Path,
    typer.Option(
        "--workspace", "-w", envvar="VINEDRESSER_WORKSPACE", help="folder of everything written"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="the result as JSON on stdout")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print what would be done and with what, then stop")
]
HERE = Path("workspace")


class _Say:
    """Progress on stderr, each line with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self, text: str) -> None:
        sys.stderr.write(f"{time.perf_counter() - self._start:7.1f}s  {text}\n")
        sys.stderr.flush()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


# Where the experiment stands in each kind of value, so that `task=FILE`, `model=NAME` and
# `model.dropout=0.2` mean the same for all of them.
_EXPERIMENT_AT = {"Experiment": "", "Study": "base.", "Pipeline": "study.base."}


def _resolve(name: str, kinds: Sequence[Any], overrides: list[str] | None, part: str = "") -> Any:
    """The value behind a name, with dotted overrides put in.

    A value of a later kind stands for its `part`: a study for its base, a pipeline for its study.
    """
    from vinedresser.config import parse_overrides, resolve

    value = resolve(name, kinds)
    if not isinstance(value, kinds[0]):
        value = getattr(value, part)
    at = _EXPERIMENT_AT.get(type(value).__name__, "")
    changes = {
        f"{at}{key}" if key.split(".")[0] in ("task", "model") else key: change
        for key, change in parse_overrides(overrides or []).items()
    }
    return value.override(changes)


@app.command()
def prepare(
    task: Annotated[str, typer.Argument(help="import path or YAML/JSON file of a task")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    executor: Annotated[
        Literal["auto", "in_process", "ray"],
        typer.Option(help="auto: Ray where the corpus is large enough to pay; the same bytes"),
    ] = "auto",
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Turn a corpus into length-bucketed, verified Parquet shards."""
    from vinedresser.config import Task

    value = _resolve(task, [Task], overrides)
    if dry_run:
        return _print_json(value.to_json())
    from vinedresser.cluster import connect
    from vinedresser.data.shards import prepare as write

    shards = write(value, workspace / "shards", executor=executor, connect=connect)
    result = {"folder": str(shards.folder), "digest": shards.digest, "counts": dict(shards.counts)}
    return _print_json(result) if as_json else print(shards.folder)


@app.command()
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
    from vinedresser.cli import verbs
    from vinedresser.config import Experiment
    from vinedresser.config.study import Study

    value = _resolve(experiment, [Experiment, Study], overrides, "base")
    if dry_run:
        return verbs.show_plan(value, as_json=as_json)
    return verbs.train(value, workspace, _Say(), from_scratch=from_scratch, as_json=as_json)


@app.command()
def check(
    experiment: Annotated[str, typer.Argument(help="import path or file; a study's base will do")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    price: Annotated[float, typer.Option(help="of an hour of one worker, for the cost")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Check an experiment before it is trained: data, model, memory, time and cost.

    Trains for about a minute and keeps nothing of it. Exit code 4 if a check fails.
    """
    from vinedresser.cli.check import check as run_checks
    from vinedresser.config import Experiment, resolve
    from vinedresser.config.study import Study

    kinds: list[Any] = [Experiment, Study]
    value = _resolve(experiment, kinds, overrides, "base")
    trials = getattr(resolve(experiment, kinds), "num_trials", 1)
    if not run_checks(value, workspace, price=price, trials=trials, as_json=as_json):
        raise typer.Exit(4)


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help="import path or file; a pipeline's study will do")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Search a study's space with Ray Tune and Optuna, judged by the decoded metric."""
    from vinedresser.cli import verbs
    from vinedresser.config.study import Study
    from vinedresser.pipeline import Pipeline

    value = _resolve(study, [Study, Pipeline], overrides, "study")
    if dry_run:
        return verbs.show_plan(value, as_json=as_json)
    return verbs.sweep(value, workspace, _Say(), as_json=as_json)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="bundle folder, run id or models:/name@alias")],
    pruning: Annotated[
        str, typer.Argument(help="import path or file of a pruning")
    ] = "search_spaces.heads",
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Close heads of a finished model, remove them, and prove the smaller model equal."""
    from vinedresser.cli import verbs
    from vinedresser.pruning.search import Pruning

    words = overrides or []
    if "=" in pruning:
        pruning, words = "search_spaces.heads", [pruning, *words]
    value = _resolve(pruning, [Pruning], words)
    if dry_run:
        return verbs.show_plan(value, as_json=as_json)
    return verbs.prune(model, value, workspace, _Say(), as_json=as_json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="bundle folder, run id or models:/name@alias")],
    name: Annotated[str, typer.Argument(help="name of the registered model")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Register a bundle; it becomes champion only through the gate (split, max_regression)."""
    from vinedresser.cli import verbs

    verbs.export(model, name, overrides or [], workspace, as_json=as_json)


@app.command()
def retrain(
    pipeline: Annotated[str, typer.Argument(help="import path or file of a pipeline")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Run the whole chain: prepare, sweep, finalist, prune, compact, register."""
    from vinedresser.cli import verbs
    from vinedresser.pipeline import Pipeline

    value = _resolve(pipeline, [Pipeline], overrides)
    if dry_run:
        return verbs.show_plan(value, as_json=as_json)
    return verbs.retrain(value, pipeline, workspace, _Say(), as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="bundle folder, run id or models:/name@alias")],
    task: Annotated[str, typer.Argument(help="import path or file of a task")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Score a model on a task; `split=dev`, `beam=4` and `length_alpha=0.6` are its own keys."""
    from vinedresser.cli import verbs

    verbs.evaluate(model, task, overrides or [], workspace, as_json=as_json)


@app.command()
def translate(
    model: Annotated[str, typer.Argument(help="bundle folder, run id or models:/name@alias")],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Translate stdin to stdout, line by line; `beam=4` for beam search.

    A model of recordings reads their paths: one a line, or several of one utterance with tabs.
    """
    from vinedresser.cli import verbs

    verbs.translate(model, overrides or [], workspace, as_json=as_json)


@app.command()
def describe(
    what: Annotated[
        str, typer.Argument(help="model or preset, experiment, bundle folder, or shard folder")
    ],
    overrides: Overrides = None,
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what a model is made of, or what a shard set holds, with pictures.

    A model takes its own keys and `source=8000 target=8000 joint=true features=0`; a shard set
    `tokens=4096 pictures=FOLDER`.
    """
    from vinedresser.cli.describe import describe as show

    show(what, overrides or [], workspace, as_json=as_json)


@app.command()
def attend(
    model: Annotated[str, typer.Argument(help="bundle folder, run id or models:/name@alias")],
    source: Annotated[str, typer.Argument(help="a sentence; or paths of recordings, as translate")],
    target: Annotated[
        str | None, typer.Argument(help="what it is made to say; its own greedy output by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the pictures and maps")] = Path("attention"),
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Show where a model looks: a picture a module, and how diagonal each head is."""
    from vinedresser.cli.attend import show

    show(model, source, target, out, workspace, as_json=as_json)


@app.command()
def runs(
    task: Annotated[str, typer.Argument(help="name of one task; all by default")] = "",
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Show a leaderboard of sweeps and runs."""
    from vinedresser.cli import verbs

    verbs.runs(task, workspace, as_json=as_json)


@app.command()
def ui(
    port: Annotated[int, typer.Argument(help="port on loopback")] = 5000,
    workspace: Workspace = HERE,
) -> None:
    """Serve the MLflow pages of the workspace on loopback, in their light form."""
    from vinedresser.tracking import serve_ui, store_for

    sys.stderr.write(f"MLflow at http://127.0.0.1:{port} (Ctrl-C ends it)\n")
    code = serve_ui(store_for(workspace, "Default"), port)
    if code:
        raise typer.Exit(code)


@app.command()
def doctor(workspace: Workspace = HERE, as_json: AsJson = False) -> None:
    """Say what works on this machine and what does not."""
    from vinedresser.cli.doctor import examine

    if not examine(workspace, as_json=as_json):
        raise typer.Exit(3)
