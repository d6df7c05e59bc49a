"""Study -> ranked trials: Ray Tune runs them, Optuna proposes, the inferred metric decides.

The record of a sweep is Optuna's journal in the sweep's folder, written by one process. A sweep
whose driver was killed goes on from it: finished trials are never run again, unfinished ones are
proposed first and resume from their own checkpoints. Tune's snapshots, which are pickles, are not
read.
"""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from vinedresser.commit import digest_of, make_folder, verify, write_file
from vinedresser.config import Experiment
from vinedresser.distributed import TRIAL_CPUS, Site, num_groups, release_group, require, train
from vinedresser.errors import (
    BusyError,
    InterruptedRunError,
    MachineError,
    TrainingError,
    VinedresserError,
)
from vinedresser.metrics import is_lower_better
from vinedresser.study import Study
from vinedresser.tracking import Tracker, end_children, open_run

_log = logging.getLogger("vinedresser")

Say = Callable[[str], None]

# User attributes of Optuna trials.
_OUTCOME, _ORPHAN, _REASON = "outcome", "orphan", "reason"

# An exception in a trial is reported; what Tune alone knows of is the end of its process.
_DIED = "its process died; too little memory is the usual reason"

_DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class TrialRow:
    """One trial of a sweep.

    Attributes:
        number: Optuna's, 0-based, in the order of proposals.
        state: complete, pruned (stopped early) or fail.
        params: dotted keys -> values.
        value: best inferred score so far, NaN where there is none; with an
            inferred_and_heads objective the last inferred score.
        heads: open heads, for gated trials.
        bundle: folder of the trained model, "" unless complete.
        reason: why it failed.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    value: float
    heads: float | None
    bundle: str
    reason: str = ""


@dataclass(frozen=True)
class SweepOutcome:
    """A finished sweep, trials ranked best first.

    Attributes:
        key: content digest of study and data.
        folder: of the sweep; `journal.log` in it is an Optuna journal.
        metric: name of the trials' value.
        trials: every trial.
        run_id: its tracking run.
    """

    key: str
    folder: str
    metric: str
    trials: list[TrialRow]
    run_id: str

    @property
    def complete(self) -> list[TrialRow]:
        """Trials that ran to their end, best first."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def best(self) -> TrialRow:
        """The complete trial with the best inferred score."""
        return self.complete[0]

    def pareto(self) -> list[TrialRow]:
        """Complete trials that no other beats in both score and heads, by heads."""
        sign = 1 if is_lower_better(self.metric) else -1

        def beaten(t: TrialRow) -> bool:
            point = (sign * t.value, t.heads or 0.0)
            others = [(sign * o.value, o.heads or 0.0) for o in self.complete]
            return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in others)

        front = [trial for trial in self.complete if not beaten(trial)]
        return sorted(front, key=lambda t: (t.heads or 0.0, sign * t.value))


class Searcher(OptunaSearch):
    """OptunaSearch, repaired: stopped trials are PRUNED, NaN and errors are FAIL.

    The stock class tells a stopped trial as COMPLETE with its early score, leaves a NaN trial
    RUNNING for ever and aborts the sweep over a missing metric.
    """

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Tells an intermediate value, unless there is none or it is not finite."""
        if trial_id not in self._completed_trials:
            self._tell_value(trial_id, result)

    def _tell_value(self, trial_id: str, result: Mapping[str, Any]) -> None:
        value = result.get(self.metric) if isinstance(self.metric, str) else None
        if value is not None and math.isfinite(value):
            self._ot_trials[trial_id].report(float(value), int(result["step"]))

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the final state, once; terminal states are final."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        self._completed_trials.add(trial_id)
        trial, result = self._ot_trials[trial_id], result or {}
        metrics = self.metric if isinstance(self.metric, list) else [self.metric]
        values = [float(result.get(metric, math.nan)) for metric in metrics]
        study: Any = self._ot_study
        if error or not all(math.isfinite(value) for value in values):
            missing = _DIED if error else f"{metrics[0]} is missing or not finite"
            trial.set_user_attr(_REASON, str(result.get(_REASON, missing)))
            study.tell(trial, state=TrialState.FAIL)
            return
        kept = {key: result[key] for key in result if isinstance(key, str) and "/" in key}
        trial.set_user_attr(_OUTCOME, {k: v for k, v in kept.items() if _is_plain(v)})
        if result.get("is_last"):
            study.tell(trial, values, state=TrialState.COMPLETE)
        else:
            # Optuna takes its value from the last report, and Tune tells that one here only.
            self._tell_value(trial_id, result)
            study.tell(trial, state=TrialState.PRUNED)

    def number_of(self, trial_id: str) -> int:
        """Optuna's number of a Tune trial."""
        return int(self._ot_trials[trial_id].number)


