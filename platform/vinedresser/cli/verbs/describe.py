"""`describe`: the parts of a model, or the contents of a shard set."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    Overrides,
    ShardView,
    Sizes,
    WorkspaceFolder,
    bundle_in,
    split_options,
)
from vinedresser.cli.render import print_json, print_lines, print_table
from vinedresser.errors import ConfigError, reworded

if TYPE_CHECKING:
    from vinedresser.config import Experiment, ModelConfig, Task
    from vinedresser.data.shards import ShardSet
    from vinedresser.model import Seq2Seq, Vocabulary

# Above this number of parameters the FLOPs are not counted: the forward pass takes too long.
_MAX_PASS = 400_000_000
_SPLITS = ("train", "dev", "test")


def verb(
    what: Annotated[
        str, typer.Argument(help="model or preset, experiment, bundle folder, or shard folder")
    ],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show the parts of a model, or the contents of a shard set with figures.

    Options of a model are its own keys and `source=8000 target=8000 joint=true features=0`; those
    of a shard set `tokens=4096 pictures=FOLDER`.
    """
    from vinedresser.config import ModelConfig, parse_overrides
    from vinedresser.training.device import refuse_too_large
    from vinedresser.workspace.commit import is_committed, read_manifest

    folder = bundle_in(Path(what))
    if not folder.is_dir():
        value: Any = _named_value(what)
        own, changes = split_options(overrides or [], Sizes(), value)
        if isinstance(value, ModelConfig):
            changes = {key.removeprefix("model."): change for key, change in changes.items()}
        value, sizes = value.override(changes), Sizes().override(own)
        task, config = (
            (None, value) if isinstance(value, ModelConfig) else (value.task, value.model)
        )
        vocabulary, note = _vocabulary(sizes, task, workspace)
        hint = "; sizes are keys: joint=true, source=8000"
        with reworded(ConfigError, ConfigError, f"{what}: ", hint):
            refuse_too_large(config, vocabulary)
            model = config.instantiate(vocabulary)
        return _print_model(what, config, model, vocabulary, note=note, as_json=as_json)
    if not is_committed(folder):
        raise ConfigError(f"{folder}: neither a shard set nor a model; it has no manifest.json")
    if read_manifest(folder).meta.get("kind") == "bundle":
        from vinedresser.bundle import load_bundle, vocabulary_of

        bundle = load_bundle(folder)
        config, joint = bundle.experiment.model, bundle.experiment.task.has_joint_vocabulary
        vocabulary = vocabulary_of(bundle.source_tokenizer, bundle.target_tokenizer, joint=joint)
        note = "sizes of the bundle"
        return _print_model(
            str(folder), config, bundle.model, vocabulary, note=note, as_json=as_json
        )
    from vinedresser.data.shards import open_shards

    view = ShardView().override(parse_overrides(overrides or []))
    return _print_shards(open_shards(folder), view, as_json=as_json)


def _named_value(what: str) -> "ModelConfig | Experiment":
    """Return the model of a name, or the experiment of a name or file."""
    from vinedresser.config import Experiment, resolve
    from vinedresser.config.kinds import ZOO, kinds, named_model, presets
    from vinedresser.config.section import did_you_mean
    from vinedresser.config.study import Study
    from vinedresser.pipeline import Pipeline

    with reworded(ValueError, ConfigError):
        names = [*kinds(ZOO), *presets()]
        if what in names or what.startswith(f"{ZOO}."):
            return named_model(what)
    if "/" not in what and "." not in what:
        raise ConfigError(f"{what}: there is no model of that name{did_you_mean(what, names)}")
    accepted: list[Any] = [Experiment, Study, Pipeline]
    value: Any = resolve(what, accepted)
    value = value.study if isinstance(value, Pipeline) else value
    experiment: Experiment = value.base if isinstance(value, Study) else value
    return experiment


def _vocabulary(sizes: Sizes, task: "Task | None", workspace: Path) -> "tuple[Vocabulary, str]":
    """Return the given sizes, those of the task's newest shards, or defaults; and a note on it."""
    from vinedresser.config import Task
    from vinedresser.model import Vocabulary
    from vinedresser.workspace import layout
    from vinedresser.workspace.commit import is_committed, read_manifest

    given = sizes.model_fields_set and (sizes.source or sizes.features)
    folders = layout.Workspace(workspace).shards.glob(f"{task.name}-*") if task else ()
    for folder in sorted(folders, reverse=True) if not given else ():
        if not is_committed(folder):
            continue
        meta = read_manifest(folder).meta  # without verification of the files
        try:
            stored = Task.from_json(meta.get("task"))
        except ConfigError:  # of another version
            continue
        if task is not None and stored == task:
            source, target = (meta["tokenizers"][side] for side in ("source", "target"))
            joint = task.has_joint_vocabulary
            found = Vocabulary(source["size"], target["size"], joint, source.get("features", 0))
            return found, "sizes of the prepared shards"
    text = task.tokenizer.vocab_size if task is not None and task.tokenizer else 8000
    joint = task.has_joint_vocabulary if task is not None else not sizes.features
    joint = joint if sizes.joint is None else sizes.joint
    source = 0 if sizes.features else sizes.source or text
    target = sizes.target or (source if joint and source else text)
    note = "sizes as given" if given else "assumed, no shards found; set source=N target=N"
    return Vocabulary(source, target, joint and source == target, sizes.features), note


