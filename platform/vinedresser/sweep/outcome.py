"""Result of a sweep: its trials as plain rows, ranked, and their Pareto front."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vinedresser.config.study import INFERRED, Study
from vinedresser.errors import ConfigError
from vinedresser.metrics import is_lower_better

Direction = Literal["min", "max"]

# Directions of the numbers that trials report in addition to the task's metric.
_REPORTED: Mapping[str, Direction] = {
    "dev/heads": "min",
    "dev/parameters": "min",
    "dev/teacher_forced_loss": "min",
    "dev/teacher_forced_error": "min",
    "dev/exposure_gap": "min",
    "dev/conditioning_gap": "max",
}


def directions(study: Study) -> dict[str, Direction]:
    """Return metric -> direction of a study's objectives; the task's metric is the first.

    Raises:
        ConfigError: the direction of a metric is neither given nor known.
    """
    task_metric = study.base.task.metric
    found: dict[str, Direction] = {}
    for objective in study.objectives:
        if objective.metric == INFERRED:
            found[task_metric] = "min" if is_lower_better(task_metric) else "max"
            continue
        direction = objective.direction or _REPORTED.get(objective.metric)
        if direction is None:
            raise ConfigError(
                f"study {study.name}: objective {objective.metric} has no known direction; write "
                f"[{objective.metric}, min] or [{objective.metric}, max], or name one of "
                f"{', '.join([INFERRED, *_REPORTED])}"
            )
        found[objective.metric] = direction
    return found


def report_keys(objectives: Mapping[str, Direction]) -> list[str]:
    """Return the keys of objectives in the reports of trials.

    A single objective is the best of all evaluations so far, which never gets worse. Several
    objectives are read from one model: at the end of a trial, the one that ships.
    """
    metric, *others = objectives
    return [f"dev/{metric}", *others] if others else [f"best/{metric}"]


@dataclass(frozen=True)
class TrialRow:
    """One trial of a sweep.

    Attributes:
        number: Optuna's, 0-based, in the order of proposals.
        state: complete, pruned (stopped early) or fail.
        params: dotted keys -> values.
        values: metric -> value for each objective of the study, NaN where there is none. Several
            values belong to one model, the one that ships. The only value of a study is the best
            of all evaluations: with gates, whose last weights ship, of an earlier model.
        bundle: folder of the trained model, "" unless complete and still there.
        reason: error message of a failed trial.
        run: name of the folder of its run.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    values: Mapping[str, float]
    bundle: str = ""
    reason: str = ""
    run: str = ""


@dataclass(frozen=True)
class SweepOutcome:
    """A finished sweep, trials ranked best first.

    Attributes:
        key: content digest of study and data.
        folder: of the sweep; `journal.log` in it is an Optuna journal.
        objectives: metric -> direction; the first one, the task's metric, ranks the trials.
        trials: every trial.
        run_id: its tracking run.
    """

    key: str
    folder: str
    objectives: Mapping[str, Direction]
    trials: list[TrialRow]
    run_id: str

    @property
    def metric(self) -> str:
        """Name of the task's metric."""
        return next(iter(self.objectives))

    @property
    def complete(self) -> list[TrialRow]:
        """Trials that ran to their end, best first."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def best(self) -> TrialRow:
        """The complete trial with the best inferred score."""
        return self.complete[0]

    def pareto(self) -> list[TrialRow]:
        """Return the complete trials that no other one beats in all objectives.

        In the order of the second objective, then the third, and so on; the first one comes last.
        """
        points = {t.number: lower_is_better(t.values, self.objectives) for t in self.complete}

        def is_beaten(point: tuple[float, ...]) -> bool:
            return any(
                other != point and all(a <= b for a, b in zip(other, point, strict=True))
                for other in points.values()
            )

        front = [trial for trial in self.complete if not is_beaten(points[trial.number])]
        return sorted(front, key=lambda t: points[t.number][1:] + points[t.number][:1])


def lower_is_better(
    values: Mapping[str, float], objectives: Mapping[str, Direction]
) -> tuple[float, ...]:
    """Return the values of objectives in order, those to maximise negated."""
    return tuple(values[name] * (1 if way == "min" else -1) for name, way in objectives.items())


def rank(trials: list[TrialRow], objectives: Mapping[str, Direction]) -> list[TrialRow]:
    """Return trials best first by the first objective: the complete, the pruned, the failed."""
    states = ("complete", "pruned", "fail")

    def place(trial: TrialRow) -> tuple[int, bool, float]:
        first = lower_is_better(trial.values, objectives)[0]
        return states.index(trial.state), math.isnan(first), 0.0 if math.isnan(first) else first

    return sorted(trials, key=place)


def short_params(params: Mapping[str, Any]) -> str:
    """Return `probability 0.21, clip_norm 1.3`: last parts of keys, three digits."""
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in params.items()}
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in shown.items())
