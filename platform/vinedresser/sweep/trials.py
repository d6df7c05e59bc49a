"""Trials under Ray Tune: what runs in one, when it is stopped, and what is said of it."""

import contextlib
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.storages import JournalStorage
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from vinedresser.config import Experiment
from vinedresser.config.study import Study
from vinedresser.data.shards import open_shards
from vinedresser.distributed import TRIAL_CPUS, Site, num_groups, release_group, require, train
from vinedresser.errors import InterruptedRunError, VinedresserError
from vinedresser.metrics import is_lower_better
from vinedresser.sweep.journal import has_two
from vinedresser.sweep.outcome import REASON, short_params
from vinedresser.sweep.searcher import DIED, Searcher
from vinedresser.training.outcome import run_folder
from vinedresser.workspace.lease import STOPPING, ask_to_stop, has_stopped

Say = Callable[[str], None]

# Seconds that trials have for a checkpoint after SIGTERM; schedulers of clusters kill after 30.
GRACE_SECONDS = 20.0


def searcher_for(study: Study, storage: JournalStorage) -> Searcher:
    """A searcher that goes on from the trials in the journal."""
    metric = study.base.task.metric
    mode = _mode(study)
    known = len(storage.get_all_trials(storage.get_study_id_from_name(study.name)))
    return Searcher(
        dict(study.space),
        metric=[f"dev/{metric}", "dev/heads"] if has_two(study) else f"best/{metric}",
        mode=[mode, "min"] if has_two(study) else mode,
        # A continued search must not repeat the random proposals of its beginning.
        sampler=optuna.samplers.TPESampler(seed=study.seed + known, n_startup_trials=4),
        study_name=study.name,
        storage=storage,
    )


def _mode(study: Study) -> str:
    return "min" if is_lower_better(study.base.task.metric) else "max"


def run_trials(
    study: Study, site: Site, folder: Path, searcher: Searcher, count: int, say: Say
) -> None:
    """Runs `count` trials, told to the searcher as they end.

    Raises:
        MachineError: one of them wants more than the whole cluster.
    """
    require(study.base.compute, f"a trial of {study.name}")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints stacks of what we report
    # Tune's own notes, pickles that nobody reads; a killed sweep's are in the way.
    scratch, running = folder / "tune", Running()
    shutil.rmtree(scratch, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, base=study.base.to_json(), site=site),
            _resources(study),
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(study),
            num_samples=count,
            max_concurrent_trials=_concurrent(study),
            # A new actor imports torch and mlflow again: 1.5 s a trial quiet, 5 s busy.
            reuse_actors=study.base.compute.workers == 1,
        ),
        run_config=tune.RunConfig(
            storage_path=str(scratch),
            name=study.name,
            verbose=0,
            callbacks=[Progress(study, say, searcher), Release(), running],
        ),
    )
    try:
        with _checkpointing_first(running, study, site):
            tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _resources(study: Study) -> Any:
    compute = study.base.compute
    if compute.workers > 1:
        # The trial only waits for its worker group.
        return {"CPU": TRIAL_CPUS}
    return {"CPU": compute.threads, "GPU": 1.0 if compute.needs_gpu else 0.0}


def _concurrent(study: Study) -> int | None:
    """Trials at a time; those of several workers must not wait for each other's workers."""
    if study.base.compute.workers == 1:
        return study.concurrent or None
    fitting = num_groups(study.base.compute)
    return min(study.concurrent or fitting, fitting)


def _scheduler(study: Study) -> TrialScheduler:
    if study.stopping is None:
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    return Halving(
        time_attr="evaluation",
        metric=f"best/{study.base.task.metric}",
        mode=_mode(study),
        grace_period=study.stopping.grace,
        reduction_factor=study.stopping.factor,
        max_t=max(study.base.evaluation.times, study.stopping.grace + 1),
    )


def _trial(config: Mapping[str, Any], base: Mapping[str, Any], site: Site) -> None:
    """What runs inside a Tune trial: the base with the proposed values, in place."""
    try:
        experiment = Experiment.from_json(base).override(config)
        train(experiment, site, report=lambda metrics: tune.report(dict(metrics)))
    except InterruptedRunError:
        # It has its checkpoint, and is neither done nor failed: the driver is about to end.
        has_stopped(_folder(config, base, site))
        time.sleep(2 * GRACE_SECONDS)
    except Exception as error:  # noqa: BLE001 (whatever it is, this trial failed and others go on)
        message = error.args[0] if isinstance(error, VinedresserError) else repr(error)
        tune.report({REASON: str(message).splitlines()[0]})


def _folder(config: Mapping[str, Any], base: Mapping[str, Any], site: Site) -> Path:
    """Of a trial's run."""
    experiment = Experiment.from_json(base).override(config)
    shards = open_shards(Path(site.shards), task=experiment.task)
    return run_folder(experiment, shards, Path(site.workspace))


class Running(tune.Callback):
    """The trials that are in work, for whoever has to end them."""

    def __init__(self) -> None:
        self.configs: dict[str, Mapping[str, Any]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        self.configs[trial.trial_id] = dict(trial.config)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        self.configs.pop(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        self.configs.pop(trial.trial_id, None)


@contextlib.contextmanager
def _checkpointing_first(running: Running, study: Study, site: Site) -> Iterator[None]:
    """SIGTERM and Ctrl-C let trials write their checkpoints before they do what they did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        base = study.base.to_json()
        folders = [_folder(config, base, site) for config in running.configs.values()]
        ask_to_stop(folders, grace=GRACE_SECONDS)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number in STOPPING:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()


class Halving(ASHAScheduler):
    """Successive halving that lets a trial at its end go by itself.

    The stock class stops it at its last report, in the middle of closing what it opened.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune in the driver."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result.get("is_last") else decision


class Release(tune.Callback):
    """Frees the worker group of a trial that was stopped.

    Ray Train's own cleaner gives up where two clusters run on a host (ray#65447), and the next
    trial would wait for the workers of the last one for ever.
    """

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        release_group(trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        release_group(trial.last_result or {})


class Progress(tune.Callback):
    """One line an evaluation: which trial, how far, how good, and the best so far."""

    def __init__(self, study: Study, say: Say, searcher: Searcher) -> None:
        self._study, self._say, self._searcher = study, say, searcher
        self._best: float | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        self._say(f"  trial {self._number(trial)}  starts with {short_params(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **_: Any
    ) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        if REASON in result:
            self._say(f"  trial {self._number(trial)}  failed: {result[REASON]}")
            return
        metric = self._study.base.task.metric
        value = float(result.get(f"dev/{metric}", math.nan))
        self._best = _better(metric, self._best, value)
        heads = f"  heads {result['dev/heads']:.0f}" if "dev/heads" in result else ""
        self._say(
            f"  trial {self._number(trial)}  step {result.get('step', 0):.0f}/"
            f"{self._study.base.steps}  {metric} {value:.2f}{heads}  best so far {self._best:.2f}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        last = trial.last_result or {}
        if not (last.get("is_last") or REASON in last):
            self._say(f"  trial {self._number(trial)}  stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        self._say(f"  trial {self._number(trial)}  failed: {DIED}")

    def _number(self, trial: Any) -> int:
        return self._searcher.number_of(trial.trial_id)


def _better(metric: str, best: float | None, value: float) -> float:
    if best is None or math.isnan(best):
        return value
    return min(best, value) if is_lower_better(metric) else max(best, value)
