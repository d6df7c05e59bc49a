"""sweep(): runs what is left of a study, ranks all of its trials and tells the tracking store."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

from vinedresser.config.study import Study
from vinedresser.distributed import Site
from vinedresser.errors import InterruptedRunError, MachineError, TrainingError
from vinedresser.sweep.journal import counted, open_study
from vinedresser.sweep.outcome import SweepOutcome, TrialRow, rank
from vinedresser.sweep.trials import Say, run_trials, searcher_for
from vinedresser.tracking import Tracker, end_children, ending, open_run
from vinedresser.workspace.commit import digest_of, verify
from vinedresser.workspace.layout import RunFolder, SweepFolder, Workspace
from vinedresser.workspace.lease import leased
from vinedresser.workspace.storage import read_json, write_file

_log = logging.getLogger("vinedresser")


def sweep(study: Study, site: Site, *, shards_digest: str, say: Say) -> SweepOutcome:
    """Runs what is left of a study's trials and ranks all of them. Ray must be connected.

    Raises:
        TrainingError: no trial ran to its end.
        BusyError: another process runs this very sweep.
        MachineError: one trial wants more than the whole cluster.
    """
    content = {**study.model_dump(mode="json"), "name": "", "task": shards_digest}
    if study.base.init is not None:
        # By content in the place of its path, as in the key of a run.
        content["base"] = {**content["base"], "init": verify(Path(study.base.init)).digest}
    key = digest_of(content)
    folder = Workspace(Path(site.workspace)).sweep(study.name, key)
    with leased(folder.lease, f"sweep {folder.name}"):
        return _finished(folder, Path(site.workspace), say) or _sweep(study, site, folder, key, say)


def _finished(folder: SweepFolder, workspace: Path, say: Say) -> SweepOutcome | None:
    plain = read_json(folder.outcome)
    if plain is None:
        return None
    trials = [_present(TrialRow(**row), workspace) for row in plain.pop("trials")]
    outcome = SweepOutcome(**{**plain, "folder": str(folder.path)}, trials=trials)
    if not all(Path(trial.bundle).is_dir() for trial in outcome.complete):
        return None
    say(f"{folder.name}: unchanged, {len(trials)} trials known")
    return outcome


def _present(trial: TrialRow, workspace: Path) -> TrialRow:
    """A trial with its bundle where it is now: the workspace may have been moved since."""
    if not trial.bundle:
        return trial
    run = Path(trial.bundle).parent.name
    return replace(trial, bundle=str(RunFolder(Workspace(workspace).runs / run).bundle))


def _sweep(study: Study, site: Site, folder: SweepFolder, key: str, say: Say) -> SweepOutcome:
    metric = study.base.task.metric
    tracker = _open_parent(study, site, folder, key)
    with ending(tracker):
        storage, opened = open_study(folder.path, study, metric)
        done = len(counted(opened.get_trials(deepcopy=False)))
        if done:
            say(f"{folder.name}: {done} of {study.num_trials} trials known, going on")
        if done < study.num_trials:
            children = Site(site.shards, site.workspace, site.store, tracker.run_id, site.kind)
            try:
                count = study.num_trials - done
                run_trials(study, children, folder.path, searcher_for(study, storage), count, say)
            finally:
                _end_trials(children)
        ranked = rank(counted(opened.get_trials()), metric)
        trials = [_present(trial, Path(site.workspace)) for trial in ranked]
        if len(trials) < study.num_trials:
            raise InterruptedRunError(
                f"{folder.name}: stopped after {len(trials)} of {study.num_trials} trials; the "
                "same command goes on"
            )
        outcome = SweepOutcome(key, str(folder.path), metric, trials, tracker.run_id)
        if not outcome.complete:
            reasons = sorted({t.reason for t in trials if t.reason})
            raise TrainingError(
                f"{folder.name}: none of {len(trials)} trials ran to its end "
                f"({'; '.join(reasons[:3])}); widen the space or lower optim.lr"
            )
        plain = {**asdict(outcome), "trials": [asdict(trial) for trial in trials]}
        write_file(folder.outcome, json.dumps(plain, indent=1) + "\n")
        _summarise(tracker, outcome)
    return outcome


def _end_trials(site: Site) -> None:
    """Tune kills a stopped trial's process, often before that could close its tracking run."""
    if site.parent:
        try:
            end_children(site.store, site.parent, "stopped early")
        except MachineError as error:
            _log.warning("%s; stopped trials may stay RUNNING there", error.args[0])


def _open_parent(study: Study, site: Site, folder: SweepFolder, key: str) -> Tracker:
    return open_run(
        site.store,
        key=key[:12],
        name=folder.name,
        parent=site.parent,
        params={"study": study.name, "base": study.base.to_json()},
        tags={
            "vinedresser.kind": "sweep",
            "vinedresser.metric": study.base.task.metric,
            "vinedresser.folder": str(folder.path),
            "vinedresser.task": study.base.task.name,
            "vinedresser.space": ", ".join(study.space),
        },
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
