"""Arguments that verbs share, and the values behind them.

Only what the command line itself needs is imported here: torch, ray and mlflow wait for the verb.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vinedresser.bundle import Bundle
    from vinedresser.config import Section
    from vinedresser.data.shards import ShardSet
    from vinedresser.distributed.context import RunContext
    from vinedresser.tracking import Store

Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted key=value words", metavar="[KEY=VALUE]...")
]
Model = Annotated[str, typer.Argument(help="bundle folder, run id or models:/name@alias")]
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

# Key of the experiment in each kind of value, so that `task=FILE`, `model=NAME` and
# `model.dropout=0.2` mean the same for all of them.
_EXPERIMENT_AT = {"Experiment": "", "Study": "base.", "Pipeline": "study.base."}


def resolve_value(
    name: str, kinds: Sequence[Any], overrides: list[str] | None, part: str = ""
) -> Any:
    """Return the value behind a name, with dotted overrides applied.

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


def existing_store(workspace: Path) -> "Store":
    """Return the workspace's tracking store for reading, which must not create one.

    Raises:
        ConfigError: there is none yet.
    """
    from vinedresser.errors import ConfigError
    from vinedresser.tracking import store_for

    store = store_for(workspace, "Default")
    file = store.uri.removeprefix("sqlite:///")
    if file != store.uri and not Path(file).exists():
        raise ConfigError(
            f"{workspace}: no runs and no models yet; `vinedresser train` makes some, or name "
            "another folder with --workspace"
        )
    return store


def open_model(name: str, workspace: Path) -> "Bundle":
    """Open and verify the bundle behind a folder, a run id or a registry URI.

    Raises:
        ConfigError: nothing of that name.
        DataError: the folder holds no intact bundle.
    """
    from vinedresser.bundle import load_bundle
    from vinedresser.errors import ConfigError
    from vinedresser.registry.registration import fetch
    from vinedresser.tracking import tagged_folder
    from vinedresser.workspace import layout
    from vinedresser.workspace.commit import is_committed

    if name.startswith("models:/"):
        cache = layout.Workspace(workspace.absolute()).cache
        return load_bundle(fetch(name, store=existing_store(workspace), cache=cache))
    folder = Path(name)
    if not folder.is_dir():
        found = tagged_folder(existing_store(workspace), name) if "/" not in name else None
        if found is None:
            raise ConfigError(
                f"{name}: no such folder or run; name a bundle folder, a run id or "
                "models:/name@champion"
            )
        # The tag holds the folder of the run when it was written; the workspace may have moved.
        folder = found if found.is_dir() else layout.Workspace(workspace).runs / found.name
    if not is_committed(folder) and is_committed(layout.RunFolder(folder).bundle):
        folder = layout.RunFolder(folder).bundle
    return load_bundle(folder.absolute())


def context_of(shards: "ShardSet", workspace: Path, *, kind: str = "train") -> "RunContext":
    """Return the context of the command's runs, with the task's tracking store.

    The store of a search or of a pruning is opened here, and runs of killed processes are closed;
    that of a training is opened while the training begins.
    """
    import logging

    from vinedresser.distributed.context import RunContext
    from vinedresser.tracking import initialise, reap, store_for
    from vinedresser.workspace import layout

    store = store_for(workspace, shards.task.name)
    if kind != "train":
        initialise(store)
        for run_id in reap(store):
            logging.getLogger(__name__).info(
                "tracking: run %s of a killed process closed", run_id[:8]
            )
    return RunContext(shards, layout.Workspace(workspace.absolute()), store, kind=kind)


def print_plan(value: "Section", *, as_json: bool) -> None:
    """Print the resolved configuration, the space and the resources of a dry run."""
    from vinedresser.cli.render import print_json
    from vinedresser.config import Experiment
    from vinedresser.config.study import Study
    from vinedresser.pipeline import Pipeline

    plan: dict[str, Any] = {"configuration": value.to_json()}
    study = value.study if isinstance(value, Pipeline) else value
    if isinstance(study, Study):
        compute = study.base.compute
        plan["space"] = value.to_json().get("space") or study.to_json()["space"]
        plan["resources"] = {
            "trials": study.num_trials,
            "steps_a_trial": study.base.steps,
            "cpus_a_trial": compute.workers * compute.threads,
            "workers_a_trial": compute.workers,
        }
    elif isinstance(value, Experiment):
        compute = value.compute
        plan["resources"] = {"cpus": compute.workers * compute.threads, "workers": compute.workers}
    if as_json:
        return print_json(plan)
    import yaml

    return print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True), end="")
