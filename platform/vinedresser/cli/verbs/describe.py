"""`describe`: what a model is made of, or what a shard set holds."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from vinedresser.cli.arguments import HERE, AsJson, Overrides, Workspace
from vinedresser.cli.render import print_json, print_lines, print_table

if TYPE_CHECKING:
    from vinedresser.cli.options import ShardView, Sizes
    from vinedresser.config import ModelConfig, Task
    from vinedresser.data.shards import ShardSet
    from vinedresser.health.summary import ModelSummary
    from vinedresser.model import Seq2Seq, Vocabulary

# Parameters above which a forward pass would take longer than the table is worth.
_MAX_PASS = 400_000_000
_SPLITS = ("train", "dev", "test")


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
    from vinedresser.cli.options import ShardView, Sizes, split_words
    from vinedresser.config import parse_overrides
    from vinedresser.errors import ConfigError
    from vinedresser.workspace import layout
    from vinedresser.workspace.commit import is_committed, read_manifest

    words = overrides or []
    folder = Path(what)
    if not folder.is_dir():
        sizes, changes = split_words(Sizes(), words)
        model, task = _configuration(what, changes)
        vocabulary, note = _vocabulary(sizes, task, workspace)
        try:
            _refuse_without_memory(model, vocabulary)
            built = model.instantiate(vocabulary)
        except ConfigError as error:
            raise ConfigError(
                f"{what}: {error.args[0]}; sizes are keys: joint=true, source=8000"
            ) from None
        return _print_model(_title(what, model, vocabulary, note), model, built, vocabulary,
                            as_json=as_json)  # fmt: skip
    if not is_committed(folder) and is_committed(layout.RunFolder(folder).bundle):
        folder = layout.RunFolder(folder).bundle
    if not is_committed(folder):
        raise ConfigError(f"{folder}: neither a shard set nor a model; it has no manifest.json")
    if read_manifest(folder).meta.get("kind") == "bundle":
        from vinedresser.bundle import load_bundle, vocabulary_of

        bundle = load_bundle(folder)
        model, joint = bundle.experiment.model, bundle.experiment.task.has_joint_vocabulary
        vocabulary = vocabulary_of(bundle.source_tokenizer, bundle.target_tokenizer, joint=joint)
        title = _title(str(folder), model, vocabulary, "sizes of the bundle")
        return _print_model(title, model, bundle.model, vocabulary, as_json=as_json)
    from vinedresser.data.shards import open_shards

    view = ShardView().override(parse_overrides(words))
    return _print_shards(open_shards(folder), view, as_json=as_json)


def _refuse_without_memory(config: "ModelConfig", vocabulary: "Vocabulary") -> None:
    """Refuse weights that are larger than the memory, by building the model without storage.

    The system may end a process that fills the memory before any allocation fails.

    Raises:
        ConfigError: the size that is needed, and the one that is there.
    """
    import psutil
    import torch

    from vinedresser.errors import ConfigError

    try:
        with torch.device("meta"):
            needed = 4 * sum(p.numel() for p in config.instantiate(vocabulary).parameters())
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())[:300]) from None
    there = psutil.virtual_memory().total
    if needed > there:
        raise ConfigError(
            f"the weights take {needed / 1e9:,.0f} GB, this machine has {there / 1e9:,.0f} GB; "
            "choose smaller sizes"
        )


def _configuration(what: str, changes: Mapping[str, Any]) -> "tuple[ModelConfig, Task | None]":
    """Return the model of a name or of an experiment, and the experiment's task."""
    from vinedresser.config import Experiment, resolve
    from vinedresser.config.kinds import ZOO, kinds, named_model, presets
    from vinedresser.config.section import did_you_mean
    from vinedresser.config.study import Study
    from vinedresser.errors import ConfigError
    from vinedresser.pipeline import Pipeline

    try:
        names = [*kinds(ZOO), *presets()]
        if what in names or what.startswith(f"{ZOO}."):
            bare = {key.removeprefix("model."): value for key, value in changes.items()}
            return named_model(what).override(bare), None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if "/" not in what and "." not in what:
        raise ConfigError(f"{what}: there is no model of that name{did_you_mean(what, names)}")
    wanted: list[Any] = [Experiment, Study, Pipeline]
    value = resolve(what, wanted)
    value = value.study if isinstance(value, Pipeline) else value
    value = value.base if isinstance(value, Study) else value
    experiment = value.override(changes)
    return experiment.model, experiment.task


def _vocabulary(sizes: "Sizes", task: "Task | None", workspace: Path) -> "tuple[Vocabulary, str]":
    """Return the given sizes, those of the task's shards, or a usual size; and which they are."""
    from vinedresser.model import Vocabulary

    given = sizes.model_fields_set and (sizes.source or sizes.features)
    if task is not None and not given and (found := _prepared(task, workspace)):
        return found, "sizes of the prepared shards"
    text = task.tokenizer.vocab_size if task is not None and task.tokenizer else 8000
    joint = task.has_joint_vocabulary if task is not None else not sizes.features
    joint = joint if sizes.joint is None else sizes.joint
    source = 0 if sizes.features else sizes.source or text
    target = sizes.target or (source if joint and source else text)
    note = "sizes as given" if given else "assumed: no shards; source=N target=N say others"
    return Vocabulary(source, target, joint and source == target, sizes.features), note


