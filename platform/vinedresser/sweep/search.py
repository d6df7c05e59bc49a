"""sweep(): run the trials that a study lacks, rank all of them, and record them in the tracker."""

import json
import logging
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

from vinedresser.config.study import Study
from vinedresser.distributed.context import RunContext
from vinedresser.errors import InterruptedRunError, TrainingError
from vinedresser.sweep.journal import ended_trials, open_study
from vinedresser.sweep.outcome import SweepOutcome, TrialRow, directions, rank
from vinedresser.sweep.trials import run_trials
from vinedresser.tracking import Tracker, deliver_spools, end_children, ending, open_run
from vinedresser.training.outcome import run_folder
from vinedresser.workspace.commit import digest_of, read_manifest
from vinedresser.workspace.inputs import write_inputs
from vinedresser.workspace.layout import RunFolder, SpoolFolder, SweepFolder, Workspace, runs_of
from vinedresser.workspace.lease import Lease, leased
from vinedresser.workspace.storage import read_json, write_file

_log = logging.getLogger(__name__)

# Wait for the processes of trials to end.
_END_SECONDS = 10.0


def locate_sweep(study: Study, context: RunContext) -> tuple[str, SweepFolder]:
    """Return the key of a study on data, and the folder of its sweep."""
    content = {**study.model_dump(mode="json"), "name": "", "task": context.shards.digest}
    if study.base.init is not None:
        # By content in the place of its path, as in the key of a run.
        content["base"] = {**content["base"], "init": read_manifest(Path(study.base.init)).digest}
    key = digest_of(content)
    return key, context.workspace.sweep_folder(study.name, key)


def sweep(study: Study, context: RunContext) -> SweepOutcome:
    """Run the trials that a study lacks and rank all of them. Ray must be connected.

    Raises:
        ConfigError: an objective without a direction.
        TrainingError: no trial ran to its end.
        BusyError: another process runs this sweep.
        MachineError: one trial needs more than the whole cluster.
    """
    objectives, workspace = directions(study), context.workspace
    key, folder = locate_sweep(study, context)
    if (known := read_outcome(folder, workspace)) is not None:
        _log.info("%s: unchanged, %d trials known", folder.name, len(known.trials))
        return known
    with leased(folder.lease, f"sweep {folder.name}"):
        if (known := read_outcome(folder, workspace)) is not None:  # of who held the lease
            return known
        write_inputs(folder.inputs, context.shards.folder, study.base.init)
        tracker = open_run(
            context.store,
            SpoolFolder(folder.tracking),
            key=key[:12],
            parent=context.parent,
            params={"study": study.name, "base": study.base.to_json()},
            tags={
                "mlflow.runName": folder.name,
                "vinedresser.kind": "sweep",
                "vinedresser.metric": study.base.task.metric,
                "vinedresser.folder": str(folder.path),
                "vinedresser.task": study.base.task.name,
                "vinedresser.space": ", ".join(study.space),
                "vinedresser.objectives": ", ".join(f"{k} {d}" for k, d in objectives.items()),
            },
        )
        with ending(tracker):
            opened = open_study(folder.journal, study, objectives)
            if known_trials := ended_trials(opened, objectives):
                count = len(known_trials)
                _log.info("%s: %d of %d trials known", folder.name, count, study.num_trials)
            if len(known_trials) < study.num_trials:
                tracker.wait_for_opening()
                # A trial is on the cluster already.
                children = replace(context, parent=key[:12], is_remote=False)
                try:
                    run_trials(
                        study, children,
                        opened=opened, objectives=objectives, scratch=folder.ray_scratch,
                    )  # fmt: skip
                finally:
                    # Of trials whose process Tune ended before it could close its tracking run.
                    end_children(context.store, key[:12], "stopped early")
                # What the store missed of the trials, if it is back.
                runs = runs_of(workspace, study.base.name)
                left = deliver_spools(
                    (SpoolFolder(run.tracking) for run in runs), workspace.path
                ).left
                if left:
                    _log.warning(
                        "%s: %d runs are not tracked completely (%s); `vinedresser sync` delivers "
                        "the rest", folder.name, len(left), next(iter(left.values())),
                    )  # fmt: skip
            trials = [
                replace(_moved(trial, workspace), run=_run_of(trial, study, context).name)
                for trial in ended_trials(opened, objectives)
            ]
            _drop_checkpoints(trials, workspace)
            if len(trials) < study.num_trials:
                raise InterruptedRunError(
                    f"{folder.name}: stopped after {len(trials)} of {study.num_trials} trials; run "
                    "the same command to resume"
                )
            ranked = rank(trials, objectives)
            outcome = SweepOutcome(key, str(folder.path), objectives, ranked, tracker.run_id)
            if not outcome.complete:
                reasons = sorted({trial.reason for trial in trials if trial.reason})
                raise TrainingError(
                    f"{folder.name}: none of {len(trials)} trials ran to its end "
                    f"({'; '.join(reasons[:3])}); widen the space or lower optim.lr"
                )
            # With one objective the front is all trials with the best value; one model is enough.
            best = outcome.pareto() if len(objectives) > 1 else [outcome.best]
            front = [trial.number for trial in best]
            content = {**asdict(outcome), "front": front}
            write_file(folder.outcome, json.dumps(content, indent=1) + "\n")
            _record(outcome, tracker)
    return outcome


