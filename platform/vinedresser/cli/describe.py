"""`describe`: what a model is made of, or what a shard set holds."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table

from vinedresser.bundle import load_bundle
from vinedresser.cli.show import print_json
from vinedresser.config import Experiment, ModelConfig, Section, Task, parse_overrides, resolve
from vinedresser.config.kinds import ZOO, kinds, named_model, presets
from vinedresser.config.section import did_you_mean
from vinedresser.config.study import Study
from vinedresser.data.prepare.report import PADDING_TOKENS
from vinedresser.data.shards import ShardSet, open_shards
from vinedresser.errors import ConfigError
from vinedresser.figures.corpus import buckets, coverage, figures
from vinedresser.health.summary import Summary, summarise
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.pipeline import Pipeline
from vinedresser.workspace.commit import is_committed, read_manifest

# A forward pass of more would take longer than anybody waits for a table.
_MAX_PASS = 400_000_000
_SPLITS = ("train", "dev", "test")


class _Sizes(Section):
    """What a model is built for, where no task says so."""

    # Ids of either side; 0 takes the task's, or 8,000.
    source: NonNegativeInt = 0
    target: NonNegativeInt = 0
    # One vocabulary for both sides; needed by `tie: all`.
    joint: bool | None = None
    # Above 0 the source is frames of so many numbers.
    features: NonNegativeInt = 0


def describe(what: str, overrides: list[str], workspace: Path, *, as_json: bool) -> None:
    """Finds out what a word means, and prints it.

    Raises:
        ConfigError: nothing of that name.
    """
    folder = Path(what)
    if folder.is_dir():
        return _folder(folder, overrides, as_json=as_json)
    words = parse_overrides(overrides)
    sizes = _Sizes().override({k: v for k, v in words.items() if k in _Sizes.model_fields})
    changes = {k: v for k, v in words.items() if k not in _Sizes.model_fields}
    if what in kinds(ZOO) or what in presets() or what.startswith("trainables."):
        model, task = _model(what, changes), None
    else:
        experiment = _experiment(what, changes)
        model, task = experiment.model, experiment.task
    vocabulary, note = _vocabulary(sizes, task, workspace)
    try:
        built = model.instantiate(vocabulary)
    except ConfigError as error:
        raise ConfigError(
            f"{what}: {error.args[0]}; sizes are keys: joint=true, source=8000"
        ) from None
    return _show_model(what, model, built, vocabulary, note, as_json=as_json)


def _model(name: str, changes: Mapping[str, Any]) -> ModelConfig:
    try:
        model = named_model(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return model.override({key.removeprefix("model."): value for key, value in changes.items()})


def _experiment(what: str, changes: Mapping[str, Any]) -> Experiment:
    """An experiment, or that of a study or a pipeline."""
    if "/" not in what and "." not in what:
        names = [*kinds(ZOO), *presets()]
        raise ConfigError(f"{what}: there is no model of that name{did_you_mean(what, names)}")
    wanted: list[type[Section]] = [Experiment, Study, Pipeline]
    value = resolve(what, wanted)
    value = value.study if isinstance(value, Pipeline) else value
    value = value.base if isinstance(value, Study) else value
    assert isinstance(value, Experiment)
    return value.override(changes)


def _vocabulary(sizes: _Sizes, task: Task | None, workspace: Path) -> tuple[Vocabulary, str]:
    """The given sizes, those of the task's shards, or a usual size; and which of them it is."""
    given, found = sizes.model_fields_set and (sizes.source or sizes.features), None
    if task is not None and not given:
        found = _prepared(task, workspace)
    if found is not None:
        return found, "sizes of the prepared shards"
    text = task.tokenizer.vocab_size if task is not None and task.tokenizer else 8000
    joint = task.has_joint_vocabulary if task is not None else not sizes.features
    joint = joint if sizes.joint is None else sizes.joint
    source = 0 if sizes.features else sizes.source or text
    target = sizes.target or (source if joint and source else text)
    note = "sizes as given" if given else "assumed: no shards; source=N target=N say others"
    return Vocabulary(source, target, joint and source == target, sizes.features), note