def _print_model(
    what: str,
    config: "ModelConfig",
    model: "Seq2Seq",
    vocabulary: "Vocabulary",
    *,
    note: str,
    as_json: bool,
) -> None:
    from vinedresser.health.summary import summarise

    count = sum(p.numel() for p in model.parameters())
    summary = summarise(model, vocabulary, flops=count <= _MAX_PASS)
    if as_json:
        plain = asdict(summary) | {"vocabulary": vars(vocabulary), "model": config.to_json()}
        return print_json(plain)
    kind = type(config).__module__
    source = f"{vocabulary.source:,}"
    if vocabulary.features:
        source = f"{vocabulary.features} features per frame"
    sizes = f"source {source}, target {vocabulary.target:,}"
    if vocabulary.joint:
        sizes = f"joint vocabulary of {vocabulary.source:,}"
    module = f" ({kind})" if what not in kind else ""
    print_lines(Text.assemble((what, "bold"), module, f"\n{sizes} ({note})\n"))
    print_table(
        ["part", ">layers", "shapes per layer", ">parameters", ">share"],
        [
            (
                part.name,
                str(part.copies) if part.copies > 1 else "",
                part.written,
                f"{part.parameters:,}",
                f"{100 * part.parameters / max(summary.parameters, 1):.1f} %",
            )
            for part in summary.parts
        ],
        soft_wrap=True,
    )
    frozen = summary.parameters - summary.trainable
    trainable = f"{summary.trainable:,} trainable" if frozen else "all trainable"
    print_lines(f"\n{summary.parameters:,} parameters, {trainable}")
    if tied := [name for part in summary.parts for name in part.tied]:
        print_lines(f"shared: {', '.join(tied)}")
    # Weights, gradients, AdamW's two moments and the running average, all fp32.
    fp32, bf16, training = (f"{summary.bytes_of(size) / 1e6:,.1f} MB" for size in (4, 2, 20))
    print_lines(f"weights {fp32} in fp32, {bf16} in bf16; training state {training}")
    if summary.flops:
        print_lines(
            f"{summary.flops / 1e6:,.1f} MFLOP per target token forward, three times that in "
            f"training, for {summary.source}\nsource positions and {summary.target} target tokens"
        )
    return None


def _print_shards(shards: "ShardSet", view: ShardView, *, as_json: bool) -> None:
    from vinedresser.figures.corpus import buckets, corpus_figures, coverage

    found, known, saved = buckets(shards, tokens=view.tokens), coverage(shards), []
    if view.pictures:
        # Outside the shard set, which is sealed.
        folder = Path(view.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in corpus_figures(shards, tokens=view.tokens).items():
            saved.append(str(folder / f"{shards.folder.name}-{name}"))
            figure.savefig(saved[-1], dpi=100)
    if as_json:
        keys = ("account", "lengths", "overlap", "notes", "padding_efficiency")
        plain = {key: shards.meta[key] for key in keys}
        more = {"buckets": [vars(b) for b in found], "coverage": known, "pictures": saved}
        return print_json(plain | more)
    print_lines(Text.assemble((shards.folder.name, "bold"), f", digest {shards.digest[:12]}\n"))
    columns = ["split", ">rows in", ">rows out", "dropped", "first lines"]
    print_table(columns, _account(shards.meta["account"]), soft_wrap=True)
    print_lines("")
    columns = ["lengths", ">total", ">mean", ">median", ">max", ">unknown", ">known"]
    print_table(columns, _lengths(shards.meta["lengths"], known), soft_wrap=True)
    print_lines("")
    most = max(bucket.rows for bucket in found)
    print_table(
        ["bucket", ">rows", f">real tokens of {view.tokens}", ""],
        [
            (
                f"{bucket.first}-{bucket.last}",
                f"{bucket.rows:,}",
                f"{100 * bucket.padding_efficiency:.1f} %",
                "▇" * round(30 * bucket.rows / most),
            )
            for bucket in found
        ],
        soft_wrap=True,
    )
    print_lines("")
    overlap = shards.meta["overlap"]
    if overlap.get("train_repeats"):
        print_lines(f"{overlap['train_repeats']:,} rows of train repeat an earlier pair")
    for split in ("dev", "test"):
        if own := overlap.get(split):
            at = ", ".join(map(str, own["train_lines"][:5]))
            print_lines(
                f"{own['sources']:,} rows of train have a source of {split}, {own['pairs']:,} also "
                "its target" + (f"; lines {at}" if at else "")
            )
    notes = (f"note: {note}" for note in shards.meta["notes"])
    return print_lines(*notes, *(f"figure: {name}" for name in saved))


def _lengths(
    lengths: Mapping[str, Any], known: Mapping[str, Mapping[str, float]]
) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a table of lengths: a line per split and side."""
    for split in _SPLITS:
        for side, own in lengths.get(split, {}).items():
            if side not in ("source", "target"):
                continue
            numbers = (f"{own['tokens']:,}", f"{own['mean']:.1f}", f"{own['median']:g}")
            has_ids = side in known[split]
            unknown = f"{own['unknown']:,}" if has_ids else "frames"
            share = f"{known[split][side]:.3f} %" if has_ids else ""
            yield f"{split} {side}", *numbers, str(own["max"]), unknown, share


def _account(account: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a table of dropped rows: a line per split and reason."""
    for split in _SPLITS:
        if split not in account:
            continue
        own = account[split]
        counts = [split, f"{own['rows_in']:,}", f"{own['rows_out']:,}"]
        dropped = sorted(own["dropped"].items(), key=lambda item: -item[1])
        for i, (reason, count) in enumerate(dropped or [("", 0)]):
            lines = ", ".join(map(str, own["first_lines"].get(reason, [])[:5]))
            words = [f"{count:,} {reason}" if reason else "none", lines]
            yield *(counts if i == 0 else ["", "", ""]), *words
