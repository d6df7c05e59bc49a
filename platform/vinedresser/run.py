"""run(): one experiment in this process, from shards to a bundle; resumable, recognised when done.

A run is named by its content: the same experiment on the same shards is the same run.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vinedresser.bundle import (
    load_bundle,
    refuse_other_pieces,
    save_bundle,
    vocabulary_of,
    warm_start,
)
from vinedresser.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from vinedresser.commit import digest_of, is_committed, verify, write_file
from vinedresser.config import Experiment
from vinedresser.data.batches.stream import load_split, stream
from vinedresser.data.shards.shard_set import ShardSet, tokenizers
from vinedresser.evaluate import Evaluated, evaluate
from vinedresser.metrics import is_better, is_lower_better, worst
from vinedresser.nn.gates import head_gates
from vinedresser.optim import build_optimizer
from vinedresser.tracking import Tracker
from vinedresser.train import (
    AveragedWeights,
    Effects,
    Place,
    evaluation_steps,
    fit,
    seed_step,
    training_steps,
)

_log = logging.getLogger("vinedresser")

# Log lines in a run: enough for a smooth curve, few enough for one batch of a tracking server.
_LOG_LINES = 50


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        key: content digest of experiment and data.
        folder: of the run.
        bundle: folder of the model that ships.
        scores: dev Scores of that model as plain JSON.
        best_step: the update after which it was taken.
        history: one entry an evaluation: step, value, teacher_forced_nats, and heads where gated.
        seconds: wall time of training and evaluation, over all resumptions.
        last_report: what was reported at the end.
    """

    key: str
    folder: str
    bundle: str
    scores: Mapping[str, Any]
    best_step: int
    history: list[dict[str, float]]
    seconds: float
    last_report: Mapping[str, float]

    @property
    def final_report(self) -> dict[str, Any]:
        """What a scheduler is told at the end, also by a run that was recognised as done."""
        return {**self.last_report, "is_last": 1.0, "run/bundle": self.bundle}

    @property
    def value(self) -> float:
        """The inferred metric on dev."""
        return float(self.scores[self.scores["metric"]])

    @property
    def selection_regret(self) -> float:
        """What selecting on the teacher-forced loss would have lost, metric units, >= 0."""
        by_loss = min(self.history, key=lambda entry: entry["teacher_forced_nats"])
        return abs(by_loss["value"] - self.value)


def run_key(experiment: Experiment, shards: ShardSet) -> str:
    """Content digest of a run: everything but its name, with data and initial weights by hash."""
    content = {**experiment.to_json(), "name": "", "task": shards.digest}
    if experiment.init is not None:
        content["init"] = verify(Path(experiment.init)).digest
    return digest_of(content)


def run_folder(experiment: Experiment, shards: ShardSet, workspace: Path) -> Path:
    """Where a run lives: workspace/runs/name-digest."""
    return workspace / "runs" / f"{experiment.name}-{run_key(experiment, shards)[:12]}"