def _record(outcome: SweepOutcome, tracker: Tracker) -> None:
    """Record the best trial and the table of all trials in the sweep's tracking run."""
    trials, best = outcome.trials, outcome.best
    tracker.log({f"best/{outcome.metric}": best.values[outcome.metric]}, len(trials))
    tracker.tag({"vinedresser.best_trial": str(best.number)})
    keys = sorted({key for trial in trials for key in trial.params})
    tracker.table(
        {
            "trial": [trial.number for trial in trials],
            "state": [trial.state for trial in trials],
            **{metric: [t.values[metric] for t in trials] for metric in outcome.objectives},
            **{key: [trial.params.get(key) for trial in trials] for key in keys},
        },
        "trials.json",
    )


def _run_of(trial: TrialRow, study: Study, context: RunContext) -> RunFolder:
    return run_folder(study.base.override(trial.params), context.shards, context.workspace)


def _drop_checkpoints(trials: list[TrialRow], workspace: Workspace) -> None:
    """Remove the checkpoints of trials that were stopped early or failed: none of them resumes.

    Those of a run that another command trains stay. `gc` removes those of processes on other hosts.
    """
    until = time.monotonic() + _END_SECONDS
    for run in (RunFolder(workspace.runs / trial.run) for trial in trials):
        lease = Lease(run.command_lease)
        while run.checkpoints.is_dir() and not lease.is_free() and time.monotonic() < until:
            time.sleep(0.1)
        if run.checkpoints.is_dir() and lease.is_free():
            shutil.rmtree(run.checkpoints, ignore_errors=True)


def read_outcome(folder: SweepFolder, workspace: Workspace) -> SweepOutcome | None:
    """Return the outcome of a sweep that ended, if the best models of its trials are there."""
    plain = read_json(folder.outcome)
    if plain is None:
        return None
    front = plain.pop("front", [])
    trials = [_moved(TrialRow(**row), workspace) for row in plain.pop("trials")]
    outcome = SweepOutcome(**{**plain, "folder": str(folder.path)}, trials=trials)
    return outcome if all(trial.bundle for trial in trials if trial.number in front) else None


def _moved(trial: TrialRow, workspace: Workspace) -> TrialRow:
    """Return a trial with its bundle's present path, "" if it was removed.

    The workspace may have been moved since.
    """
    if not trial.bundle:
        return trial
    bundle = RunFolder(workspace.runs / Path(trial.bundle).parent.name).bundle
    return replace(trial, bundle=str(bundle) if bundle.is_dir() else "")
