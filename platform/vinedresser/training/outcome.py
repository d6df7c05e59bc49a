"""Outcome of a run: its key, its folder, and the result that a finished run leaves.

A run is named by its content: the same experiment on the same shards is the same run.
"""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vinedresser.config import Experiment
from vinedresser.data.shards import ShardSet
from vinedresser.metrics import is_lower_better
from vinedresser.workspace.commit import digest_of, is_committed, read_manifest
from vinedresser.workspace.layout import RunFolder, Workspace, runs_of
from vinedresser.workspace.storage import write_file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        key: content digest of experiment and data.
        folder: of the run.
        bundle: folder of the model that ships.
        scores: dev Scores of that model as plain JSON.
        best_step: the update after which it was taken.
        history: one entry per evaluation: step, value, teacher_forced_loss, and heads where gated.
        seconds: wall time of training and evaluation, over all resumptions.
        last_report: the last report; its numbers on dev are those of the model that ships.
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
        """Return the last report to a scheduler, also of a run that had ended before."""
        return {**self.last_report, "is_last": 1.0, "run/bundle": self.bundle}

    @property
    def value(self) -> float:
        """Return the inferred metric on dev."""
        return float(self.scores[self.scores["metric"]])

    @property
    def selection_regret(self) -> float:
        """Return how much worse, in the metric, selection by the teacher-forced loss would be.

        Negative where it would have been better, which happens to runs with gates only: their last
        weights ship, not their best.
        """
        finite = [entry for entry in self.history if math.isfinite(entry["teacher_forced_loss"])]
        by_loss = min(finite, key=lambda entry: entry["teacher_forced_loss"])
        regret = by_loss["value"] - self.value
        return regret if is_lower_better(self.scores["metric"]) else -regret


def run_key(experiment: Experiment, shards: ShardSet) -> str:
    """Return the content digest of a run, with data and initial weights by digest.

    Name, workers, threads, devices and checkpoints are left out: they change nothing of what is
    trained beyond rounding, so that a run may resume with others.
    """
    content = {**experiment.to_json(), "task": shards.digest}
    for key in ("name", "checkpoint_every", "keep_checkpoints"):
        del content[key]
    content["compute"] = {"precision": experiment.compute.precision}
    content["batch"] = {**content["batch"], "per_update": experiment.batches_per_update}
    if experiment.init is not None:
        # Its files are verified when its weights are loaded.
        content["init"] = read_manifest(Path(experiment.init)).digest
    return digest_of(content)


def run_folder(experiment: Experiment, shards: ShardSet, workspace: Workspace) -> RunFolder:
    """Return the folder of a run."""
    return workspace.run(experiment.name, run_key(experiment, shards))


def finished(folder: RunFolder) -> Outcome | None:
    """Return the outcome of a run that has ended well, else None.

    Its paths are the present ones: the workspace may have been moved or copied since.
    """
    try:
        outcome = Outcome(**json.loads(folder.outcome.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if not is_committed(folder.bundle):
        return None
    return replace(outcome, folder=str(folder.path), bundle=str(folder.bundle))


def clear(folder: RunFolder) -> None:
    """Empty a run's folder; the leases on it stay."""
    for path in folder.path.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def record_experiment(experiment: Experiment, folder: RunFolder) -> None:
    """Write the experiment to its folder; log how it differs from an unfinished run of its name.

    Another experiment is another run in a separate folder; a user who meant to resume sees why the
    run starts anew.
    """
    if folder.experiment.is_file():
        return
    for other in runs_of(Workspace(folder.path.parent.parent), experiment.name):
        if other == folder or other.outcome.is_file():
            continue
        with contextlib.suppress(OSError, ValueError):
            before = _flat(json.loads(other.experiment.read_text()))
            now = _flat(experiment.to_json())
            keys = sorted(k for k in before | now if before.get(k) != now.get(k))
            shown = [f"{k} {before.get(k)} -> {now.get(k)}" for k in keys[:5]]
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            change = ", ".join(shown) + more if shown else "other data"
            _log.info("a new run; the unfinished %s differs: %s", other.name, change)
    write_file(folder.experiment, json.dumps(experiment.to_json(), indent=1) + "\n")


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Return dotted key -> leaf."""
    if not isinstance(value, Mapping):
        return {at: value}
    prefix = f"{at}." if at else ""
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}").items()}
