"""run(): one experiment in this process, from shards to a bundle; resumable, recognised when done.

A run is named by its content: the same experiment on the same shards is the same run.
"""

import contextlib
import glob
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vinedresser.attempt import Attempt, StopRequest, roll_back, rollbacks
from vinedresser.batch import PAD
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
from vinedresser.data.batches.prefetch import prefetched
from vinedresser.data.batches.stream import Batches, in_order, load_split
from vinedresser.data.shards.shard_set import ShardSet, tokenizers
from vinedresser.diagnostics.attention import AttentionWatch
from vinedresser.diagnostics.conditioning import conditioning_gap
from vinedresser.diagnostics.diagnosis import Diagnosis
from vinedresser.diagnostics.log import Facts
from vinedresser.errors import BusyError, DivergedError, InterruptedRunError, MachineError
from vinedresser.evaluate import Evaluated, evaluate
from vinedresser.metrics import is_better, is_lower_better, worst
from vinedresser.nn.gates import head_gates
from vinedresser.optim import build_optimizer, freeze
from vinedresser.tracking import NullTracker, Tracker
from vinedresser.train import (
    JUDGING,
    STORING,
    AveragedWeights,
    Best,
    Clock,
    Effects,
    Pace,
    Place,
    Step,
    Tell,
    Teller,
    Window,
    evaluation_steps,
    fit,
    seed_step,
    training_steps,
    untold,
)

_log = logging.getLogger("vinedresser")

# Log lines in a run: enough for a smooth curve, few enough for one batch of a tracking server.
_LOG_LINES = 50
# Dev sentences whose sources are exchanged at each evaluation: the standard error of the gap is
# below 0.2 nats a token from 64 sentences on.
_EXCHANGED = 128
_EXPERIMENT = "experiment.json"


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
    """Content digest of a run, with data and initial weights by hash.

    Name, workers, threads, devices and checkpoints are left out: they change nothing of what is
    trained beyond rounding, so that a run may go on with others (fault T14).
    """
    content = {**experiment.to_json(), "task": shards.digest}
    for key in ("name", "checkpoint_every", "keep_checkpoints"):
        del content[key]
    content["compute"] = {"precision": experiment.compute.precision}
    content["batch"] = {**content["batch"], "per_update": experiment.batches_an_update}
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


def clear(folder: Path) -> None:
    """Empties a run's folder; the lock on it stays."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def tell_changes(experiment: Experiment, folder: Path) -> None:
    """Says in what a new run differs from an unfinished one of its name (fault T16).

    Another experiment is another run with a folder of its own, so nothing can be mixed up; but
    whoever meant to resume should hear why it starts anew.
    """
    path = folder / _EXPERIMENT
    if path.is_file():
        return
    for other in sorted(folder.parent.glob(f"{glob.escape(experiment.name)}-{'?' * 12}")):
        if other == folder or (other / "outcome.json").is_file():
            continue
        with contextlib.suppress(OSError, ValueError):
            before = _flat(json.loads((other / _EXPERIMENT).read_text()))
            now = _flat(experiment.to_json())
            keys = sorted(k for k in before | now if before.get(k) != now.get(k))
            said = [f"{k} {before.get(k)} -> {now.get(k)}" for k in keys[:5]]
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            what = ", ".join(said) + more if said else "other data"
            _log.info("a new run; the unfinished %s differs: %s", other.name, what)
    write_file(path, json.dumps(experiment.to_json(), indent=1) + "\n")


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Dotted key -> leaf."""
    if not isinstance(value, Mapping):
        return {at: value}
    prefix = f"{at}." if at else ""
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}").items()}


Report = Callable[[Mapping[str, Any]], None]


class RolledBackError(DivergedError):
    """The run diverged and was allowed to go back; whoever hosts it makes another Run of it."""


