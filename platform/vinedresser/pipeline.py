"""The chain: prepare, sweep, finalist, prune, compact, register. One value says what; idempotent.

Every step is named by the content of what goes into it, so that running the same pipeline again
recognises what is done, and a killed one goes on where it was.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt

from vinedresser.bundle import Bundle, load_bundle
from vinedresser.cluster import connect
from vinedresser.config import Experiment, MetricName, SafeName, Section
from vinedresser.config.study import Study
from vinedresser.data.shards import ShardSet, prepare
from vinedresser.distributed import Site, train
from vinedresser.figures.training import curves, heads_against_quality
from vinedresser.pruning.heads import count_heads
from vinedresser.pruning.search import Pruner, Pruning, Say
from vinedresser.registry.gate import Gate
from vinedresser.registry.registration import Registered, register
from vinedresser.sweep import SweepOutcome, TrialRow, short_params, sweep
from vinedresser.tracking import Store, Tracker, ending, initialise, open_run, reap, store_for
from vinedresser.training.outcome import Outcome, finished, run_folder
from vinedresser.training.progress import Tell, untold
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.storage import write_file


class Pipeline(Section):
    """Everything that `retrain` does, as one value."""

    name: SafeName
    study: Study
    # Keys in which the finalist's training differs from the best trial's: it goes on from the
    # trial's weights.
    finalist: Mapping[str, Any] = {}
    pruning: Pruning
    # Name of the registered model.
    model_name: SafeName
    gate: Gate = Field(default_factory=Gate)
    # Replaces the seed of the study and its experiments when given.
    seed: NonNegativeInt | None = None

    def seeded(self) -> "Pipeline":
        """The pipeline with its seed put where it counts."""
        if self.seed is None:
            return self
        seeds = {"study.seed": self.seed, "study.base.seed": self.seed, "seed": None}
        return self.override(seeds)

    def finalist_experiment(self, best: TrialRow) -> Experiment:
        """The best configuration, trained on from the best trial's weights."""
        base = self.study.base.override(best.params)
        changes = {"name": f"{self.name}-finalist", "init": best.bundle, **self.finalist}
        return base.override(changes)


Watch = Callable[[], AbstractContextManager[Tell]]


def unwatched() -> AbstractContextManager[Tell]:
    """Nobody looks on."""
    return nullcontext(untold)


def retrain(
    pipeline: Pipeline, workspace: Path, *, say: Say, watch: Watch = unwatched
) -> dict[str, Any]:
    """Runs the chain and returns its closing table; what is done already is recognised.

    Args:
        pipeline: what to do.
        workspace: folder of shards, runs, sweeps and the tracking database.
        say: takes one line of progress.
        watch: opens what shows how far the finalist's training is.

    Raises:
        VinedresserError: with the reason and the fix; everything finished so far is kept.
    """
    started = time.perf_counter()
    pipeline = pipeline.seeded()
    workspace = workspace.absolute()
    task = pipeline.study.base.task
    store = store_for(workspace, task.name)
    with connect(dashboard=pipeline.study.base.compute.workers > 1):
        # The corpus comes first: a bad one leaves no database behind.
        shards = prepare(task, workspace / "shards")
        initialise(store)
        for run_id in reap(store):
            say(f"tracking: run {run_id[:8]} of a killed process closed")
        chain = Chain(pipeline, shards, workspace, store, say)
        chain.watch = watch
        return chain.run(started)


