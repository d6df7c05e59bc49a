"""Study: the ranges and objectives of a search, as plain data that is checked before it starts."""

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    model_validator,
)

from vinedresser.config import Experiment, SafeName, Section
from vinedresser.errors import ConfigError, reworded

_KINDS = {
    "float": FloatDistribution,
    "int": IntDistribution,
    "categorical": CategoricalDistribution,
}


def _read_distribution(value: Any) -> Any:
    """Return Optuna's distribution for `{type: float, low: 0.01, high: 10, log: true}`."""
    if not isinstance(value, Mapping):
        return value
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"type is {kind!r}; expected one of {', '.join(_KINDS)}")
    arguments = {key: item for key, item in value.items() if key != "type"}
    with reworded(TypeError, ValueError, f"not a {kind} distribution: "):
        return _KINDS[kind](**arguments)


def _write_distribution(value: BaseDistribution) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if type(value) is cls)
    if isinstance(value, CategoricalDistribution):
        return {"type": kind, "choices": list(value.choices)}
    assert isinstance(value, FloatDistribution | IntDistribution)
    plain = {"type": kind, "low": value.low, "high": value.high, "log": value.log}
    return plain if value.step is None else {**plain, "step": value.step}


Distribution = Annotated[
    InstanceOf[BaseDistribution],
    BeforeValidator(_read_distribution),
    PlainSerializer(_write_distribution),
]


def ends(distribution: BaseDistribution) -> list[Any]:
    """Return the values at which a range is checked: both ends, or every choice."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


# The first objective of every study: the task's metric of decoded output. A metric that ranks
# models is never teacher-forced.
INFERRED = "inferred"


class StudyObjective(Section):
    """One metric that a study optimises; `dev/heads` and `[dev/heads, min]` are short forms."""

    # `inferred`, or the key of any number that trials report, such as dev/heads.
    metric: Annotated[str, Field(min_length=1)]
    # None takes the direction of the METRICS table.
    direction: Literal["min", "max"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Accept `dev/heads` and `[dev/heads, min]`."""
        if isinstance(value, str):
            return {"metric": value}
        if isinstance(value, list | tuple) and len(value) == 2:
            return {"metric": value[0], "direction": value[1]}
        return value


class Stopping(Section):
    """Asynchronous successive halving (Li et al. 2020) on the best inferred score so far.

    At evaluation `grace`, `grace * factor`, ... a trial continues only if it is among the best
    1/factor of those that reached it.
    """

    grace: PositiveInt = 1
    factor: Annotated[float, Field(gt=1)] = 3.0


class Study(Section):
    """A base experiment, the ranges of some of its keys, and how many trials to spend."""

    name: SafeName
    base: Experiment
    # Dotted keys of the experiment -> Optuna's own distributions.
    space: Mapping[str, Distribution]
    # `inferred` first; further objectives make the result a Pareto front.
    objectives: tuple[StudyObjective, ...] = (StudyObjective(metric=INFERRED),)
    num_trials: PositiveInt = 8
    # Trials that run at the same time; 0 runs as many as fit the cluster.
    concurrent: NonNegativeInt = 0
    # None runs every trial to its end.
    stopping: Stopping | None = Stopping()
    seed: NonNegativeInt = 1

    @model_validator(mode="after")
    def _check_space(self) -> Self:
        """Build the experiment at both ends of each key, under both ends of each key that holds it.

        For example `model.dropout` under every choice of `model`.
        """
        if not self.space:
            raise ValueError("space is empty; name at least one key to vary")
        for key in self.space:
            names = [key, *(name for name in self.space if key.startswith(f"{name}."))]
            for corner in itertools.product(*(ends(self.space[name]) for name in names)):
                values = dict(zip(names, corner, strict=True))
                at = ", ".join(f"space.{name} at {value}" for name, value in values.items())
                with reworded(ConfigError, ValueError, f"{at}: "):
                    self.base.override(values)
        return self

    @model_validator(mode="after")
    def _check_objectives(self) -> Self:
        names = [objective.metric for objective in self.objectives]
        if not names or self.objectives[0] != StudyObjective(metric=INFERRED):
            raise ValueError(
                f"objectives: found {names}; the first one must be {INFERRED}, without a "
                "direction: it ranks the trials"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"objectives: found {names}; name each metric once")
        if len(names) > 1 and self.stopping is not None:
            raise ValueError(
                "stopping ranks trials by one metric; set stopping: null for a Pareto front of "
                f"{len(names)} objectives"
            )
        return self