def _prepared(task: "Task", workspace: Path) -> "Vocabulary | None":
    """Return the sizes of the task's newest shard set in the workspace, unverified."""
    from vinedresser.config import Task
    from vinedresser.errors import ConfigError
    from vinedresser.model import Vocabulary
    from vinedresser.workspace import layout
    from vinedresser.workspace.commit import is_committed, read_manifest

    for folder in sorted(layout.Workspace(workspace).shards.glob(f"{task.name}-*"), reverse=True):
        if not is_committed(folder):
            continue
        meta = read_manifest(folder).meta
        try:
            stored = Task.from_json(meta.get("task"))
        except ConfigError:  # of another version
            continue
        if stored == task:
            source, target = (meta["tokenizers"][side] for side in ("source", "target"))
            joint = task.has_joint_vocabulary
            return Vocabulary(source["size"], target["size"], joint, source.get("features", 0))
    return None


def _title(what: str, config: "ModelConfig", vocabulary: "Vocabulary", note: str) -> Text:
    kind = type(config).__module__
    if vocabulary.joint:
        sizes = f"joint vocabulary of {vocabulary.source:,}"
    else:
        source = f"{vocabulary.features} features a frame" if vocabulary.features else ""
        sizes = f"source {source or f'{vocabulary.source:,}'}, target {vocabulary.target:,}"
    return Text.assemble(
        (what, "bold"), f" ({kind})" if what not in kind else "", f"\n{sizes} ({note})\n"
    )


def _print_model(
    title: Text, config: "ModelConfig", model: "Seq2Seq", vocabulary: "Vocabulary", *, as_json: bool
) -> None:
    from vinedresser.health.summary import summarise

    count = sum(p.numel() for p in model.parameters())
    summary = summarise(model, vocabulary, flops=count <= _MAX_PASS)
    if as_json:
        plain = asdict(summary) | {"vocabulary": vars(vocabulary), "model": config.to_json()}
        return print_json(plain)
    print_lines(title)
    print_table(
        ["part", ">layers", "shapes, a layer", ">parameters", ">share"],
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
    return print_lines(*_closing(summary))


def _closing(summary: "ModelSummary") -> Iterator[str]:
    frozen = summary.parameters - summary.trainable
    trainable = f"{summary.trainable:,} trainable" if frozen else "all trainable"
    yield f"\n{summary.parameters:,} parameters, {trainable}"
    if tied := [name for part in summary.parts for name in part.tied]:
        yield f"shared: {', '.join(tied)}"
    # Weights, gradients, AdamW's two moments and the running average, all fp32.
    fp32, bf16, training = (f"{summary.bytes_of(size) / 1e6:,.1f} MB" for size in (4, 2, 20))
    yield f"weights {fp32} in fp32, {bf16} in bf16; training state {training}"
    if summary.flops:
        yield (
            f"{summary.flops / 1e6:,.1f} MFLOP a target token forward, three times that in "
            f"training, for {summary.source}\nsource positions and {summary.target} target tokens"
        )


def _print_shards(shards: "ShardSet", view: "ShardView", *, as_json: bool) -> None:
    from vinedresser.figures.corpus import buckets, corpus_figures, coverage

    found, known, saved = buckets(shards, tokens=view.tokens), coverage(shards), []
    if view.pictures:
        # Beside the user: a shard set is sealed and takes no more files.
        folder = Path(view.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in corpus_figures(shards, tokens=view.tokens).items():
            saved.append(str(folder / f"{shards.folder.name}-{name}"))
            figure.savefig(saved[-1], dpi=100)
    if as_json:
        keys = ("account", "lengths", "overlap", "notes", "padding")
        plain = {key: shards.meta[key] for key in keys}
        more = {"buckets": [vars(b) for b in found], "coverage": known, "pictures": saved}
        return print_json(plain | more)
    print_lines(Text.assemble((shards.folder.name, "bold"), f", digest {shards.digest[:12]}\n"))
    columns = ["split", ">rows in", ">rows out", "dropped", "first lines"]
    print_table(columns, _account(shards.meta["account"]), soft_wrap=True)
    print_lines("")
    columns = ["lengths", ">in all", ">mean", ">median", ">max", ">unknown", ">known"]
    print_table(columns, _lengths(shards.meta["lengths"], known), soft_wrap=True)
    print_lines("")
    most = max(bucket.rows for bucket in found)
    print_table(
        ["bucket", ">rows", f">real tokens of {view.tokens}", ""],
        [
            (
                f"{bucket.first}-{bucket.last}",
                f"{bucket.rows:,}",
                f"{100 * bucket.padding:.1f} %",
                "▇" * round(30 * bucket.rows / most),
            )
            for bucket in found
        ],
        soft_wrap=True,
    )
    return print_lines(
        "",
        *_overlap(shards.meta["overlap"]),
        *(f"note: {note}" for note in shards.meta["notes"]),
        *(f"picture: {name}" for name in saved),
    )


def _account(account: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
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


def _lengths(lengths: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for split in _SPLITS:
        for side in ("source", "target") if split in known else ():
            own = lengths[split][side]
            share = f"{known[split][side]:.3f} %" if side in known[split] else ""
            yield (
                f"{split} {side}", f"{own['tokens']:,}", f"{own['mean']:.1f}",
                f"{own['median']:g}", str(own["max"]),
                f"{own['unknown']:,}" if share else "frames", share,
            )  # fmt: skip


def _overlap(overlap: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on repeats inside train, and one per split whose rows stand in train."""
    if overlap.get("train_repeats"):
        yield f"{overlap['train_repeats']:,} rows of train repeat an earlier pair"
    for split in ("dev", "test"):
        if own := overlap.get(split):
            at = ", ".join(map(str, own["train_lines"][:5]))
            yield (
                f"{own['sources']:,} rows of train have a source of {split}, {own['pairs']:,} its "
                f"target too" + (f"; lines {at}" if at else "")
            )