class Chain:
    """The steps of one `retrain`, each a method that takes what the one before returned."""

    def __init__(
        self, pipeline: Pipeline, shards: ShardSet, workspace: Path, store: Store, say: Say
    ) -> None:
        self.pipeline, self.shards, self.workspace = pipeline, shards, workspace
        self.store, self.say = store, say
        self.watch: Watch = unwatched
        self.task = pipeline.study.base.task
        self.metric: MetricName = self.task.metric
        self.site = Site(str(shards.folder), str(workspace), store)
        self.held_out = "test" if "test" in shards.counts else "dev"

    def run(self, started: float) -> dict[str, Any]:
        """All steps under one tracking run."""
        tracker = self._open()
        with ending(tracker):
            self.site = replace(self.site, parent=tracker.run_id)
            trials = self.search()
            finalist = self.train_finalist(trials)
            tracker.figure(
                curves(finalist.history, metric=self.metric, chosen=finalist.best_step),
                "finalist.png",
            )
            small = self.prune(finalist, tracker)
            bundle = load_bundle(small)
            registered = self.register(bundle, tracker)
            table = self.table(finalist, bundle, registered)
            table["seconds"] = round(time.perf_counter() - started, 1)
            self._close(tracker, table)
        return table

    def _open(self) -> Tracker:
        key = digest_of({**self.pipeline.to_json(), "task": self.shards.digest})[:12]
        return open_run(
            self.store,
            key=key,
            name=f"{self.pipeline.name}-{key}",
            params={"pipeline": self.pipeline.name, "study": self.pipeline.study.name},
            tags={
                "vinedresser.kind": "pipeline",
                "vinedresser.metric": self.metric,
                "vinedresser.task": self.task.name,
                "vinedresser.folder": str(self.workspace),
            },
        )

    def search(self) -> SweepOutcome:
        """Step 2: trials judged by the inferred metric."""
        study = self.pipeline.study
        self.say(f"sweep: {study.num_trials} trials over {', '.join(study.space)}")
        site = replace(self.site, kind="trial")
        outcome = sweep(study, site, shards_digest=self.shards.digest, say=self.say)
        best = outcome.best
        self.say(
            f"sweep: best {self.metric} {best.value:.2f} by trial {best.number} "
            f"({short_params(best.params)})"
        )
        return outcome

    def train_finalist(self, trials: SweepOutcome) -> Outcome:
        """Step 3: the best configuration, trained on."""
        experiment = self.pipeline.finalist_experiment(trials.best)
        folder = run_folder(experiment, self.shards, self.workspace)
        known = " unchanged," if finished(folder) else ""
        self.say(f"finalist:{known} {experiment.steps} steps from trial {trials.best.number}")
        report = self._progress(experiment)
        with self.watch() as tell:
            outcome = train(experiment, self.site, report=report, tell=tell)
        self.say(
            f"finalist: dev {self.metric} {outcome.value:.2f} at step {outcome.best_step}; "
            f"selecting on the loss would have cost {outcome.selection_regret:.2f}"
        )
        return outcome

    def _progress(self, experiment: Experiment) -> Callable[[Mapping[str, Any]], None]:
        def report(metrics: Mapping[str, Any]) -> None:
            if f"dev/{self.metric}" in metrics:
                self.say(
                    f"  step {metrics['step']:.0f}/{experiment.steps}  {self.metric} "
                    f"{metrics[f'dev/{self.metric}']:.2f}  teacher-forced "
                    f"{metrics['dev/teacher_forced_nats']:.3f} nats"
                )

        return report

    def prune(self, finalist: Outcome, tracker: Tracker) -> Path:
        """Steps 4 and 5: fewer heads, then the compacted bundle with its certificate."""
        pruner = Pruner(
            self.pipeline.name,
            self.pipeline.pruning,
            Path(finalist.bundle),
            shards=self.shards,
            site=self.site,
            say=self.say,
        )
        trials = pruner.search()
        chosen = pruner.choose(trials)
        points = [(trial.heads or 0.0, trial.value) for trial in trials.complete]
        total = sum(heads.total for heads in count_heads(pruner.whole.model).values())
        tracker.figure(
            heads_against_quality(
                points,
                metric=self.metric,
                whole=(total, finalist.value),
                taken=chosen.heads or 0.0,
            ),
            "heads.png",
        )
        return pruner.compact(chosen)

    def register(self, bundle: Bundle, tracker: Tracker) -> Registered:
        """Step 6: a version in the registry; the champion alias moves last, through the gate."""
        name = self.pipeline.model_name
        gate = self.pipeline.gate.override({"split": self.held_out})
        registered = register(
            bundle.manifest, name=name, store=self.store, gate=gate, run_id=tracker.run_id or None
        )
        known = " (unchanged)" if registered.already else ""
        verdict = "is champion" if registered.is_champion else "is not champion"
        self.say(
            f"register: {name} version {registered.version}{known} {verdict}: {registered.reason}"
        )
        return registered

    def table(self, finalist: Outcome, small: Bundle, registered: Registered) -> dict[str, Any]:
        """The closing table as plain JSON."""
        scores = small.scores
        heads = scores["heads"]
        before, after = scores["finalist"], scores[self.held_out]
        return {
            "metric": self.metric,
            "split": self.held_out,
            f"finalist_{self.metric}": round(before[self.metric], 3),
            f"pruned_{self.metric}": round(after[self.metric], 3),
            "teacher_forced_nats": round(finalist.scores["teacher_forced_nats"], 4),
            "selection_regret": round(finalist.selection_regret, 3),
            "finalist_exact_error": round(before["exact_error"], 2),
            "pruned_exact_error": round(after["exact_error"], 2),
            "heads": heads,
            "heads_kept": sum(kind["kept"] for kind in heads.values()),
            "heads_total": sum(kind["total"] for kind in heads.values()),
            "parameters": scores["parameters"],
            "sentences_per_second": scores["sentences_per_second"],
            "parity_max_abs": scores["parity_max_abs"],
            "parity_same_output": scores["parity"]["is_same_output"],
            "model": self.pipeline.model_name,
            "bundle": str(small.folder),
            "version": registered.version,
            "champion_version": registered.champion_version,
            "signature": after["signature"],
        }

    def _close(self, tracker: Tracker, table: Mapping[str, Any]) -> None:
        numbers = {k: float(v) for k, v in table.items() if isinstance(v, int | float)}
        tracker.log({f"final/{key}": value for key, value in numbers.items()}, 1)
        tracker.log({f"best/{self.metric}": numbers[f"pruned_{self.metric}"]}, 1)
        tracker.tag({"mlflow.note.content": _markdown(table)})
        content = json.dumps(table, indent=1) + "\n"
        tracker.text(content, "closing_table.json")
        write_file(self.workspace / f"{self.pipeline.name}.json", content)


def _markdown(table: Mapping[str, Any]) -> str:
    """The closing table as the description of the pipeline's run."""
    metric = table["metric"]
    slow, fast = table["sentences_per_second"]
    before, after = table["parameters"]
    rows = [
        ("", "finalist", "pruned"),
        ("---", "---", "---"),
        (f"inferred {metric}", table[f"finalist_{metric}"], table[f"pruned_{metric}"]),
        ("heads", table["heads_total"], table["heads_kept"]),
        ("parameters", before, after),
        ("greedy sentences/s", slow, fast),
    ]
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(
        [
            f"Version {table['version']} of {table['model']}; champion is version "
            f"{table['champion_version']}. Parity: {table['parity_max_abs']:.1e}.",
            "",
            *lines,
        ]
    )