def _prepared(task: Task, workspace: Path) -> Vocabulary | None:
    """The sizes of the task's newest shard set in the workspace, unverified."""
    for folder in sorted((workspace / "shards").glob(f"{task.name}-*"), reverse=True):
        if is_committed(folder):
            meta = read_manifest(folder).meta
            if _is_of(meta, task):
                source, target = (meta["tokenizers"][side] for side in ("source", "target"))
                joint = task.has_joint_vocabulary
                return Vocabulary(source["size"], target["size"], joint, source.get("features", 0))
    return None


def _is_of(meta: Mapping[str, Any], task: Task) -> bool:
    try:
        return Task.from_json(meta.get("task")) == task
    except ConfigError:  # of another version
        return False


def _folder(folder: Path, overrides: list[str], *, as_json: bool) -> None:
    """A bundle, a run with a bundle, or a shard set."""
    inner = folder if is_committed(folder) else folder / "bundle"
    if not is_committed(inner):
        raise ConfigError(f"{folder}: neither a shard set nor a model; it has no manifest.json")
    if read_manifest(inner).meta.get("kind") == "bundle":
        bundle = load_bundle(inner)
        encoder, decoder = bundle.source_tokenizer, bundle.target_tokenizer
        joint = bundle.experiment.task.has_joint_vocabulary
        vocabulary = Vocabulary(encoder.size, decoder.size, joint, encoder.features)
        config = bundle.experiment.model
        return _show_model(str(inner), config, bundle.model, vocabulary, "sizes of the bundle",
                           as_json=as_json)  # fmt: skip
    options = _Shards().override(parse_overrides(overrides))
    return _show_shards(open_shards(inner), options, as_json=as_json)


def _show_model(
    what: str, config: ModelConfig, model: Seq2Seq, vocabulary: Vocabulary, note: str, *,
    as_json: bool,
) -> None:  # fmt: skip
    count = sum(p.numel() for p in model.parameters())
    summary = summarise(model, vocabulary, flops=count <= _MAX_PASS)
    if as_json:
        plain = asdict(summary) | {"vocabulary": vars(vocabulary), "model": config.to_json()}
        return print_json(plain)
    console = Console(soft_wrap=True, highlight=False)
    console.print(_title(what, config, vocabulary, note))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "layers", "shapes, a layer", "parameters", "share"):
        is_text = column.startswith(("part", "shapes")) and column != "parameters"
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for part in summary.parts:
        table.add_row(
            part.name,
            str(part.copies) if part.copies > 1 else "",
            part.written,
            f"{part.parameters:,}",
            f"{100 * part.parameters / max(summary.parameters, 1):.1f} %",
        )
    console.print(table)
    for line in _closing(summary):
        console.print(line)
    return None


def _title(what: str, config: ModelConfig, vocabulary: Vocabulary, note: str) -> str:
    kind = type(config).__module__
    name = f"[bold]{what}[/bold]" + (f" ({kind})" if what not in kind else "")
    if vocabulary.joint:
        sizes = f"joint vocabulary of {vocabulary.source:,}"
    else:
        source = f"{vocabulary.features} features a frame" if vocabulary.features else ""
        sizes = f"source {source or f'{vocabulary.source:,}'}, target {vocabulary.target:,}"
    return f"{name}\n{sizes} ({note})\n"


def _closing(summary: Summary) -> list[str]:
    frozen = summary.parameters - summary.trainable
    lines = [
        f"\n{summary.parameters:,} parameters, "
        + ("all trainable" if not frozen else f"{summary.trainable:,} trainable")
    ]
    tied = [name for part in summary.parts for name in part.tied]
    if tied:
        lines.append(f"shared: {', '.join(tied)}")
    # Weights, gradients, AdamW's two moments and the running average, all fp32.
    lines.append(
        f"weights {_megabytes(summary.bytes_of(4))} in fp32, "
        f"{_megabytes(summary.bytes_of(2))} in bf16; training state "
        f"{_megabytes(summary.bytes_of(20))}"
    )
    if summary.flops:
        lines.append(
            f"{summary.flops / 1e6:,.1f} MFLOP a target token forward, three times that in "
            f"training, for {summary.source}\nsource positions and {summary.target} target tokens"
        )
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


