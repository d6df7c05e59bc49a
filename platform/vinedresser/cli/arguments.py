"""Arguments and `key=value` options that verbs share, and the values that they resolve to.

Imports of torch, ray and mlflow are deferred to the functions, so that `--help` is fast.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import NonNegativeInt, PositiveInt

from vinedresser.cli.render import print_json
from vinedresser.config import Decoding, Experiment, Section, parse_overrides, resolve
from vinedresser.errors import ConfigError
from vinedresser.workspace import layout
from vinedresser.workspace.storage import follow_mode, user_cache

if TYPE_CHECKING:
    from vinedresser.bundle import Bundle
    from vinedresser.distributed.context import RunContext
    from vinedresser.tracking import Store

Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted key=value options", metavar="[KEY=VALUE]...")
]
ModelName = Annotated[str, typer.Argument(help="bundle folder, run id or models:/name@alias")]


def _usable(workspace: Path) -> Path:
    """Return a workspace's folder.

    Raises:
        ConfigError: it is no folder, or in the unpacked code of a job, which Ray deletes.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(workspace)):
        raise ConfigError(
            f"workspace {workspace}: object storage is not supported; name a folder on a file "
            "system that all nodes see"
        )
    if "runtime_resources" in workspace.absolute().parts:
        raise ConfigError(
            f"{workspace.absolute()}: inside the unpacked code of a Ray job, which Ray deletes; "
            "pass --workspace with an absolute path on storage that all nodes see"
        )
    follow_mode(workspace)
    return workspace


WorkspaceFolder = Annotated[
    Path,
    typer.Option(
        "--workspace",
        "-w",
        envvar="VINEDRESSER_WORKSPACE",
        help="folder for all results",
        callback=_usable,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="print the resolved configuration and resources, then exit"),
]
HERE = Path("workspace")

# Key of the experiment in each kind of value: `task=FILE`, `model=NAME` and `model.dropout=0.2`
# have the same meaning for all of them.
_EXPERIMENT_AT = {"Experiment": "", "Study": "base.", "Pipeline": "study.base."}


class SplitOption(Section):
    """The split that `evaluate` scores; its other keys are those of Decoding and of the task."""

    split: Literal["train", "dev", "test"] = "test"


class Sizes(Section):
    """Sizes for which `describe` builds a model when no task defines them."""

    # Vocabulary size per side; 0 takes the task's, or 8,000.
    source: NonNegativeInt = 0
    target: NonNegativeInt = 0
    # One vocabulary for both sides; required by `tie: all`.
    joint: bool | None = None
    # Above 0: the source is frames with this number of features.
    features: NonNegativeInt = 0


class ShardView(Section):
    """Options of `describe` for a shard set."""

    # Budget of padded tokens per batch for which the padding efficiency is computed.
    tokens: PositiveInt = 4096
    # Folder for the figures; `pictures=` for none.
    pictures: str | None = "pictures"


def split_options(words: Sequence[str], *sections: Section) -> list[dict[str, Any]]:
    """Return the `key=value` words per section: each goes to the first section with such a key.

    An unknown key goes to the section with the most similar key, whose `override` reports it.
    """
    keys = [list(type(section).model_fields) for section in sections]
    parts: list[dict[str, Any]] = [{} for _ in sections]
    for key, value in parse_overrides(words).items():
        head = key.split(".")[0]
        near = difflib.get_close_matches(head, [name for names in keys for name in names], n=1)
        owners = [i for name in (head, *near) for i, names in enumerate(keys) if name in names]
        parts[owners[0] if owners else -1][key] = value
    return parts


def check_decoding(values: Mapping[str, Any]) -> None:
    """Refuse an option of Decoding that no bundle accepts, before one is read.

    Raises:
        ConfigError: an unknown or bad option.
    """
    for key, value in values.items():
        is_of_draws = key in ("seed", "temperature", "top_k", "top_p")
        base = Decoding(sample=is_of_draws, beam=2 if key == "beam_spread" else 1)
        base.override({key: value})


