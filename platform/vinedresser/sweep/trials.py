"""Trials of a sweep under Ray Tune: the proposals, the training in each, and their early stop."""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from vinedresser.config import Experiment
from vinedresser.config.study import Study
from vinedresser.data.shards import open_shards
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.failures import (
    MAX_DEATHS,
    add_death,
    newest_step,
    refuse_repeated_deaths,
)
from vinedresser.distributed.notices import RayStop, receiving_notices
from vinedresser.distributed.relay import LogTail, logging_to
from vinedresser.distributed.resources import (
    TRIAL_CPUS,
    num_groups,
    num_groups_to_come,
    release_group,
    require,
    worker_resources,
)
from vinedresser.distributed.train import train
from vinedresser.errors import ConfigError, InterruptedRunError, PreemptedError, VinedresserError
from vinedresser.sweep.journal import FAILURE, ended_trials
from vinedresser.sweep.outcome import Direction, report_keys, short_params
from vinedresser.sweep.searcher import DIED, Searcher
from vinedresser.tracking import end_children, undelivered
from vinedresser.training.listener import Listener
from vinedresser.training.outcome import run_folder
from vinedresser.workspace.layout import RunFolder, SpoolFolder
from vinedresser.workspace.stopping import confirm_stop, grace_seconds, stopping_runs_first
from vinedresser.workspace.storage import follow_mode

_log = logging.getLogger(__name__)