def finished(folder: Path) -> Outcome | None:
    """The outcome of a run that ended well, else None."""
    try:
        outcome = Outcome(**json.loads((folder / "outcome.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return outcome if is_committed(Path(outcome.bundle)) else None


Report = Callable[[Mapping[str, Any]], None]


class Run:
    """One worker of one run. `execute` does it all; rank 0 alone evaluates and writes."""

    def __init__(
        self,
        experiment: Experiment,
        shards: ShardSet,
        folder: Path,
        *,
        place: Place,
        tracker: Tracker,
        report: Report,
    ) -> None:
        self.experiment, self.shards, self.folder = experiment, shards, folder
        self.place, self.tracker, self.report = place, tracker, report
        self.tokenizers = tokenizers(shards)
        seed_step(experiment.seed, 0, 0)
        joint = shards.task.has_joint_vocabulary
        self.model = experiment.model.build(vocabulary_of(*self.tokenizers, joint=joint))
        if experiment.init is not None:
            bundle = load_bundle(Path(experiment.init))
            refuse_other_pieces(bundle, *self.tokenizers)
            _log.info("warm start: %s", warm_start(self.model, bundle))
        self.model.place(encoder=place.of_encoder, decoder=place.device).train()
        self.optimizer = build_optimizer(
            self.model, experiment.optim, gate_lr_factor=experiment.objective.gate_lr_factor
        )
        self.averaged = AveragedWeights(self.model, experiment.optim.average)
        self.best: dict[str, Tensor] = {}
        self.best_step = 0
        self.best_scores: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.last_report: dict[str, float] = {}
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.dev = load_split(shards, "dev") if place.rank == 0 else None
        # A second copy of the model holds the averaged weights while they are judged.
        self.judged = experiment.model.build(vocabulary_of(*self.tokenizers, joint=joint))
        self.judged.place(encoder=place.of_encoder, decoder=place.device).eval()

    def execute(self) -> Outcome | None:
        """Trains to the end; the outcome on rank 0, None on the others."""
        experiment, place = self.experiment, self.place
        start = self._resume()
        batches = stream(
            self.shards,
            experiment.batch,
            seed=experiment.seed,
            rank=place.rank,
            of=place.workers,
            at=start,
        )
        steps = training_steps(
            self.model, batches, self.optimizer, experiment, place=place, start=start
        )
        is_first = place.rank == 0
        effects = Effects(
            log=self.tracker.log,
            evaluate=self._evaluate if is_first else self._follow,
            checkpoint=self._checkpoint if is_first else lambda _: None,
            log_every=max(1, experiment.steps // _LOG_LINES),
            evaluate_at=evaluation_steps(experiment),
            checkpoint_every=experiment.checkpoint_every,
        )
        # However training ends, the thread that reads ahead ends with it.
        with contextlib.closing(batches):
            fit(steps, self.averaged, effects, clip_norm=experiment.optim.clip_norm)
        return self._finish() if is_first else None

    @property
    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _evaluate(self, step: int) -> None:
        """Judges the averaged weights, keeps them if they ship, and reports the best so far."""
        evaluated = self._judge()
        scores, metric = evaluated.scores, self.experiment.task.metric
        entry = {
            "step": float(step),
            "value": scores.value,
            "teacher_forced_nats": scores.teacher_forced_nats,
        }
        gates = head_gates(self.judged)
        if gates:
            entry["heads"] = float(sum(int((g.deterministic() > 0).sum()) for g in gates))
        self.history.append(entry)
        so_far = float(self.best_scores.get(metric, worst(metric)))
        # Gates are still closing while the metric is at its best: with gates the last weights
        # ship, without them the best by the inferred metric (methods.md 13).
        if gates or is_better(metric, scores.value, so_far) or not self.best:
            self.best = {name: t.clone() for name, t in self.averaged.tensors.items()}
            self.best_step, self.best_scores = step, scores.to_json()
        logged = {
            f"dev/{metric}": scores.value,
            f"best/{metric}": float(self.best_scores[metric]),
            "dev/teacher_forced_nats": scores.teacher_forced_nats,
            "dev/teacher_forced_error": scores.teacher_forced_error,
            **_gap(evaluated),
            **({"dev/heads": entry["heads"]} if gates else {}),
        }
        self.tracker.log(logged, step)
        rows = ["source\treference\thypothesis", *("\t".join(r) for r in evaluated.samples())]
        self.tracker.text("\n".join(rows) + "\n", f"samples/step-{step:08d}.tsv")
        # A resumed or recognised run is compared at the evaluation where it is, not at its first.
        where = {"step": float(step), "evaluation": float(len(self.history))}
        self.last_report = {**logged, **where, "is_last": 0.0}
        # The last report is left to the host, after the outcome is written: a scheduler that stops
        # a trial at a report must find it finished.
        if step < self.experiment.steps:
            self.report(self.last_report)

    def _follow(self, step: int) -> None:
        """What ranks other than 0 do meanwhile: each rank reports equally often."""
        if step < self.experiment.steps:
            self.report({})

    def _judge(self) -> Evaluated:
        assert self.dev is not None
        task = self.experiment.task
        self.judged.load_state_dict(self.averaged.tensors)
        return evaluate(
            self.judged,
            self.dev,
            self.tokenizers[1],
            metric=task.metric,
            config=self.experiment.evaluation,
            cap=task.max_target_length,
        )

    def _checkpoint(self, step: int) -> None:
        checkpoint = Checkpoint(
            step,
            {
                "model": self.model.state_dict(),
                "average": self.averaged.tensors,
                "optimizer": optimizer_tensors(self.optimizer),
                "best": self.best,
            },
            {
                "best_step": self.best_step,
                "best_scores": self.best_scores,
                "history": self.history,
                "seconds": self._seconds,
                "last_report": self.last_report,
            },
        )
        save_checkpoint(self.folder / "checkpoints", checkpoint)

    def _resume(self) -> int:
        """Restores the newest good checkpoint; returns the updates done so far."""
        checkpoint = newest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            return 0
        self.model.load_state_dict(checkpoint.tensors["model"])
        restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
        with torch.no_grad():
            for name, tensor in checkpoint.tensors["average"].items():
                self.averaged.tensors[name].copy_(tensor)
        self.best = {n: t.to(self.place.device) for n, t in checkpoint.tensors["best"].items()}
        scalars = checkpoint.scalars
        self.best_step, self.best_scores = scalars["best_step"], scalars["best_scores"]
        self.history, self.seconds_before = scalars["history"], scalars["seconds"]
        self.last_report = scalars["last_report"]
        _log.info("resumed %s at step %d", self.folder.name, checkpoint.step)
        return checkpoint.step

    def _finish(self) -> Outcome:
        metric = self.experiment.task.metric
        scores = {
            "metric": metric,
            "lower_is_better": is_lower_better(metric),
            "dev": self.best_scores,
            "step": self.best_step,
        }
        bundle = save_bundle(
            self.folder / "bundle",
            experiment=self.experiment,
            weights=self.best,
            tokenizers=self.tokenizers,
            scores=scores,
        )
        key = run_key(self.experiment, self.shards)
        outcome = Outcome(
            key,
            str(self.folder),
            str(bundle),
            self.best_scores,
            self.best_step,
            self.history,
            self._seconds,
            self.last_report,
        )
        write_file(self.folder / "outcome.json", json.dumps(asdict(outcome), indent=1) + "\n")
        # Checkpoints were there to resume from; the bundle is what is left to use.
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.tracker.tag({"vinedresser.bundle": str(bundle)})
        return outcome


def _gap(evaluated: Evaluated) -> dict[str, float]:
    """Inferred minus teacher-forced error in percent points, for error metrics (methods.md 4)."""
    scores = evaluated.scores
    if not is_lower_better(scores.metric):
        return {}
    return {"dev/exposure_gap": scores.value - scores.teacher_forced_error}