def _is_plain(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, float | int) and math.isfinite(value))


def mend_journal(path: Path) -> int:
    """Cuts a torn last line, with which Optuna could never open the journal again.

    Returns:
        Bytes cut off.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
            os.fsync(stream.fileno())
    return len(content) - whole


def _open_study(folder: Path, study: Study, metric: str) -> tuple[JournalStorage, optuna.Study]:
    """The journal's study, with the trials of a killed driver marked and proposed again."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "journal.log"
    if cut := mend_journal(path):
        _log.warning("%s: cut %d bytes of a torn last line", path, cut)
    # We hold the folder's lock, so a lock file that is still there belongs to a dead process.
    for left in folder.glob("journal.log.*lock*"):
        left.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(path)))
    lower, higher = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
    direction = lower if is_lower_better(metric) else higher
    directions = [direction, lower] if _has_two(study) else [direction]
    opened = optuna.create_study(
        storage=storage, study_name=study.name, directions=directions, load_if_exists=True
    )
    for trial in opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        storage.set_trial_user_attr(trial._trial_id, _ORPHAN, True)
        opened.tell(trial.number, state=TrialState.FAIL)
        opened.enqueue_trial(trial.params, skip_if_exists=False)
    return storage, opened


def _has_two(study: Study) -> bool:
    return study.objective == "inferred_and_heads"


def _counted(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that used up a part of the budget: ended, and not cut short with their driver."""
    return [t for t in trials if t.state in _DONE and not t.user_attrs.get(_ORPHAN)]


def sweep(study: Study, site: Site, *, shards_digest: str, say: Say) -> SweepOutcome:
    """Runs what is left of a study's trials and ranks all of them. Ray must be connected.

    Raises:
        TrainingError: no trial ran to its end.
        BusyError: another process runs this very sweep.
        MachineError: one trial wants more than the whole cluster.
    """
    content = {**study.model_dump(mode="json"), "name": "", "task": shards_digest}
    if study.base.init is not None:
        content["init"] = verify(Path(study.base.init)).digest
    key = digest_of(content)
    folder = Path(site.workspace) / "sweeps" / f"{study.name}-{key[:12]}"
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"sweep {folder.name} is run by another process; wait for it") from None
    try:
        return _finished(folder, say) or _sweep(study, site, folder, key, say)
    finally:
        lock.release()


def _finished(folder: Path, say: Say) -> SweepOutcome | None:
    try:
        plain = json.loads((folder / "outcome.json").read_text())
    except (OSError, ValueError):
        return None
    trials = [TrialRow(**row) for row in plain.pop("trials")]
    outcome = SweepOutcome(**plain, trials=trials)
    if not all(Path(trial.bundle).is_dir() for trial in outcome.complete):
        return None
    say(f"{folder.name}: unchanged, {len(trials)} trials known")
    return outcome


def _sweep(study: Study, site: Site, folder: Path, key: str, say: Say) -> SweepOutcome:
    metric = study.base.task.metric
    tracker = _open_parent(study, site, folder, key)
    try:
        storage, opened = _open_study(folder, study, metric)
        done = len(_counted(opened.get_trials(deepcopy=False)))
        if done:
            say(f"{folder.name}: {done} of {study.num_trials} trials known, going on")
        if done < study.num_trials:
            children = Site(site.shards, site.workspace, site.store, tracker.run_id, site.kind)
            try:
                count = study.num_trials - done
                _tune(study, children, folder, _searcher(study, storage), count, say)
            finally:
                _end_trials(children)
        trials = _rank(_counted(opened.get_trials()), metric)
        if len(trials) < study.num_trials:
            raise InterruptedRunError(
                f"{folder.name}: stopped after {len(trials)} of {study.num_trials} trials; the "
                "same command goes on"
            )
        outcome = SweepOutcome(key, str(folder), metric, trials, tracker.run_id)
        if not outcome.complete:
            reasons = sorted({t.reason for t in trials if t.reason})
            raise TrainingError(
                f"{folder.name}: none of {len(trials)} trials ran to its end "
                f"({'; '.join(reasons[:3])}); widen the space or lower optim.lr"
            )
        plain = {**asdict(outcome), "trials": [asdict(trial) for trial in trials]}
        write_file(folder / "outcome.json", json.dumps(plain, indent=1) + "\n")
        _summarise(tracker, outcome)
    except (KeyboardInterrupt, InterruptedRunError):
        tracker.close("KILLED", "interrupted")
        raise
    except BaseException as error:
        tracker.close("FAILED", str(error))
        raise
    tracker.close("FINISHED")
    return outcome


def _end_trials(site: Site) -> None:
    """Tune kills a stopped trial's process, often before that could close its tracking run."""
    if site.parent:
        try:
            end_children(site.store, site.parent, "stopped early")
        except MachineError as error:
            _log.warning("%s; stopped trials may stay RUNNING there", error.args[0])


def _open_parent(study: Study, site: Site, folder: Path, key: str) -> Tracker:
    return open_run(
        site.store,
        key=key[:12],
        name=folder.name,
        parent=site.parent,
        params={"study": study.name, "base": study.base.to_json()},
        tags={
            "vinedresser.kind": "sweep",
            "vinedresser.metric": study.base.task.metric,
            "vinedresser.folder": str(folder),
            "vinedresser.task": study.base.task.name,
            "vinedresser.space": ", ".join(study.space),
        },
    )


def _searcher(study: Study, storage: JournalStorage) -> Searcher:
    metric = study.base.task.metric
    mode = _mode(study)
    known = len(storage.get_all_trials(storage.get_study_id_from_name(study.name)))
    return Searcher(
        dict(study.space),
        metric=[f"dev/{metric}", "dev/heads"] if _has_two(study) else f"best/{metric}",
        mode=[mode, "min"] if _has_two(study) else mode,
        # A continued search must not repeat the random proposals of its beginning.
        sampler=optuna.samplers.TPESampler(seed=study.seed + known, n_startup_trials=4),
        study_name=study.name,
        storage=storage,
    )


def _mode(study: Study) -> str:
    return "min" if is_lower_better(study.base.task.metric) else "max"


def _tune(study: Study, site: Site, folder: Path, searcher: Searcher, count: int, say: Say) -> None:
    require(study.base.compute, f"a trial of {study.name}")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints stacks of what we report
    # Tune's own notes, pickles that nobody reads; a killed sweep's are in the way.
    scratch = folder / "tune"
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
            callbacks=[Progress(study, say, searcher), Release()],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _resources(study: Study) -> Any:
    compute = study.base.compute
    if compute.workers > 1:
        # The trial only waits for its worker group.
        return {"CPU": TRIAL_CPUS}
    return {"CPU": compute.threads, "GPU": 1.0 if compute.device == "cuda" else 0.0}


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
    except Exception as error:  # noqa: BLE001 (whatever it is, this trial failed and others go on)
        message = error.args[0] if isinstance(error, VinedresserError) else repr(error)
        tune.report({_REASON: str(message).splitlines()[0]})


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
        if _REASON in result:
            self._say(f"  trial {self._number(trial)}  failed: {result[_REASON]}")
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
        if not (last.get("is_last") or _REASON in last):
            self._say(f"  trial {self._number(trial)}  stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        del iteration, trials
        self._say(f"  trial {self._number(trial)}  failed: {_DIED}")

    def _number(self, trial: Any) -> int:
        return self._searcher.number_of(trial.trial_id)


def short_params(params: Mapping[str, Any]) -> str:
    """`probability 0.21, clip_norm 1.3`: the last parts of keys, three digits."""
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in params.items()}
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in shown.items())