class Halving(ASHAScheduler):
    """Successive halving that does not stop a trial after its last report.

    The stock class stops it there, while it closes its files and its tracking run.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the decision on a trial after one of its evaluations."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result.get("is_last") else decision


def run_trials(
    study: Study,
    context: RunContext,
    *,
    opened: optuna.Study,
    objectives: Mapping[str, Direction],
    scratch: Path,
) -> None:
    """Run the trials that an Optuna study still lacks; the end of each is recorded in it.

    Raises:
        MachineError: one of them needs more than the whole cluster.
    """
    compute, metric = study.base.compute, study.base.task.metric
    require(compute, f"a trial of {study.name}")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints stacks of reported errors
    # Files of Tune, pickles that are never read; those of a killed sweep are in the way.
    shutil.rmtree(scratch, ignore_errors=True)
    keys = report_keys(objectives)
    resources = worker_resources(compute)
    if compute.workers > 1:  # the trial only waits for its worker group
        resources = {"CPU": TRIAL_CPUS}

    scheduler: Any = FIFOScheduler()  # type: ignore[no-untyped-call]
    if study.stopping is not None:
        scheduler = Halving(
            time_attr="evaluation",
            metric=f"best/{metric}",
            mode=objectives[metric],
            grace_period=study.stopping.grace,
            reduction_factor=study.stopping.factor,
            max_t=max(study.base.evaluation.num_evaluations, study.stopping.grace + 1),
        )
    watch = TrialWatch(study, objectives, context)
    trial = tune.with_parameters(_trial, base=study.base.to_json(), context=context, keys=keys)
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=Searcher(opened, study.space, keys, lambda: _room(study)),
            scheduler=scheduler,
            num_samples=study.num_trials - len(ended_trials(opened, objectives)),
            # A new actor imports torch and mlflow again: 1.5 s per trial quiet, 5 s busy.
            reuse_actors=compute.workers == 1,
        ),
        run_config=tune.RunConfig(
            storage_path=str(scratch),
            name=study.name,
            verbose=0,
            callbacks=[watch],
            # A trial whose process died starts again, and counts its deaths itself.
            failure_config=tune.FailureConfig(max_failures=-1),
        ),
    )
    stop = RayStop()
    stop.clear()  # of an earlier search in this process
    try:
        with stopping_runs_first(lambda: list(watch.running.values()), stop):
            tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _room(study: Study) -> int:
    """Return how many trials of a study may be open at a time, on the cluster as it is now."""
    compute = study.base.compute
    fitting = max(num_groups(compute), num_groups_to_come(compute))
    # One more waits: it takes over the process of the next trial that ends. A group that waits
    # would keep workers from another one.
    fitting = fitting + 1 if compute.workers == 1 else max(fitting, 1)
    return min(study.concurrent or fitting, fitting)


def _trial(
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    context: RunContext,
    keys: list[str],
) -> None:
    """Train the base experiment with the proposed values, in the process of a Tune trial."""
    follow_mode(context.workspace.path)
    shards = open_shards(context.shards.folder, digest=context.shards.digest)
    try:
        experiment = Experiment.from_json(base).override(config["params"])
        folder = run_folder(experiment, shards, context.workspace)
        refuse_repeated_deaths(folder)
        with contextlib.ExitStack() as stack:
            if experiment.compute.workers == 1:  # workers of a group have both themselves
                stack.enter_context(logging_to(folder, rank=0))
                node = ray.get_runtime_context().get_node_id()
                stack.enter_context(receiving_notices([node]))
            train(experiment, replace(context, shards=shards), listener=TuneListener(keys))
    except PreemptedError:
        raise  # Tune starts the trial again, on another node
    except InterruptedRunError:
        # It has its checkpoint, and is neither done nor failed: the driver is about to end.
        confirm_stop(folder)
        RayStop().confirm(folder.name)
        time.sleep(2 * grace_seconds())
    except Exception as error:  # noqa: BLE001 (any failure ends this trial; the others continue)
        message = error.args[0] if isinstance(error, VinedresserError) else repr(error)
        tune.report({FAILURE: str(message).splitlines()[0]})


class TuneListener(Listener):
    """Listener inside a trial: reports go to Tune, and hold every objective."""

    def __init__(self, keys: list[str]) -> None:
        """Args: the keys of the objectives."""
        self._keys = keys

    def evaluated(self, report: Mapping[str, Any]) -> None:
        """Report to Tune.

        Raises:
            ConfigError: an objective is not in the report.
        """
        if missing := [key for key in self._keys if key not in report]:
            raise ConfigError(
                f"objectives: {', '.join(missing)} is not among the numbers that trials report: "
                f"{', '.join(sorted(key for key in report if '/' in key))}"
            )
        tune.report(dict(report))

    finished = evaluated


class TrialWatch(tune.Callback):
    """A log line per event of a trial, the list of running trials, and the end of worker groups.

    Ray Train's own cleaner of placement groups fails where two clusters run on a host (ray#65447),
    and the next trial would wait for the workers of the last one for ever.

    Attributes:
        running: Tune's id -> run folder of each trial that runs.
    """

    def __init__(
        self, study: Study, objectives: Mapping[str, Direction], context: RunContext
    ) -> None:
        self._base, self._objectives, self._context = study.base, objectives, context
        self._best = math.nan
        self._untracked = set[int]()
        self._logs: dict[str, LogTail] = {}
        self.running: dict[str, RunFolder] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Log the proposal of a trial."""
        del iteration, trials
        self.running[trial.trial_id] = folder = self._folder(trial)
        self._logs[trial.trial_id] = LogTail(folder)
        params = short_params(trial.config["params"])
        _log.info("trial %d: starts with %s", trial.config["number"], params)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **_: Any
    ) -> None:
        """Log an evaluation: step, the value of each objective, and the best of all trials."""
        del iteration, trials
        number, (metric, *others) = trial.config["number"], self._objectives
        self._log_warnings(trial)
        if FAILURE in result:
            return _log.info("trial %d: failed: %s", number, result[FAILURE])
        reason = undelivered(SpoolFolder(self._folder(trial).tracking))
        if reason and number not in self._untracked:
            self._untracked.add(number)
            _log.warning("trial %d: not tracked at present: %s", number, reason)
        value = float(result.get(f"dev/{metric}", math.nan))
        better = min if self._objectives[metric] == "min" else max
        self._best = value if math.isnan(self._best) else better(self._best, value)
        shown = [f"{metric} {value:.2f}", *(f"{k} {result.get(k, math.nan):.4g}" for k in others)]
        return _log.info(
            "trial %d: step %d/%d  %s  best so far %.2f",
            number, result.get("step", 0), self._base.steps, "  ".join(shown), self._best,
        )  # fmt: skip

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Log a trial that was stopped early."""
        del iteration, trials
        last = self._ended(trial)
        if not (last.get("is_last") or FAILURE in last):
            _log.info("trial %d: stopped early", trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Log a trial whose process died."""
        del iteration, trials
        self._ended(trial)
        _log.info("trial %d: failed: %s", trial.config["number"], DIED)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Log a trial that starts again after its process or node was lost; count the loss."""
        del iteration, trials
        folder, errors = self._folder(trial), Path(trial.error_file).read_text()
        last_error = errors.rpartition("Failure #")[2]
        self._ended(trial)
        number, step = trial.config["number"], newest_step(folder)
        if PreemptedError.__name__ in last_error:
            return _log.info("trial %d: node is drained; continues at step %d", number, step)
        # At first Ray knows only that the connection is closed, by 30 s later which it was.
        unclear = "node or process lost" if "unavailable" in last_error else "process died"
        reason = "node lost" if "node has died" in last_error else unclear
        deaths = add_death(folder)
        # A trial that cannot even start does not count its deaths itself.
        trial.max_failures = -1 if deaths < MAX_DEATHS else 0
        if self._context.parent:
            end_children(self._context.store, self._context.parent, reason, key=folder.key)
        return _log.warning("trial %d: %s; starts again at step %d", number, reason, step)

    def _folder(self, trial: Any) -> RunFolder:
        experiment = self._base.override(trial.config["params"])
        return run_folder(experiment, self._context.shards, self._context.workspace)

    def _log_warnings(self, trial: Any) -> None:
        """Log what the workers of a trial have warned of since the last call."""
        for entry in self._logs[trial.trial_id].read():
            if entry.get("level", 0) >= logging.WARNING and "text" in entry:
                _log.log(entry["level"], "trial %d: %s", trial.config["number"], entry["text"])

    def _ended(self, trial: Any) -> Mapping[str, Any]:
        if trial.trial_id in self.running:
            self._log_warnings(trial)
            del self.running[trial.trial_id], self._logs[trial.trial_id]
        last: Mapping[str, Any] = trial.last_result or {}
        release_group(last)
        return last
