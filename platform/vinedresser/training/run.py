"""Run: the training loop of one worker, from shards to a bundle; resumable after any update."""

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

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
from vinedresser.errors import (
    BusyError,
    DivergedError,
    InterruptedRunError,
    MachineError,
    PreemptedError,
)
from vinedresser.objective import Objective
from vinedresser.special_ids import PAD
from vinedresser.tracking import Tracker
from vinedresser.training.checkpoint import load_parts, newest_checkpoint, save_checkpoint
from vinedresser.training.device import Device, refuse_too_large, seed_step
from vinedresser.training.ema import AveragedWeights
from vinedresser.training.evaluator import Evaluator
from vinedresser.training.listener import Listener, Progress
from vinedresser.training.optimizer import OptimizerState, build_optimizer, freeze
from vinedresser.training.outcome import Outcome, run_key
from vinedresser.training.schedule import StepSchedule
from vinedresser.training.step import Step, StepMonitor, training_steps
from vinedresser.training.watchdog import StragglerDetector, Watchdog
from vinedresser.training.window import MetricsWindow
from vinedresser.workspace.history import RunHistory
from vinedresser.workspace.layout import RunFolder
from vinedresser.workspace.lease import Lease
from vinedresser.workspace.stopping import StopRequest
from vinedresser.workspace.storage import write_file

_log = logging.getLogger(__name__)


class Monitor(StepMonitor, Protocol):
    """Observer of a run's health, with hooks into the step and a state."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See Listener."""

    def diverged(self, reason: str, step: int, *, is_finite: bool) -> None:
        """Receive the reason for which the run ends."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's state."""


class RolledBackError(DivergedError):
    """The run diverged and may go back to its last checkpoint; its host starts another Run."""


