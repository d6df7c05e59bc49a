"""Run: one worker of one experiment, from shards to a bundle; resumable at any step."""

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vinedresser.batch import PAD
from vinedresser.bundle import (
    load_bundle,
    refuse_other_pieces,
    save_bundle,
    vocabulary_of,
    warm_start,
)
from vinedresser.config import Experiment
from vinedresser.data.batching.prefetch import prefetched
from vinedresser.data.batching.reader import Batches
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.errors import BusyError, DivergedError, InterruptedRunError, MachineError
from vinedresser.health.monitor import RunMonitor
from vinedresser.health.rules import RunFacts
from vinedresser.tracking import Tracker
from vinedresser.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from vinedresser.training.device import Device, seed_step
from vinedresser.training.evaluator import Evaluator
from vinedresser.training.fit import AveragedWeights, Effects, Window, evaluation_steps, fit
from vinedresser.training.optimizer import build_optimizer, freeze
from vinedresser.training.outcome import Outcome, run_key
from vinedresser.training.progress import Tell, Teller, untold
from vinedresser.training.step import Step, training_steps
from vinedresser.training.watchdog import JUDGING, STORING, Clock, Pace
from vinedresser.workspace.history import RunHistory
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.lease import Lease, StopRequest
from vinedresser.workspace.storage import write_file

_log = logging.getLogger("vinedresser")

