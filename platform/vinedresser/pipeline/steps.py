"""Steps of pipelines: each has a name, a reason to run and an action.

Every step is named by the content of its inputs: its action recognises a finished result, and
resumes a killed one where it was.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vinedresser.bundle import Bundle, load_bundle
from vinedresser.config import Experiment, Task
from vinedresser.data.shards import ShardSet, locate, prepare
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train
from vinedresser.errors import BusyError, MachineError
from vinedresser.figures.training import curves, heads_against_quality
from vinedresser.pipeline.definition import Pipeline, StepName
from vinedresser.pruning.heads import count_heads
from vinedresser.pruning.search import HEADS_METRIC, Pruner, held_out
from vinedresser.registry.drift import measure_drift
from vinedresser.registry.registration import fetch, is_decided, register
from vinedresser.sweep import SweepOutcome, short_params, sweep
from vinedresser.sweep.search import locate_sweep, read_outcome
from vinedresser.tracking import (
    NullTracker,
    Store,
    Tracker,
    store_for,
)
from vinedresser.training.listener import Listener
from vinedresser.training.outcome import Outcome, finished, run_folder
from vinedresser.workspace.commit import is_committed
from vinedresser.workspace.layout import Workspace

_log = logging.getLogger(__name__)

Watch = Callable[[Experiment], AbstractContextManager[Listener]]


def unwatched(experiment: Experiment) -> AbstractContextManager[Listener]:
    """Display nothing of a training."""
    del experiment
    return nullcontext(Listener())


@dataclass
class Chain:
    """Results of the steps of one pipeline so far.

    Attributes:
        pipeline: definition.
        workspace: folder of shards, runs, sweeps and the tracking database.
        watch: opens a display of a training.
        tracker: tracking run of the pipeline.
        parent: its key; None where nothing is tracked.
        is_remote: whether work of one process goes to the cluster that the user named.
        table: results as plain JSON.
        shards: of `prepare`.
        trials: of `sweep`.
        trained: of `finalist` or `finetune`; None where the champion has seen all of the data.
        small: of `prune`.
    """

    pipeline: Pipeline
    workspace: Workspace
    watch: Watch = unwatched
    tracker: Tracker = field(default_factory=NullTracker)
    parent: str | None = None
    is_remote: bool = False
    table: dict[str, Any] = field(default_factory=dict)
    shards: ShardSet = field(init=False)
    trials: SweepOutcome = field(init=False)
    trained: Outcome | None = None
    small: Bundle | None = None

    @cached_property
    def store(self) -> Store:
        """Tracking store and registry."""
        return store_for(self.workspace.path, self.pipeline.study.base.task.name)

    @cached_property
    def champion(self) -> Bundle:
        """The present champion of the registered model.

        Raises:
            ConfigError: there is none.
        """
        uri = f"models:/{self.pipeline.model_name}@champion"
        return load_bundle(fetch(uri, store=self.store, cache=self.workspace.champions))

    @cached_property
    def task(self) -> Task:
        """The study's task, with the champion's tokenizers where the champion reads its data."""
        task = self.pipeline.study.base.task
        if {"finetune", "evaluate"} & set(self.pipeline.steps):
            return task.model_copy(update={"tokenizers_of": str(self.champion.folder)})
        return task

    @property
    def context(self) -> RunContext:
        """Opened values for the runs of the pipeline."""
        return RunContext(
            self.shards,
            self.workspace,
            self.store,
            parent=self.parent,
            is_remote=self.is_remote,
        )

    @property
    def split(self) -> str:
        """Split on which models are compared."""
        return held_out(self.shards)

    @property
    def is_seen(self) -> bool:
        """Return True if the champion was trained on exactly this corpus."""
        corpus = self.shards.meta.get("corpus")
        return corpus is not None and self.champion.scores.get("corpus") == corpus

    def experiment(self, name: str) -> Experiment:
        """Return the experiment of `finalist` or `finetune`."""
        if name == "finetune":
            return self.pipeline.finetune_experiment(self.champion, self.task)
        return self.pipeline.finalist_experiment(self.trials.best)

    def pruner(self) -> Pruner:
        """Return the pruning of the trained model."""
        assert self.trained is not None
        whole = load_bundle(Path(self.trained.bundle))
        return Pruner(self.pipeline.name, self.pipeline.pruning, whole, self.context)


@dataclass(frozen=True)
class Step:
    """One step of a pipeline.

    Attributes:
        name: in the field `steps` of a pipeline.
        reason: why it would run; "" where its result is known. Reads, and changes nothing.
        action: runs it, or recognises its result, and adds the result to the chain.
        uses_ray: whether the action may use a cluster.
    """

    name: StepName
    reason: Callable[[Chain], str]
    action: Callable[[Chain], None]
    uses_ray: bool = True


def _why_prepare(chain: Chain) -> str:
    folder = locate(chain.task, chain.workspace.shards).folder
    return "" if is_committed(folder) else f"no shard set {folder.name} of this corpus and task"


def _prepare(chain: Chain) -> None:
    chain.shards = prepare(chain.task, chain.workspace.shards)
    chain.table |= {"metric": chain.task.metric, "split": chain.split}


def _why_sweep(chain: Chain) -> str:
    _, folder = locate_sweep(chain.pipeline.study, chain.context)
    known = read_outcome(folder, chain.workspace)
    if known is None and folder.journal.exists():
        return f"{folder.name} has not ended"
    return "" if known else f"no sweep {folder.name} of this study on this data"


def _sweep(chain: Chain) -> None:
    study = chain.pipeline.study
    _log.info("sweep: %d trials over %s", study.num_trials, ", ".join(study.space))
    chain.trials = trials = sweep(study, replace(chain.context, kind="trial"))
    best, metric = trials.best, trials.metric
    _log.info(
        "sweep: best %s %.2f: trial %d (%s)",
        metric, best.values[metric], best.number, short_params(best.params),
    )  # fmt: skip


def _why_train(chain: Chain, name: str) -> str:
    if name == "finetune" and chain.is_seen:
        return ""
    folder = run_folder(chain.experiment(name), chain.shards, chain.workspace)
    if finished(folder) is not None:
        return ""
    is_open = folder.checkpoints.is_dir()
    return f"{folder.name} has not ended" if is_open else f"no run {folder.name}"


def _train(chain: Chain, name: str) -> None:
    if name == "finetune" and chain.is_seen:
        chain.small = chain.champion
        return _log.info("finetune: unchanged, the champion was trained on this corpus")
    experiment, metric = chain.experiment(name), chain.task.metric
    is_known = finished(run_folder(experiment, chain.shards, chain.workspace)) is not None
    known = " unchanged," if is_known else ""
    _log.info("%s:%s %d steps from %s", name, known, experiment.steps, experiment.init)
    with chain.watch(experiment) as listener:
        trained = train(experiment, chain.context, listener=listener)
    _log.info(
        "%s: dev %s %.2f at step %d; selection by the loss would have cost %.2f",
        name, metric, trained.value, trained.best_step, trained.selection_regret,
    )  # fmt: skip
    figure = curves(trained.history, metric=metric, chosen=trained.best_step)
    chain.tracker.figure(figure, f"{name}.png")
    chain.trained = trained
    chain.table |= {
        "teacher_forced_loss": round(trained.scores["teacher_forced_loss"], 4),
        "selection_regret": round(trained.selection_regret, 3),
    }
    return None


def _why_prune(chain: Chain) -> str:
    return "" if chain.small is not None else chain.pruner().missing()


def _prune(chain: Chain) -> None:
    if chain.small is not None:
        return
    pruner, metric = chain.pruner(), chain.task.metric
    gated = pruner.whole
    if pruner.kinds:
        prunings = pruner.search()
        chosen = pruner.choose(prunings)
        assert chain.trained is not None
        figure = heads_against_quality(
            [(trial.values[HEADS_METRIC], trial.values[metric]) for trial in prunings.complete],
            metric=metric,
            whole=(
                sum(heads.total for heads in count_heads(pruner.whole.model).values()),
                chain.trained.value,
            ),
            taken=chosen.values[HEADS_METRIC],
        )
        chain.tracker.figure(figure, "heads.png")
        gated = load_bundle(Path(chosen.bundle))
    else:
        _log.info("prune: every kind of head was pruned before; the model stays as it is")
    chain.small = small = pruner.finish(gated)
    scores, heads = small.scores, small.scores["heads"]
    before, after = scores["finalist"], scores[chain.split]
    chain.table |= {
        f"finalist_{metric}": round(before[metric], 3),
        f"pruned_{metric}": round(after[metric], 3),
        "finalist_exact_error": round(before["exact_error"], 2),
        "pruned_exact_error": round(after["exact_error"], 2),
        "heads": heads,
        "heads_kept": sum(kind["kept"] for kind in heads.values()),
        "heads_total": sum(kind["total"] for kind in heads.values()),
        "parameters": scores["parameters"],
        "sentences_per_second": scores["sentences_per_second"],
        "parity_max_abs": scores["parity_max_abs"],
        "parity_max_abs_fp32": scores["parity"]["max_abs_fp32"],
        "parity_same_output": scores["parity"]["is_same_output"],
        "bundle": str(small.folder),
        "signature": after["signature"],
    }


def _why_register(chain: Chain) -> str:
    assert chain.small is not None
    name = chain.pipeline.model_name
    if is_decided(chain.small.digest, name=name, store=chain.store):
        return ""
    return f"{chain.small.folder.name} is not a version of {name}"


def _register(chain: Chain) -> None:
    """Move the champion alias, last and through the gate."""
    assert chain.small is not None
    name, small = chain.pipeline.model_name, chain.small
    try:
        registered = register(
            small.manifest,
            name=name,
            store=chain.store,
            gate=chain.pipeline.gate.override({"split": chain.split}),
            run_id=chain.tracker.run_id or None,
            data=lambda: chain.shards,
        )
    except MachineError as error:
        raise BusyError(
            f"{error.args[0]}; all steps are finished, left to register as {name}: "
            f"{small.folder}. Run the same command once the store answers"
        ) from error
    _log.info(
        "register: %s version %d %s: %s", registered.name, registered.version, registered.verdict,
        registered.reason,
    )  # fmt: skip
    chain.table |= {
        "model": registered.name,
        "version": registered.version,
        "champion_version": registered.champion_version,
        "verdict": registered.verdict,
        "reason": registered.reason,
        "scores": dict(registered.scores),
    }


def _why_evaluate(chain: Chain) -> str:
    name = chain.pipeline.model_name
    drift = measure_drift(name, chain.shards, chain.split, store=chain.store, is_dry=True)
    return "" if drift else f"the champion of {name} has no score on these references"


def _evaluate(chain: Chain) -> None:
    """Score the champion on the data, and record by how much it became worse."""
    drift = measure_drift(chain.pipeline.model_name, chain.shards, chain.split, store=chain.store)
    assert drift is not None
    _log.info("evaluate: %s", drift.reason)
    chain.table |= {
        "model": chain.pipeline.model_name,
        "champion_version": drift.version,
        "verdict": "unchanged" if drift.is_known else "kept",
        "reason": drift.reason,
        "drift": drift.worse_by,
        "scores": {
            "metric": drift.metric,
            "split": chain.split,
            "challenger": None,
            "champion": drift.now,
        },
    }


STEPS: Mapping[str, Step] = {
    step.name: step
    for step in (
        Step("prepare", _why_prepare, _prepare),
        Step("sweep", _why_sweep, _sweep),
        Step("finalist", lambda c: _why_train(c, "finalist"), lambda c: _train(c, "finalist")),
        Step("finetune", lambda c: _why_train(c, "finetune"), lambda c: _train(c, "finetune")),
        Step("prune", _why_prune, _prune),
        Step("register", _why_register, _register, uses_ray=False),
        Step("evaluate", _why_evaluate, _evaluate, uses_ray=False),
    )
}