class Run:
    """One worker of one run: builds its parts, then `execute` trains. Rank 0 evaluates and writes.

    Attributes:
        parts: name -> part with `state_dict` and `load_state_dict`; a checkpoint holds all of
            their states. `execute` adds the monitor.
    """

    def __init__(
        self,
        experiment: Experiment,
        shards: ShardSet,
        folder: RunFolder,
        *,
        device: Device,
        tracker: Tracker,
        listener: Listener | None = None,
    ) -> None:
        self.experiment, self.shards, self.folder, self.device = experiment, shards, folder, device
        self.listener = listener or Listener()
        self.tokenizers = tokenizers(shards)
        self.batches = Batches(shards, experiment.batch, seed=experiment.seed)
        self.schedule = StepSchedule(experiment)
        self.should_stop = StopRequest(folder)
        self.lease, self.history = Lease(folder.writer_lease), RunHistory(folder.history)
        self.rollbacks = self.history.rollbacks
        self.watchdog = Watchdog(folder.hangs, device, seconds=experiment.compute.hang_seconds)
        self.stragglers = StragglerDetector(device)
        self._build_model()
        optim = experiment.optim
        self.objective = Objective(experiment.objective, self.model, self.tokenizers[1])
        self.optimizer = build_optimizer(self.objective, optim)
        self.ema = AveragedWeights(self.model, optim.ema_decay)
        self.window = MetricsWindow(
            optim.clip_norm,
            max_skipped=optim.max_skipped,
            uniform_loss=math.log(self.tokenizers[1].size),
            all_sum=device.all_sum,
        )
        self.evaluator = Evaluator(
            experiment, shards, self.tokenizers, device=device, tracker=tracker
        )
        self.step = 0
        self.monitor: Monitor | None = None
        self.last_report: dict[str, float] = {}
        # The numbers on dev of the weights that ship.
        self.shipped_report: dict[str, float] = {}
        self._seconds_before, self._started = 0.0, time.perf_counter()
        self.parts: dict[str, Any] = {
            "run": self,
            "model": self.model,
            "objective": self.objective,
            "optimizer": OptimizerState(self.optimizer),
            "ema": self.ema,
            "evaluator": self.evaluator,
            "window": self.window,
        }

    def _build_model(self) -> None:
        """Build the model with fresh, warm-started and frozen weights on its device."""
        experiment, is_first = self.experiment, self.device.rank == 0
        joint = self.shards.task.has_joint_vocabulary
        vocabulary = vocabulary_of(*self.tokenizers, joint=joint)
        refuse_too_large(experiment.model, vocabulary)
        seed_step(experiment.seed, 0, 0)
        self.model = experiment.model.instantiate(vocabulary)
        if experiment.init is not None:
            bundle = load_bundle(Path(experiment.init))
            refuse_other_pieces(bundle, *self.tokenizers)
            account = warm_start(
                self.model, bundle, experiment.model, partial=experiment.init_partial
            )
            if is_first:
                _log.info("%s", account)
        if (frozen := freeze(self.model, experiment.optim.freeze)) and is_first:
            _log.info("frozen: %d tensors (%s ...)", len(frozen), ", ".join(frozen[:3]))
        self.model.to_devices(encoder=self.device.encoder_device, decoder=self.device.primary)
        self.model.train()

    def execute(self, monitor: Monitor | None = None) -> Outcome | None:
        """Train to the end; return the outcome on rank 0, None on the others.

        The monitor, of rank 0, observes the run and receives what is logged.

        Raises:
            InterruptedRunError: a stop was requested; there is a checkpoint.
            PreemptedError: likewise, because a node is about to be lost.
            BusyError: a later start has taken over.
            RolledBackError: diverged, and the next Run may resume from the last checkpoint.
            TrainingError: diverged, or failed before in the same way.
        """
        experiment, device = self.experiment, self.device
        if monitor is not None:
            self.monitor = self.parts["monitor"] = monitor
        # However training ends, the thread that reads ahead ends with it.
        with self._owning_folder(), contextlib.ExitStack() as stack:
            start = self._resume()
            first_batch = start * experiment.batches_per_rank
            batches = prefetched(
                self.batches.steps(rank=device.rank, of=device.world_size, at=first_batch)
            )
            stack.enter_context(contextlib.closing(batches))
            stack.enter_context(self.watchdog)
            # A run that was stopped at an evaluation makes up for it first.
            if start in self.schedule.evaluations and self.evaluator.step < start:
                self._evaluate(start)
            self.watchdog.reset(start, pause=Watchdog.CHECKPOINT)
            self.window.restart()
            self._report_progress(start)
            for step in training_steps(
                self.objective,
                batches,
                self.optimizer,
                # Each rollback halves the rate.
                experiment.override({"optim.lr": experiment.optim.lr / 2**self.rollbacks}),
                device=device,
                start=start,
                monitor=self.monitor,
                should_stop=self.should_stop,
            ):
                self.step, due = step.index, self.schedule.due(step)
                self.watchdog.reset(step.index, pause=Watchdog.pause_of(due))
                self.stragglers.add(step.own_seconds)
                self.ema.update(step.index)
                self.window.add(step)
                self._report_progress(step.index, self._log(step) if due.log else {})
                if due.evaluate:
                    self._evaluate(step.index)
                if due.checkpoint:
                    self._checkpoint(step.index)
                if step.stop:
                    self._stop(step.index)
            return self._finish() if device.rank == 0 else None

    @contextlib.contextmanager
    def _owning_folder(self) -> Iterator[None]:
        """Hold the right to write to the folder; record a failure of the run in its history."""
        is_first = self.device.rank == 0
        if is_first:
            self.history.require_progress()
            self.lease.take(force=True)
        try:
            yield
        except DivergedError as error:
            reason, allowed = error.args[0], self.experiment.optim.rollbacks
            if self.monitor is not None:
                self.monitor.diverged(reason, self.step, is_finite=not self.window.not_finite)
            if self.rollbacks < allowed:
                self.history.add_rollback(done=self.rollbacks, reason=reason)
                raise RolledBackError(
                    f"{reason}; rollback {self.rollbacks + 1} of {allowed}"
                ) from error
            if is_first:
                self.history.add_failure(self.step, error)
            raise
        except Exception as error:
            if is_first and not isinstance(error, BusyError | InterruptedRunError | MachineError):
                self.history.add_failure(self.step, error)
            raise

    def _log(self, step: Step) -> Mapping[str, float]:
        """Close the metrics window and return its metrics, which rank 0 logs."""
        try:
            metrics = self.window.close()
        finally:
            for bad in self.window.not_finite:
                self._save_rows(bad)
        if slow := self.stragglers.compare():
            _log.warning("step %d: %s", step.index, slow)
        self._emit(metrics, step.index)
        return metrics

    def _save_rows(self, step: Step) -> None:
        """Write the rows of an update that was left out to a file for inspection."""
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
        path = self.folder.not_finite(step.index, self.device.rank)
        write_file(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        _log.warning("step %d is not finite and was left out; its rows: %s", step.index, path)

    def _evaluate(self, step: int) -> None:
        """Evaluate the averaged weights on rank 0 while other ranks wait; report on all ranks."""
        is_first, is_stopped = self.device.rank == 0, False
        self.watchdog.reset(step, pause=Watchdog.EVALUATION)
        logged: dict[str, float] = {}
        if is_first:
            self._report_progress(step, is_evaluating=True)
            try:
                logged = self.evaluator.evaluate(self.ema.tensors, step, self.should_stop)
            except InterruptedRunError:
                is_stopped = True
                self._checkpoint(step)
        if self.device.all_sum(torch.tensor(float(is_stopped))) > 0:
            self._stop(step)
        if is_first:
            self._emit(logged, step)
            # A resumed or recognised run is compared at the evaluation where it is.
            position = {"step": float(step), "evaluation": float(len(self.evaluator.history))}
            self.last_report = {**logged, **position, "is_last": 0.0}
            if step == self.evaluator.best_step:
                self.shipped_report = {k: v for k, v in logged.items() if k.startswith("dev/")}
        # The last report comes after the outcome is written: a scheduler may stop a trial at a
        # report, and the run must be finished then.
        if step < self.experiment.steps:
            self.listener.evaluated(self.last_report if is_first else {})
        self._report_progress(step)
        self.window.restart()

    def _stop(self, step: int) -> NoReturn:
        """End the run on all ranks, once rank 0 has written its checkpoint.

        The sum is a barrier: Ray ends the other workers as soon as one of them has failed.
        """
        is_requested = torch.tensor(float(self.should_stop.is_requested))
        if self.device.all_sum(is_requested) > 0:
            raise InterruptedRunError(
                f"stopped on request at step {step}; run the same command to resume"
            )
        raise PreemptedError(f"a node is about to be lost; stopped at step {step}")

    def _emit(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics, on rank 0 only."""
        if self.device.rank == 0:
            self.listener.log(metrics, step)
            if self.monitor is not None:
                self.monitor.log(metrics, step)

    def _report_progress(
        self, step: int, logged: Mapping[str, float] = {}, *, is_evaluating: bool = False
    ) -> None:
        if self.device.rank > 0:
            return
        self.listener.progress(
            Progress(
                step,
                self.experiment.steps,
                step * self.experiment.batches_per_update / self.batches.per_epoch,
                self.schedule.evaluations_left(step) + is_evaluating,
                "evaluating" if is_evaluating else "training",
                logged.get("train/loss"),
                logged.get("train/tokens_per_second"),
                self.evaluator.best_so_far,
            )
        )

    def _checkpoint(self, step: int) -> None:
        if self.device.rank > 0:
            return
        self.lease.require_current()
        save_checkpoint(self.folder, step, self.parts, keep=self.experiment.keep_checkpoints)

    def _resume(self) -> int:
        """Restore the newest good checkpoint; return the updates done so far."""
        is_first = self.device.rank == 0
        checkpoint = newest_checkpoint(self.folder, is_first=is_first)
        step = checkpoint.step if checkpoint else 0
        if self.device.all_sum(torch.tensor(step)) != step * self.device.world_size:
            raise MachineError(
                f"{self.folder.path}: ranks read different checkpoints, rank {self.device.rank} "
                f"that of step {step}. Fix: let all machines read that folder and run the command "
                "again"
            )
        if checkpoint is None:
            return 0
        load_parts(self.parts, checkpoint)
        self.step = step
        if is_first:
            _log.info("resumed %s at step %d", self.folder.name, step)
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return the run's own state: time, reports, and what its bits depend on."""
        return {
            "seconds": self._seconds,
            "last_report": self.last_report,
            "shipped_report": self.shipped_report,
            "experiment": self.experiment.to_json(),
            "machine": self.device.settings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the run's own state; warn where another machine gives other bits."""
        self._seconds_before, self.last_report = state["seconds"], state["last_report"]
        self.shipped_report = state["shipped_report"]
        before, now = state["machine"], self.device.settings
        changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
        if changed and self.device.rank == 0:
            _log.warning("not bit-exact from here on: %s", ", ".join(changed))

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _finish(self) -> Outcome:
        """Write the bundle, then the outcome; remove the checkpoints."""
        self.lease.require_current()
        metric, evaluator = self.experiment.task.metric, self.evaluator
        scores = {"metric": metric, "dev": evaluator.best_scores, "step": evaluator.best_step}
        if not 0 < self.experiment.evaluation.sentences < self.shards.counts["dev"]:
            scores["reference_digest"] = self.shards.reference_digest("dev")
        bundle = save_bundle(
            self.folder.bundle,
            experiment=self.experiment,
            weights=evaluator.best,
            tokenizers=self.tokenizers,
            scores=scores,
        )
        outcome = Outcome(
            run_key(self.experiment, self.shards),
            str(self.folder.path),
            str(bundle),
            evaluator.best_scores,
            evaluator.best_step,
            evaluator.history,
            self._seconds,
            {**self.last_report, **self.shipped_report},
        )
        write_file(self.folder.outcome, json.dumps(asdict(outcome), indent=1) + "\n")
        shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        return outcome


def _ids(ids: Tensor) -> list[int]:
    """Return the ids of one row without padding."""
    return [i for i in ids.tolist() if i != PAD]