# Log lines in a run: enough for a smooth curve, few enough for one batch of a tracking server.
_LOG_LINES = 50

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
        device: Device,
        tracker: Tracker,
        report: Report,
        tell: Tell = untold,
    ) -> None:
        self.experiment, self.shards, self.folder = experiment, shards, folder
        self.device, self.tracker, self.report = device, tracker, report
        self.batches = Batches(shards, experiment.batch, seed=experiment.seed)
        self.teller = Teller(tell, experiment, batches_an_epoch=self.batches.per_epoch)
        self.should_stop = StopRequest(folder)
        self.lease = Lease(RunFolder(folder).writer_lease)
        self.history = RunHistory(RunFolder(folder).history)
        self.clock = Clock(
            folder,
            rank=device.rank,
            workers=device.world_size,
            seconds=experiment.compute.hang_seconds,
        )
        self.pace = Pace(rank=device.rank, workers=device.world_size)
        self.rollbacks = self.history.rollbacks
        self.tokenizers = tokenizers(shards)
        seed_step(experiment.seed, 0, 0)
        joint = shards.task.has_joint_vocabulary
        self.model = experiment.model.instantiate(vocabulary_of(*self.tokenizers, joint=joint))
        if experiment.init is not None:
            bundle = load_bundle(Path(experiment.init))
            refuse_other_pieces(bundle, *self.tokenizers)
            account = warm_start(
                self.model, bundle, experiment.model, partial=experiment.init_partial
            )
            if device.rank == 0:
                _log.info("%s", account)
        if (frozen := freeze(self.model, experiment.optim.freeze)) and device.rank == 0:
            _log.info("frozen: %d tensors (%s ...)", len(frozen), ", ".join(frozen[:3]))
        self.model.to_devices(encoder=device.encoder_device, decoder=device.primary).train()
        self.optimizer = build_optimizer(
            self.model, experiment.optim, gate_lr_factor=experiment.objective.gate_lr_factor
        )
        self.averaged = AveragedWeights(self.model, experiment.optim.ema_decay)
        self.window = Window(
            experiment.optim.clip_norm,
            max_skipped=experiment.optim.max_skipped,
            uniform=math.log(self.tokenizers[1].size),
            total=device.all_sum,
        )
        self.log_every = max(1, experiment.steps // _LOG_LINES)
        self.monitor = RunMonitor(
            self.model,
            RunFacts.of(experiment, vocabulary=self.tokenizers[1].size),
            tracker,
            every=self.log_every,
        )
        self.evaluator = Evaluator(
            experiment, shards, self.tokenizers, device=device, tracker=tracker
        )
        self.step = 0
        self.last_report: dict[str, float] = {}
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def execute(self) -> Outcome | None:
        """Trains to the end; the outcome on rank 0, None on the others.

        Raises:
            InterruptedRunError: asked to stop; there is a checkpoint.
            BusyError: a later start has taken over.
            RolledBackError: diverged, and the next Run may go on from the last checkpoint.
            TrainingError: diverged, or failed before in the same way.
        """
        if self.device.rank == 0:
            self.history.require_progress()
            self.lease.take(force=True)
        try:
            return self._execute()
        except (BusyError, InterruptedRunError, MachineError):
            raise
        except Exception as error:
            if isinstance(error, DivergedError) and self.device.rank == 0:
                is_finite = not self.window.bad
                self.monitor.diverged(error.args[0], self.step, is_finite=is_finite)
            allowed = self.experiment.optim.rollbacks
            if isinstance(error, DivergedError) and self.rollbacks < allowed:
                self.history.add_rollback(done=self.rollbacks, reason=error.args[0])
                raise RolledBackError(
                    f"{error.args[0]}; rollback {self.rollbacks + 1} of {allowed}"
                ) from error
            if self.device.rank == 0:
                self.history.add_failure(self.step, error)
            raise

    def _execute(self) -> Outcome | None:
        experiment, device = self.experiment, self.device
        start = self._resume()
        at = start * experiment.batches_a_rank
        batches = prefetched(self.batches.steps(rank=device.rank, of=device.world_size, at=at))
        # Each rollback halves the rate.
        rate = experiment.optim.lr / 2**self.rollbacks
        is_first = device.rank == 0
        steps = training_steps(
            self.model,
            batches,
            self.optimizer,
            experiment.override({"optim.lr": rate}) if self.rollbacks else experiment,
            device=device,
            start=start,
            monitor=self.monitor if is_first else None,
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
            if start in effects.evaluate_at and self.evaluator.step < start:
                self.clock.beat(start, patience=JUDGING)
                effects.evaluate(start)
            self.clock.beat(start, patience=STORING)
            self.window.restart()
            self.teller(start, {})
            fit(self._counted(steps), self.averaged, self.window, effects)
        return self._finish() if is_first else None

    def _counted(self, steps: Iterator[Step]) -> Iterator[Step]:
        judged = evaluation_steps(self.experiment)
        for step in steps:
            self.step = step.index
            self.pace.add(step.own_seconds)
            is_stored = step.index % self.experiment.checkpoint_every == 0
            is_judged = step.index in judged and not step.is_last
            patience = JUDGING if is_judged else STORING if is_stored or step.is_last else 1.0
            self.clock.beat(step.index, patience=patience)
            yield step

    def _note(self, metrics: Mapping[str, float], step: int) -> None:
        """At a log line, on all ranks; rank 0 writes it."""
        if slow := self.pace.compare():
            _log.warning("step %d: %s", step, slow)
        if self.device.rank == 0:
            self.monitor.log(metrics, step)

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
        path = self.folder / f"not-finite-{step.index:08d}-{self.device.rank}.json"
        write_file(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        _log.warning("step %d is not finite and was left out; its rows: %s", step.index, path)

    @property
    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _evaluate(self, step: int) -> None:
        """Judges the averaged weights, and reports the best so far."""
        self.teller.judging(step)
        try:
            logged = self.evaluator.evaluate(self.averaged.tensors, step, self.should_stop)
        except InterruptedRunError:
            self._checkpoint(step)
            self._agree_to_stop(here=True)
            raise
        self._agree_to_stop(here=False)
        self.teller.best = self.evaluator.standing
        self.monitor.log(logged, step)
        # A resumed or recognised run is compared at the evaluation where it is, not at its first.
        where = {"step": float(step), "evaluation": float(len(self.evaluator.history))}
        self.last_report = {**logged, **where, "is_last": 0.0}
        # The last report is left to the host, after the outcome is written: a scheduler that stops
        # a trial at a report must find it finished.
        if step < self.experiment.steps:
            self.report(self.last_report)
        self.teller(step, {})

    def _agree_to_stop(self, *, here: bool) -> bool:
        """Whether rank 0 was told to stop while it evaluated; the others wait for it here."""
        return bool(self.device.all_sum(torch.tensor(float(here))) > 0)

    def _follow(self, step: int) -> None:
        """What ranks other than 0 do meanwhile: each rank reports equally often."""
        if self._agree_to_stop(here=False):
            raise InterruptedRunError("told to stop while rank 0 evaluated")
        if step < self.experiment.steps:
            self.report({})

    def _checkpoint(self, step: int) -> None:
        self.lease.require_current()
        evaluator = self.evaluator.state_dict()
        checkpoint = Checkpoint(
            step,
            {
                "model": self.model.state_dict(),
                "average": self.averaged.tensors,
                "optimizer": optimizer_tensors(self.optimizer),
                "evaluator": evaluator["tensors"],
            },
            {
                "evaluator": evaluator["scalars"],
                "seconds": self._seconds,
                "last_report": self.last_report,
                "skipped": self.window.skipped,
                "lowest": self.window.lowest,
                "monitor": self.monitor.state_dict(),
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
            "workers": self.device.world_size,
            "device": self.device.primary.type,
            "precision": str(self.device.autocast_dtype or torch.float32).removeprefix("torch."),
        }

    def _resume(self) -> int:
        """Restores the newest good checkpoint; returns the updates done so far."""
        is_first = self.device.rank == 0
        checkpoint = newest_checkpoint(self.folder / "checkpoints", is_first=is_first)
        step = checkpoint.step if checkpoint else 0
        if self.device.all_sum(torch.tensor(step)) != step * self.device.world_size:
            raise MachineError(
                f"{self.folder}: ranks read different checkpoints, rank {self.device.rank} that of "
                f"step {step}. Fix: let all machines read that folder and run the command again"
            )
        if checkpoint is None:
            return 0
        self.model.load_state_dict(checkpoint.tensors["model"])
        restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
        with torch.no_grad():
            for name, tensor in checkpoint.tensors["average"].items():
                self.averaged.tensors[name].copy_(tensor)
        scalars = checkpoint.scalars
        self.evaluator.load_state_dict(
            {"tensors": checkpoint.tensors["evaluator"], "scalars": scalars["evaluator"]}
        )
        self.seconds_before, self.last_report = scalars["seconds"], scalars["last_report"]
        self.teller.best = self.evaluator.standing
        self.window.skipped, self.window.lowest = scalars["skipped"], scalars["lowest"]
        self.monitor.load_state_dict(scalars["monitor"])
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
        self.lease.require_current()
        metric = self.experiment.task.metric
        scores = {
            "metric": metric,
            "dev": self.evaluator.best_scores,
            "step": self.evaluator.best_step,
        }
        bundle = save_bundle(
            self.folder / "bundle",
            experiment=self.experiment,
            weights=self.evaluator.best,
            tokenizers=self.tokenizers,
            scores=scores,
        )
        key = run_key(self.experiment, self.shards)
        outcome = Outcome(
            key,
            str(self.folder),
            str(bundle),
            self.evaluator.best_scores,
            self.evaluator.best_step,
            self.evaluator.history,
            self._seconds,
            self.last_report,
        )
        write_file(self.folder / "outcome.json", json.dumps(asdict(outcome), indent=1) + "\n")
        # Checkpoints were there to resume from; the bundle is what is left to use.
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.tracker.tag({"vinedresser.bundle": str(bundle)})
        return outcome


def _ids(ids: Tensor) -> list[int]:
    """Of one row, without padding."""
    return [i for i in ids.tolist() if i != PAD]
