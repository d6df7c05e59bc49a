"""The chain: prepare, sweep, finalist, prune, compact, register. One value defines it; idempotent.

Every step is named by the content of its inputs: the same pipeline recognises finished steps, and
a killed one resumes where it was.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt

from vinedresser.bundle import Bundle, load_bundle
from vinedresser.cluster.admission import require_shared_store
from vinedresser.cluster.connect import connect, is_named
from vinedresser.config import Experiment, SafeName, Section
from vinedresser.config.study import Study
from vinedresser.data.shards import prepare
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train
from vinedresser.errors import BusyError, MachineError
from vinedresser.figures.training import curves, heads_against_quality
from vinedresser.pruning.heads import count_heads
from vinedresser.pruning.search import HEADS_METRIC, Pruner, Pruning, held_out
from vinedresser.registry.gate import Gate
from vinedresser.registry.registration import Registered, register
from vinedresser.sweep import TrialRow, short_params, sweep
from vinedresser.tracking import Tracker, ending, open_run, prepare_store, store_for
from vinedresser.training.listener import Listener
from vinedresser.training.outcome import Outcome, finished, run_folder
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.layout import SpoolFolder, Workspace
from vinedresser.workspace.storage import write_file

_log = logging.getLogger(__name__)

Watch = Callable[[Experiment], AbstractContextManager[Listener]]


def unwatched(experiment: Experiment) -> AbstractContextManager[Listener]:
    """Display nothing of a training."""
    del experiment
    return nullcontext(Listener())


class Pipeline(Section):
    """All inputs of `retrain`, as one value."""

    name: SafeName
    study: Study
    # Keys in which the finalist's training differs from the best trial's, from whose weights it
    # starts.
    finalist: Mapping[str, Any] = {}
    pruning: Pruning
    # Name of the registered model.
    model_name: SafeName
    gate: Gate = Field(default_factory=Gate)
    # Replaces the seed of the study and its experiments when given.
    seed: NonNegativeInt | None = None

    def seeded(self) -> "Pipeline":
        """Return the pipeline with its seed in the study and its base experiment."""
        if self.seed is None:
            return self
        seeds = {"study.seed": self.seed, "study.base.seed": self.seed, "seed": None}
        return self.override(seeds)

    def finalist_experiment(self, best: TrialRow) -> Experiment:
        """Return the best configuration, trained further from the best trial's weights."""
        base = self.study.base.override(best.params)
        changes = {"name": f"{self.name}-finalist", "init": best.bundle, **self.finalist}
        return base.override(changes)