def decoding_of(default: Decoding, values: Mapping[str, Any]) -> Decoding:
    """Return a bundle's decoding with the options of a command.

    Raises:
        ConfigError: an unknown or bad option, or one without effect.
    """
    decoding = default.override(values)
    if "length_alpha" in values and decoding.beam == 1:
        raise ConfigError("length_alpha: no effect on greedy search; set beam=2 or more")
    return decoding


def resolve_value(
    name: str, kinds: Sequence[Any], overrides: list[str] | None, part: str = ""
) -> Any:
    """Return the value behind a name, with dotted overrides applied.

    A value of a later kind is replaced by its `part`: a study by its base, a pipeline by its study.
    """
    value = resolve(name, kinds)
    if not isinstance(value, kinds[0]):
        value = getattr(value, part)
    prefix = _EXPERIMENT_AT.get(type(value).__name__, "")
    changes = {
        f"{prefix}{key}" if key.split(".")[0] in ("task", "model") else key: change
        for key, change in parse_overrides(overrides or []).items()
    }
    return value.override(changes)


def existing_store(workspace: Path) -> "Store":
    """Return the workspace's tracking store for reading, without creating one.

    Raises:
        ConfigError: there is none yet.
    """
    from vinedresser.tracking import store_for

    store = store_for(workspace, "Default")
    file = store.uri.removeprefix("sqlite:///")
    if file != store.uri and not Path(file).exists():
        raise ConfigError(
            f"{workspace}: no runs and no models yet; create some with `vinedresser train`, or "
            "name another folder with --workspace"
        )
    return store


def open_model(name: str, workspace: Path) -> "Bundle":
    """Open and verify the bundle behind a folder, a run id or a registry URI.

    Raises:
        ConfigError: nothing has that name.
        DataError: the folder holds no intact bundle.
    """
    from vinedresser.bundle import load_bundle
    from vinedresser.registry.registration import fetch
    from vinedresser.tracking import tagged_folder

    if name.startswith("models:/"):
        # Not in the workspace, which its readers may have no right to write.
        return load_bundle(fetch(name, store=existing_store(workspace), cache=user_cache().bundles))
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
    return load_bundle(bundle_in(folder).absolute())


def bundle_in(folder: Path) -> Path:
    """Return the bundle inside a run's folder; any other folder unchanged."""
    from vinedresser.workspace.commit import is_committed

    bundle = layout.RunFolder(folder).bundle
    return bundle if not is_committed(folder) and is_committed(bundle) else folder


def prepare_context(task: Any, workspace: Path, *, kind: str = "train") -> "RunContext":
    """Prepare the shards of a task; return the context of the command's runs.

    The store of a search or of a pruning is opened here, and runs of killed processes are closed;
    that of a training is opened while the training begins.
    """
    from vinedresser.cluster.admission import require_shared_store
    from vinedresser.cluster.connect import is_named
    from vinedresser.data import shards
    from vinedresser.distributed.context import RunContext
    from vinedresser.tracking import prepare_store, store_for

    store = store_for(workspace, task.name)
    require_shared_store(store)
    # Absolute: Tune runs each trial in a folder of its own.
    place = layout.Workspace(workspace.absolute())
    prepared = shards.prepare(task, place.shards)
    if kind != "train":
        prepare_store(store)
    return RunContext(prepared, place, store, kind=kind, is_remote=is_named())


def print_plan(value: Section, *, as_json: bool) -> None:
    """Print the resolved configuration, the search space and the resources of a dry run."""
    from vinedresser.config.study import Study
    from vinedresser.pipeline import Pipeline

    plan: dict[str, Any] = {"configuration": value.to_json()}
    study = value.study if isinstance(value, Pipeline) else value
    if isinstance(study, Study):
        compute = study.base.compute
        plan["space"] = value.to_json().get("space") or study.to_json()["space"]
        plan["resources"] = {
            "trials": study.num_trials,
            "steps_per_trial": study.base.steps,
            "cpus_per_trial": compute.workers * compute.threads,
            "workers_per_trial": compute.workers,
        }
    elif isinstance(value, Experiment):
        compute = value.compute
        plan["resources"] = {"cpus": compute.workers * compute.threads, "workers": compute.workers}
    if as_json:
        return print_json(plan)
    import yaml

    return print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True), end="")
