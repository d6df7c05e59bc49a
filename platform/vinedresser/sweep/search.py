"""sweep(): run the trials that a study lacks, rank all of them, and record them in the tracker."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

from vinedresser.config.study import Study
from vinedresser.distributed.context import RunContext
from vinedresser.errors import InterruptedRunError, TrainingError
from vinedresser.sweep.journal import ended_trials, open_study
from vinedresser.sweep.outcome import SweepOutcome, TrialRow, directions, rank
from vinedresser.sweep.trials import run_trials
from vinedresser.tracking import Tracker, end_children, ending, open_run, sync
from vinedresser.workspace.commit import digest_of, read_manifest
from vinedresser.workspace.layout import RunFolder, SpoolFolder, SweepFolder, Workspace, runs_of
from vinedresser.workspace.lease import leased
from vinedresser.workspace.storage import read_json, write_file

_log = logging.getLogger(__name__)


def sweep(study: Study, context: RunContext) -> SweepOutcome:
    """Run the trials that a study lacks and rank all of them. Ray must be connected.

    Raises:
        ConfigError: an objective without a direction.
        TrainingError: no trial ran to its end.
        BusyError: another process runs this sweep.
        MachineError: one trial needs more than the whole cluster.
    """
    objectives = directions(study)
    content = {**study.model_dump(mode="json"), "name": "", "task": context.shards.digest}
    if study.base.init is not None:
        # By content in the place of its path, as in the key of a run.
        content["base"] = {**content["base"], "init": read_manifest(Path(study.base.init)).digest}
    key, workspace = digest_of(content), context.workspace
    folder = workspace.sweep_folder(study.name, key)
    with leased(folder.lease, f"sweep {folder.name}"):
        known = read_outcome(folder, workspace)
        if known is not None:
            _log.info("%s: unchanged, %d trials known", folder.name, len(known.trials))
            return known
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
                left = sync((SpoolFolder(run.tracking) for run in runs), workspace.path).left
                if left:
                    _log.warning(
                        "%s: %d runs are not tracked completely (%s); `vinedresser sync` delivers "
                        "the rest", folder.name, len(left), next(iter(left.values())),
                    )  # fmt: skip
            trials = [_moved(trial, workspace) for trial in ended_trials(opened, objectives)]
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
            write_file(folder.outcome, json.dumps(asdict(outcome), indent=1) + "\n")
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


def read_outcome(folder: SweepFolder, workspace: Workspace) -> SweepOutcome | None:
    """Return the outcome of a sweep that ended, if the models of its trials are still there."""
    plain = read_json(folder.outcome)
    if plain is None:
        return None
    trials = [_moved(TrialRow(**row), workspace) for row in plain.pop("trials")]
    outcome = SweepOutcome(**{**plain, "folder": str(folder.path)}, trials=trials)
    return outcome if all(Path(trial.bundle).is_dir() for trial in outcome.complete) else None


def _moved(trial: TrialRow, workspace: Workspace) -> TrialRow:
    """Return a trial with its bundle's present path: the workspace may have been moved since."""
    if not trial.bundle:
        return trial
    run = RunFolder(workspace.runs / Path(trial.bundle).parent.name)
    return replace(trial, bundle=str(run.bundle))