@dataclass(frozen=True)
class Retrained:
    """Result of a pipeline.

    Attributes:
        finalist: the trained finalist.
        small: the pruned model, with the scores of both.
        registered: its version in the registry.
        split: the split that both models are scored on.
        seconds: wall time of this call.
    """

    finalist: Outcome
    small: Bundle
    registered: Registered
    split: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the closing table as plain JSON."""
        finalist, scores = self.finalist, self.small.scores
        metric, heads = scores["metric"], scores["heads"]
        before, after = scores["finalist"], scores[self.split]
        return {
            "metric": metric,
            "split": self.split,
            f"finalist_{metric}": round(before[metric], 3),
            f"pruned_{metric}": round(after[metric], 3),
            "teacher_forced_loss": round(finalist.scores["teacher_forced_loss"], 4),
            "selection_regret": round(finalist.selection_regret, 3),
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
            "model": self.registered.name,
            "bundle": str(self.small.folder),
            "version": self.registered.version,
            "champion_version": self.registered.champion_version,
            "verdict": self.registered.verdict,
            "reason": self.registered.reason,
            "scores": dict(self.registered.scores),
            "signature": after["signature"],
            "seconds": self.seconds,
        }


def _run_steps(
    pipeline: Pipeline, context: RunContext, tracker: Tracker, watch: Watch
) -> tuple[Outcome, Bundle, Registered]:
    """Return the finalist, the pruned model and its version; each step recognises finished work."""
    study = pipeline.study
    _log.info("sweep: %d trials over %s", study.num_trials, ", ".join(study.space))
    trials = sweep(study, replace(context, kind="trial"))
    best, metric = trials.best, trials.metric
    _log.info(
        "sweep: best %s %.2f: trial %d (%s)",
        metric, best.values[metric], best.number, short_params(best.params),
    )  # fmt: skip

    experiment = pipeline.finalist_experiment(best)
    is_known = finished(run_folder(experiment, context.shards, context.workspace)) is not None
    known = " unchanged," if is_known else ""
    _log.info("finalist:%s %d steps from trial %d", known, experiment.steps, best.number)
    with watch(experiment) as listener:
        finalist = train(experiment, context, listener=listener)
    _log.info(
        "finalist: dev %s %.2f at step %d; selection by the loss would have cost %.2f",
        metric, finalist.value, finalist.best_step, finalist.selection_regret,
    )  # fmt: skip
    figure = curves(finalist.history, metric=metric, chosen=finalist.best_step)
    tracker.figure(figure, "finalist.png")

    whole = load_bundle(Path(finalist.bundle))
    pruner = Pruner(pipeline.name, pipeline.pruning, whole, context=context)
    prunings = pruner.search()
    chosen = pruner.choose(prunings)
    figure = heads_against_quality(
        [(trial.values[HEADS_METRIC], trial.values[metric]) for trial in prunings.complete],
        metric=metric,
        whole=(sum(heads.total for heads in count_heads(whole.model).values()), finalist.value),
        taken=chosen.values[HEADS_METRIC],
    )
    tracker.figure(figure, "heads.png")
    small = pruner.finish(chosen)

    # The champion alias moves last, through the gate.
    try:
        registered = register(
            small.manifest,
            name=pipeline.model_name,
            store=context.store,
            gate=pipeline.gate.override({"split": held_out(context.shards)}),
            run_id=tracker.run_id or None,
            data=lambda: context.shards,
        )
    except MachineError as error:
        raise BusyError(
            f"{error.args[0]}; all steps are finished, left to register as {pipeline.model_name}: "
            f"{small.folder}. Run the same command once the store answers"
        ) from error
    _log.info(
        "register: %s version %d %s: %s", registered.name, registered.version, registered.verdict,
        registered.reason,
    )  # fmt: skip
    return finalist, small, registered


def retrain(pipeline: Pipeline, workspace: Path, *, watch: Watch = unwatched) -> Retrained:
    """Run the chain; finished steps are recognised.

    Args:
        pipeline: the chain's definition.
        workspace: folder of shards, runs, sweeps and the tracking database.
        watch: opens a display of the finalist's training.

    Raises:
        VinedresserError: with the reason and the fix; everything finished so far is kept.
    """
    started = time.perf_counter()
    pipeline, place = pipeline.seeded(), Workspace(workspace.absolute())
    task = pipeline.study.base.task
    store = store_for(place.path, task.name)
    with connect(dashboard=pipeline.study.base.compute.workers > 1, search=True):
        require_shared_store(store)
        # The corpus comes first: a bad one leaves no database behind.
        shards = prepare(task, place.shards)
        prepare_store(store)
        key = digest_of({**pipeline.to_json(), "task": shards.digest})[:12]
        tracker = open_run(
            store,
            SpoolFolder(place.tracking / key),
            key=key,
            params={"pipeline": pipeline.name, "study": pipeline.study.name},
            tags={
                "mlflow.runName": f"{pipeline.name}-{key}",
                "vinedresser.kind": "pipeline",
                "vinedresser.metric": task.metric,
                "vinedresser.task": task.name,
                "vinedresser.folder": str(place.path),
            },
        )
        with ending(tracker):
            tracker.wait_for_opening()
            context = RunContext(shards, place, store, parent=key, is_remote=is_named())
            done = _run_steps(pipeline, context, tracker, watch)
            seconds = round(time.perf_counter() - started, 1)
            result = Retrained(*done, held_out(shards), seconds)
            table = result.to_json()
            numbers = {k: float(v) for k, v in table.items() if isinstance(v, int | float)}
            tracker.log({f"final/{key}": value for key, value in numbers.items()}, 1)
            tracker.log({f"best/{task.metric}": numbers[f"pruned_{task.metric}"]}, 1)
            tracker.tag({"mlflow.note.content": _markdown(table)})
            content = json.dumps(table, indent=1) + "\n"
            tracker.text(content, "closing_table.json")
            write_file(place.pipeline_table(pipeline.name), content)
    return result


def _markdown(table: Mapping[str, Any]) -> str:
    """Return the closing table as the description of the pipeline's tracking run."""
    metric = table["metric"]
    rows = [
        ("", "finalist", "pruned"),
        ("---", "---", "---"),
        (f"inferred {metric}", table[f"finalist_{metric}"], table[f"pruned_{metric}"]),
        ("heads", table["heads_total"], table["heads_kept"]),
        ("parameters", *table["parameters"]),
        ("greedy sentences/s", *table["sentences_per_second"]),
    ]
    return "\n".join(
        [
            f"Version {table['version']} of {table['model']}; champion is version "
            f"{table['champion_version']}. Parity: {table['parity_max_abs']:.1e}.",
            "",
            *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
        ]
    )