def _better(metric: str, best: float | None, value: float) -> float:
    if best is None or math.isnan(best):
        return value
    return min(best, value) if is_lower_better(metric) else max(best, value)


def _rank(trials: list[FrozenTrial], metric: str) -> list[TrialRow]:
    rows = [_row(trial) for trial in trials]
    sign = 1 if is_lower_better(metric) else -1
    order = {"complete": 0, "pruned": 1, "fail": 2}
    return sorted(
        rows,
        key=lambda r: (
            order[r.state],
            math.isnan(r.value),
            sign * r.value if r.value == r.value else 0,
        ),
    )


def _row(trial: FrozenTrial) -> TrialRow:
    outcome = trial.user_attrs.get(_OUTCOME, {})
    values = trial.values or [trial.value if trial.value is not None else math.nan]
    heads = outcome.get("dev/heads")
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        params=dict(trial.params),
        value=float(values[0]),
        heads=None if heads is None else float(heads),
        bundle=str(outcome.get("run/bundle", "")) if trial.state == TrialState.COMPLETE else "",
        reason=str(trial.user_attrs.get(_REASON, "")),
    )


def _summarise(tracker: Tracker, outcome: SweepOutcome) -> None:
    best = outcome.best
    tracker.log({f"best/{outcome.metric}": best.value}, len(outcome.trials))
    tracker.tag({"vinedresser.best_trial": str(best.number)})
    keys = sorted({key for trial in outcome.trials for key in trial.params})
    tracker.table(
        {
            "trial": [t.number for t in outcome.trials],
            "state": [t.state for t in outcome.trials],
            outcome.metric: [t.value for t in outcome.trials],
            **{key: [t.params.get(key) for t in outcome.trials] for key in keys},
        },
        "trials.json",
    )
