"""What the verbs do once their configuration is read.

Ray Tune and Optuna are imported by the verbs that search: they would add 0.8 s to every other one.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from vinedresser.bundle import Bundle, load_bundle
from vinedresser.cli.progress import watching
from vinedresser.cli.show import closing_table, print_json, scores_table, trials_table
from vinedresser.cluster import connect
from vinedresser.config import Evaluation, Experiment, Section, Task, parse_overrides, resolve
from vinedresser.data.corpora.corpus import read
from vinedresser.data.shards import ShardSet
from vinedresser.data.shards import prepare as write_shards
from vinedresser.distributed import Site
from vinedresser.distributed import train as run_experiment
from vinedresser.errors import ConfigError
from vinedresser.evaluate import evaluate as score
from vinedresser.evaluate import tokenized
from vinedresser.registry.gate import Gate
from vinedresser.registry.registration import fetch, register
from vinedresser.tracking import Store, initialise, reap, run_folder, store_for
from vinedresser.workspace.commit import is_committed

if TYPE_CHECKING:
    from vinedresser.config.study import Study
    from vinedresser.pipeline import Pipeline
    from vinedresser.pruning.search import Pruning

Say = Callable[[str], None]

_TRANSLATE_LINES = 512


def show_plan(value: Section, *, as_json: bool) -> None:
    """The resolved configuration, the space and the resources of a dry run."""
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


def _open(task: Task, workspace: Path, say: Say) -> Store:
    """The task's tracking store, with the runs of killed processes closed."""
    store = store_for(workspace, task.name)
    initialise(store)
    for run_id in reap(store):
        say(f"tracking: run {run_id[:8]} of a killed process closed")
    return store


def _site(shards: ShardSet, workspace: Path, store: Store) -> Site:
    return Site(str(shards.folder.absolute()), str(workspace.absolute()), store)


def train(
    experiment: Experiment, workspace: Path, say: Say, *, from_scratch: bool, as_json: bool
) -> None:
    """One run; Ray is started for several workers only."""
    metric = experiment.task.metric

    def report(metrics: Mapping[str, Any]) -> None:
        if f"dev/{metric}" in metrics:
            say(
                f"step {metrics['step']:.0f}/{experiment.steps}  {metric} "
                f"{metrics[f'dev/{metric}']:.2f}  best {metrics[f'best/{metric}']:.2f}  "
                f"teacher-forced {metrics['dev/teacher_forced_nats']:.3f} nats"
            )

    with connect() if experiment.compute.workers > 1 else contextlib.nullcontext():
        shards = write_shards(experiment.task, workspace / "shards")
        # The tracking store is opened while training begins.
        site = _site(shards, workspace, store_for(workspace, experiment.task.name))
        with watching(say) as tell:
            outcome = run_experiment(
                experiment, site, report=report, tell=tell, from_scratch=from_scratch
            )
    if as_json:
        return print_json({"bundle": outcome.bundle, "scores": outcome.scores})
    say(f"dev {metric} {outcome.value:.2f} at step {outcome.best_step}")
    return print(outcome.bundle)


def sweep(study: "Study", workspace: Path, say: Say, *, as_json: bool) -> None:
    """A search, its table of trials, best first."""
    from vinedresser.sweep import sweep as run_study

    with connect(dashboard=study.base.compute.workers > 1):
        shards = write_shards(study.base.task, workspace / "shards")
        site = _site(shards, workspace, _open(study.base.task, workspace, say))
        trial_site = replace(site, kind="trial")
        outcome = run_study(study, trial_site, shards_digest=shards.digest, say=say)
    if as_json:
        return print_json(
            {"folder": outcome.folder, "trials": [vars(trial) for trial in outcome.trials]}
        )
    return trials_table(outcome)


def _existing(workspace: Path) -> Store:
    """The workspace's tracking store for reading, which must not make one.

    Raises:
        ConfigError: there is none yet.
    """
    store = store_for(workspace, "Default")
    file = store.uri.removeprefix("sqlite:///")
    if file != store.uri and not Path(file).exists():
        raise ConfigError(
            f"{workspace}: no runs and no models yet; `vinedresser train` makes some, or name "
            "another folder with --workspace"
        )
    return store


def locate(model: str, workspace: Path) -> Path:
    """The bundle folder behind a folder, a run id or a registry URI.

    Raises:
        ConfigError: nothing of that name.
    """
    if model.startswith("models:/"):
        return fetch(model, store=_existing(workspace), cache=workspace / "cache")
    folder = Path(model)
    if not folder.is_dir():
        found = run_folder(_existing(workspace), model) if "/" not in model else None
        if found is None:
            raise ConfigError(
                f"{model}: no such folder or run; name a bundle folder, a run id or "
                "models:/name@champion"
            )
        # The tag names where the run was; its workspace may have been moved since.
        folder = found if found.is_dir() else workspace / "runs" / found.name
    if not is_committed(folder) and is_committed(folder / "bundle"):
        return folder / "bundle"
    return folder