class _Shards(Section):
    """How a shard set is shown."""

    # Budget of padded tokens that padding is stated for.
    tokens: PositiveInt = PADDING_TOKENS
    # Folder of the pictures; `pictures=` for none.
    pictures: str | None = "pictures"


def _show_shards(shards: ShardSet, options: _Shards, *, as_json: bool) -> None:
    found = buckets(shards, tokens=options.tokens)
    saved = _save(shards, options)
    keys = ("account", "lengths", "overlap", "notes", "padding")
    if as_json:
        plain = {key: shards.meta[key] for key in keys}
        return print_json(
            plain
            | {"buckets": [vars(b) for b in found], "coverage": coverage(shards), "pictures": saved}
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{shards.folder.name}[/bold], digest {shards.digest[:12]}\n")
    console.print(_account(shards))
    console.print()
    console.print(_lengths(shards))
    console.print()
    console.print(_by_bucket(found, options.tokens))
    console.print()
    for line in _overlap(shards.meta["overlap"]):
        console.print(line)
    for note in shards.meta["notes"]:
        console.print(f"note: {note}")
    for name in saved:
        console.print(f"picture: {name}")
    return None


def _save(shards: ShardSet, options: _Shards) -> list[str]:
    """The pictures, beside the user: a shard set is sealed and takes no more files."""
    if not options.pictures:
        return []
    folder = Path(options.pictures)
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for name, figure in figures(shards, tokens=options.tokens).items():
        path = folder / f"{shards.folder.name}-{name}"
        figure.savefig(path, dpi=100)
        saved.append(str(path))
    return saved


def _account(shards: ShardSet) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("split", "rows in", "rows out", "dropped", "first lines"):
        table.add_column(column, justify="right" if column.startswith("rows") else "left")
    for split in _SPLITS:
        if split not in shards.meta["account"]:
            continue
        own = shards.meta["account"][split]
        counts = [split, f"{own['rows_in']:,}", f"{own['rows_out']:,}"]
        dropped = sorted(own["dropped"].items(), key=lambda item: -item[1])
        for i, (reason, count) in enumerate(dropped or [("", 0)]):
            lines = ", ".join(map(str, own["first_lines"].get(reason, [])[:5]))
            words = [f"{count:,} {reason}" if reason else "none", lines]
            table.add_row(*(counts if i == 0 else ["", "", ""]), *words)
    return table


def _lengths(shards: ShardSet) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(("lengths", "in all", "mean", "median", "max", "unknown", "known")):
        table.add_column(column, justify="right" if i else "left")
    known = coverage(shards)
    for split in _SPLITS:
        for side in ("source", "target") if split in known else ():
            own = shards.meta["lengths"][split][side]
            share = f"{known[split][side]:.3f} %" if side in known[split] else ""
            unknown = f"{own['unknown']:,}" if share else "frames"
            table.add_row(
                f"{split} {side}", f"{own['tokens']:,}", f"{own['mean']:.1f}",
                f"{own['median']:g}", str(own["max"]), unknown, share,
            )  # fmt: skip
    return table


def _by_bucket(found: list[Any], tokens: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(("bucket", "rows", f"real tokens of {tokens}", "")):
        table.add_column(column, justify="left" if i in (0, 3) else "right")
    most = max(bucket.rows for bucket in found)
    for bucket in found:
        table.add_row(
            f"{bucket.first}-{bucket.last}", f"{bucket.rows:,}", f"{100 * bucket.padding:.1f} %",
            "▇" * round(30 * bucket.rows / most),
        )  # fmt: skip
    return table


def _overlap(overlap: Mapping[str, Any]) -> list[str]:
    """Repeats inside train, and rows of dev and test that stand in it."""
    lines = []
    if overlap.get("train_repeats"):
        lines.append(f"{overlap['train_repeats']:,} rows of train repeat an earlier pair")
    for split in ("dev", "test"):
        if own := overlap.get(split):
            at = ", ".join(map(str, own["train_lines"][:5]))
            lines.append(
                f"{own['sources']:,} rows of train have a source of {split}, {own['pairs']:,} its "
                f"target too" + (f"; lines {at}" if at else "")
            )
    return lines