class Run:
    """One worker of one run. `execute` does it all; rank 0 alone evaluates and writes."""

    def __init__(  # noqa: PLR0913 - what, where, and three listeners
        self,
        experiment: Experiment,
        shards: ShardSet,
        folder: Path,
        *,
        place: Place,
        tracker: Tracker,
        report: Report,
        tell: Tell = untold,
    ) -> None:
        self.experiment, self.shards, self.folder = experiment, shards, folder
        self.place, self.tracker, self.report = place, tracker, report
        self.batches = Batches(shards, experiment.batch, seed=experiment.seed)
        self.teller = Teller(tell, experiment, batches_an_epoch=self.batches.per_epoch)
        self.should_stop = StopRequest(folder)
        self.attempt: Attempt | None = None
        self.clock = Clock(
            folder,
            rank=place.rank,
            workers=place.workers,
            seconds=experiment.compute.hang_seconds,
        )
        self.pace = Pace(rank=place.rank, workers=place.workers)
        self.rollbacks = rollbacks(folder)
        self.tokenizers = tokenizers(shards)
        seed_step(experiment.seed, 0, 0)
        joint = shards.task.has_joint_vocabulary
        self.model = experiment.model.build(vocabulary_of(*self.tokenizers, joint=joint))
        if experiment.init is not None:
            bundle = load_bundle(Path(experiment.init))
            refuse_other_pieces(bundle, *self.tokenizers)
            account = warm_start(self.model, bundle, partial=experiment.init_partial)
            if place.rank == 0:
                _log.info("%s", account)
        if (frozen := freeze(self.model, experiment.optim.freeze)) and place.rank == 0:
            _log.info("frozen: %d tensors (%s ...)", len(frozen), ", ".join(frozen[:3]))
        self.model.place(encoder=place.of_encoder, decoder=place.device).train()
        self.optimizer = build_optimizer(
            self.model, experiment.optim, gate_lr_factor=experiment.objective.gate_lr_factor
        )
        self.averaged = AveragedWeights(self.model, experiment.optim.average)
        self.window = Window(
            experiment.optim.clip_norm,
            max_skipped=experiment.optim.max_skipped,
            uniform=math.log(self.tokenizers[1].size),
        )
        self.log_every = max(1, experiment.steps // _LOG_LINES)
        self.diagnosis = Diagnosis(
            self.model,
            Facts.of(experiment, vocabulary=self.tokenizers[1].size),
            tracker,
            every=self.log_every,
        )
        self.best: dict[str, Tensor] = {}
        self.best_step = self.step = 0
        self.best_scores: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.last_report: dict[str, float] = {}
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.dev = load_split(shards, "dev") if place.rank == 0 else None
        self.watch: AttentionWatch | None = None
        if self.dev is not None and not isinstance(tracker, NullTracker):
            self.watch = AttentionWatch(self.dev, self.tokenizers)
        # A second copy of the model holds the averaged weights while they are judged.
        self.judged = experiment.model.build(vocabulary_of(*self.tokenizers, joint=joint))
        self.judged.place(encoder=place.of_encoder, decoder=place.device).eval()

    def execute(self) -> Outcome | None:
        """Trains to the end; the outcome on rank 0, None on the others.

        Raises:
            InterruptedRunError: asked to stop; there is a checkpoint.
            BusyError: a later attempt has taken over.
            RolledBackError: diverged, and the next Run may go on from the last checkpoint.
            TrainingError: diverged, or failed before in the same way.
        """
        if self.place.rank == 0:
            self.attempt = Attempt(self.folder)
        try:
            return self._execute()
        except (BusyError, InterruptedRunError, MachineError):
            raise
        except Exception as error:
            if isinstance(error, DivergedError) and self.place.rank == 0:
                is_finite = not self.window.bad
                self.diagnosis.diverged(error.args[0], self.step, is_finite=is_finite)
            allowed = self.experiment.optim.rollbacks
            if isinstance(error, DivergedError) and self.rollbacks < allowed:
                roll_back(self.folder, done=self.rollbacks, reason=error.args[0])
                raise RolledBackError(
                    f"{error.args[0]}; rollback {self.rollbacks + 1} of {allowed}"
                ) from error
            if self.attempt is not None:
                self.attempt.failed(self.step, error)
            raise

    def _execute(self) -> Outcome | None:
        experiment, place = self.experiment, self.place
        start = self._resume()
        at = start * experiment.batches_a_rank
        batches = prefetched(self.batches.steps(rank=place.rank, of=place.workers, at=at))
        # Each rollback halves the rate.
        rate = experiment.optim.lr / 2**self.rollbacks
        is_first = place.rank == 0
        steps = training_steps(
            self.model,
            batches,
            self.optimizer,
            experiment.override({"optim.lr": rate}) if self.rollbacks else experiment,
            place=place,
            start=start,
            monitor=self.diagnosis.monitor if is_first else None,
            should_stop=self.should_stop,
        )
        effects = Effects(
            log=self._note,
            evaluate=self._evaluate if is_first else self._follow,
            checkpoint=self._checkpoint if is_first else lambda _: None,
            tell_bad=self._tell_bad,
            log_every=self.log_every,
            evaluate_at=evaluation_steps(experiment),
            checkpoint_every=experiment.checkpoint_every,
            tell=self.teller,
        )
        # However training ends, the thread that reads ahead ends with it.
        with contextlib.closing(batches), self.clock:
            # A run that was stopped at an evaluation makes up for it first.
            if start in effects.evaluate_at and self._judged_at < start:
                effects.evaluate(start)
            self.window.restart()
            self.teller(start, {})
            fit(self._counted(steps), self.averaged, self.window, effects)
        return self._finish() if is_first else None

    def _counted(self, steps: Iterator[Step]) -> Iterator[Step]:
        judged = evaluation_steps(self.experiment)
        for step in steps:
            self.step = step.index
            if step.index == 1 and self.experiment.init is None:
                self.diagnosis.begin(step.nats, step.tokens)
            self.pace.add(step.own_seconds)
            is_stored = step.index % self.experiment.checkpoint_every == 0
            patience = JUDGING if step.index in judged else STORING if is_stored else 1.0
            self.clock.beat(step.index, patience=patience)
            yield step

    def _note(self, metrics: Mapping[str, float], step: int) -> None:
        """At a log line, on all ranks; rank 0 writes it."""
        if slow := self.pace.compare():
            _log.warning("step %d: %s", step, slow)
        if self.place.rank == 0:
            self.diagnosis.note(metrics, step)

    @property
    def _judged_at(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    def _tell_bad(self, step: Step) -> None:
        """Leaves the batches of an update that was left out where they can be looked at (T01)."""
        rows = [
            {
                "row": int(row),
                "source": _ids(source_S) if source_S.dim() == 1 else f"{len(source_S)} frames",
                "target": self.tokenizers[1].decode(_ids(target_T)),
            }
            for batch in step.batches
            for row, source_S, target_T in zip(
                batch.rows_B, batch.source_BS, batch.target_BT, strict=True
            )
        ]
        path = self.folder / f"not-finite-{step.index:08d}-{self.place.rank}.json"
        write_file(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        _log.warning("step %d is not finite and was left out; its rows: %s", step.index, path)

    @property
    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _evaluate(self, step: int) -> None:
        """Judges the averaged weights, keeps them if they ship, and reports the best so far."""
        self.teller.judging(step)
        try:
            evaluated = self._judge()
        except InterruptedRunError:
            self._checkpoint(step)
            raise
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
        self.teller.best = self._best
        logged = {
            f"dev/{metric}": scores.value,
            f"best/{metric}": float(self.best_scores[metric]),
            "dev/teacher_forced_nats": scores.teacher_forced_nats,
            "dev/teacher_forced_error": scores.teacher_forced_error,
            **_gap(evaluated),
            **self._conditioning(),
            **self._attention(step),
            **({"dev/heads": entry["heads"]} if gates else {}),
        }
        self.diagnosis.note(logged, step)
        rows = ["source\treference\thypothesis", *("\t".join(r) for r in evaluated.samples())]
        self.tracker.text("\n".join(rows) + "\n", f"samples/step-{step:08d}.tsv")
        # A resumed or recognised run is compared at the evaluation where it is, not at its first.
        where = {"step": float(step), "evaluation": float(len(self.history))}
        self.last_report = {**logged, **where, "is_last": 0.0}
        # The last report is left to the host, after the outcome is written: a scheduler that stops
        # a trial at a report must find it finished.
        if step < self.experiment.steps:
            self.report(self.last_report)
        self.teller(step, {})

    @property
    def _best(self) -> Best | None:
        metric = self.experiment.task.metric
        if not self.best_scores:
            return None
        return Best(metric, float(self.best_scores[metric]), self.best_step)

    def _attention(self, step: int) -> Mapping[str, float]:
        """Pictures and diagonality of the attention to the source, where they are due."""
        every = self.experiment.evaluation.attention_every
        if self.watch is None or not every or len(self.history) % every:
            return {}
        return self.watch.look(self.judged, self.tracker, step)

    def _conditioning(self) -> dict[str, float]:
        """What sources of other sentences cost on a slice of dev, nats a token (methods.md 2)."""
        assert self.dev is not None
        tokens = self.experiment.evaluation.tokens
        with contextlib.suppress(ValueError):  # no batch of two sentences
            batches = in_order(self.dev, tokens=tokens, sentences=_EXCHANGED)
            found = conditioning_gap(self.judged, batches)
            return {"dev/conditioning_gap": found.gap, "dev/conditioning_error": found.error}
        return {}

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
            # Other ranks wait for the end of an evaluation; alone, a run may stop in it.
            should_stop=self.should_stop if self.place.workers == 1 else None,
        )

    def _checkpoint(self, step: int) -> None:
        assert self.attempt is not None
        self.attempt.require_current()
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
                "skipped": self.window.skipped,
                "lowest": self.window.lowest,
                "diagnosis": self.diagnosis.to_json(),
                "experiment": self.experiment.to_json(),
                "machine": self._machine,
            },
        )
        save_checkpoint(
            self.folder / "checkpoints", checkpoint, keep=self.experiment.keep_checkpoints
        )

    @property
    def _machine(self) -> dict[str, Any]:
        """What bits depend on beside the experiment (fault T15)."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "workers": self.place.workers,
            "device": self.place.device.type,
            "precision": str(self.place.autocast_dtype or torch.float32).removeprefix("torch."),
        }

    def _resume(self) -> int:
        """Restores the newest good checkpoint; returns the updates done so far."""
        is_first = self.place.rank == 0
        checkpoint = newest_checkpoint(self.folder / "checkpoints", is_first=is_first)
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
        self.teller.best = self._best
        self.window.skipped, self.window.lowest = scalars["skipped"], scalars["lowest"]
        self.diagnosis.restore(scalars["diagnosis"])
        self.step = checkpoint.step
        if is_first:
            _log.info("resumed %s at step %d", self.folder.name, checkpoint.step)
            before, now = scalars["machine"], self._machine
            changed = [
                f"{key} {before.get(key)} -> {now[key]}"
                for key in now
                if before.get(key) != now[key]
            ]
            if changed:
                _log.warning("not bit-exact from here on: %s", ", ".join(changed))
        return checkpoint.step

    def _finish(self) -> Outcome:
        assert self.attempt is not None
        self.attempt.require_current()
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


def _ids(ids: Tensor) -> list[int]:
    """Of one row, without padding."""
    return [i for i in ids.tolist() if i != PAD]