def prune(model: str, pruning: "Pruning", workspace: Path, say: Say, *, as_json: bool) -> None:
    """Prunes a finished model and prints what was gained and lost."""
    from vinedresser.pruning.search import Pruner

    folder = locate(model, workspace).absolute()
    whole = load_bundle(folder)
    with connect():
        shards = write_shards(whole.experiment.task, workspace / "shards")
        site = _site(shards, workspace, _open(whole.experiment.task, workspace, say))
        name = whole.experiment.name
        pruner = Pruner(name, pruning, folder, shards=shards, site=site, say=say)
        small = load_bundle(pruner.run())
    if as_json:
        return print_json({"bundle": str(small.folder), "scores": dict(small.scores)})
    scores_table(small)
    return print(small.folder)


def export(model: str, name: str, overrides: list[str], workspace: Path, *, as_json: bool) -> None:
    """Registers a bundle."""
    gate = Gate().override(parse_overrides(overrides))
    bundle = locate(model, workspace)
    store = store_for(workspace, load_bundle(bundle).experiment.task.name)
    registered = register(bundle, name=name, store=store, gate=gate)
    if as_json:
        return print_json(vars(registered))
    verdict = "champion" if registered.is_champion else "not champion"
    return print(f"{name} version {registered.version}: {verdict}, {registered.reason}")


def retrain(pipeline: "Pipeline", name: str, workspace: Path, say: Say, *, as_json: bool) -> None:
    """The whole chain and its closing table; `name` is what the pipeline was called by."""
    from vinedresser.pipeline import retrain as run_pipeline

    table = run_pipeline(pipeline, workspace, say=say, watch=lambda: watching(say))
    if as_json:
        return print_json(table)
    return closing_table(table, name, workspace)


class _Scoring(Section):
    """What `evaluate` and `translate` may be told beside the task's own keys."""

    split: Literal["train", "dev", "test"] = "test"
    beam: PositiveInt = 1
    length_alpha: NonNegativeFloat = 0.6


def evaluate(
    model: str, task: str, overrides: list[str], workspace: Path, *, as_json: bool
) -> None:
    """Scores a model on a split of a task's corpus, read by the model's own tokenizers."""
    own = [word for word in overrides if word.partition("=")[0] in _Scoring.model_fields]
    scoring = _Scoring().override(parse_overrides(own))
    rest = [word for word in overrides if word not in own]
    value = resolve(task, [Task], overrides=rest)
    bundle = load_bundle(locate(model, workspace))
    rows = [(row.source, row.target) for row in read(value, scoring.split)]
    evaluated = score(
        bundle.model,
        tokenized(rows, bundle.source_tokenizer, bundle.target_tokenizer),
        bundle.target_tokenizer,
        metric=value.metric,
        config=Evaluation(beam=scoring.beam, length_alpha=scoring.length_alpha),
        cap=value.max_target_length,
    )
    result = {"split": scoring.split, "beam": scoring.beam, **evaluated.scores.to_json()}
    if as_json:
        return print_json(result)
    for key, item in result.items():
        print(f"{key:22} {item:.4f}" if isinstance(item, float) else f"{key:22} {item}")
    return None


def translate(model: str, overrides: list[str], workspace: Path, *, as_json: bool) -> None:
    """Standard input to standard output, as many lines out as in; an empty line stays empty."""
    options = _Scoring().override(parse_overrides(overrides))
    bundle = load_bundle(locate(model, workspace))
    lines: list[str] = []
    for line in sys.stdin:
        lines.append(line.rstrip("\n").rstrip("\r"))
        if len(lines) == _TRANSLATE_LINES or sys.stdin.isatty():
            _flush(bundle, lines, options.beam, as_json=as_json)
            lines = []
    _flush(bundle, lines, options.beam, as_json=as_json)


def _flush(bundle: Bundle, lines: list[str], beam: int, *, as_json: bool) -> None:
    full = [line for line in lines if line.strip()]
    outputs = iter(bundle.translate(full, beam=beam) if full else [])
    for line in lines:
        text = next(outputs) if line.strip() else ""
        print(json.dumps({"source": line, "output": text}, ensure_ascii=False) if as_json else text)
    sys.stdout.flush()


def runs(task: str, workspace: Path, *, as_json: bool) -> None:
    """Sweeps and runs of one task or of all, best first."""
    from vinedresser.cli.show import runs_table
    from vinedresser.tracking import experiments, leaderboard

    store = _existing(workspace)
    names = [task] if task else experiments(store)
    boards = {name: leaderboard(store, experiment=name) for name in names}
    if as_json:
        return print_json({name: [vars(row) for row in rows] for name, rows in boards.items()})
    return runs_table(boards)
