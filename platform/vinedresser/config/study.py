"""Study: what a search varies, as plain data that is checked before anything starts."""

import itertools
from collections.abc import Iterator, Mapping
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
from vinedresser.errors import ConfigError

_KINDS = {
    "float": FloatDistribution,
    "int": IntDistribution,
    "categorical": CategoricalDistribution,
}


def _read_distribution(value: Any) -> Any:
    """`{type: float, low: 0.01, high: 10, log: true}` -> Optuna's own distribution."""
    if not isinstance(value, Mapping):
        return value
    kind = value.get("type")
    if kind not in _KINDS:
        raise ValueError(f"type is {kind!r}; wanted one of {', '.join(_KINDS)}")
    arguments = {key: item for key, item in value.items() if key != "type"}
    try:
        return _KINDS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"not a {kind} distribution: {error}") from None


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
    """The values at which a range is checked: both ends, or every choice."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


class Stopping(Section):
    """Asynchronous successive halving (Li et al. 2020) on the best inferred score so far.

    At evaluation `grace`, `grace * factor`, ... a trial goes on only if it is among the best
    1/factor of those that got there.
    """

    grace: PositiveInt = 1
    factor: Annotated[float, Field(gt=1)] = 3.0


class Study(Section):
    """A base experiment, the ranges of some of its keys, and how many trials to spend."""

    name: SafeName
    base: Experiment
    # Dotted keys of the experiment -> Optuna's own distributions.
    space: Mapping[str, Distribution]
    # inferred: the task's metric. inferred_and_heads: that and the number of open heads, a
    # Pareto front.
    objective: Literal["inferred", "inferred_and_heads"] = "inferred"
    num_trials: PositiveInt = 8
    # Trials at a time; 0 lets as many run as fit the cluster.
    concurrent: NonNegativeInt = 0
    # None runs every trial to its end.
    stopping: Stopping | None = Stopping()
    seed: NonNegativeInt = 1

    def _corners(self, key: str) -> Iterator[dict[str, Any]]:
        """Both ends of a key, under both ends of each key that holds it: model of model.dropout."""
        names = [key, *(name for name in self.space if key.startswith(f"{name}."))]
        for values in itertools.product(*(ends(self.space[name]) for name in names)):
            yield dict(zip(names, values, strict=True))

    @model_validator(mode="after")
    def _both_ends_are_valid(self) -> Self:
        if not self.space:
            raise ValueError("space is empty; name at least one key to vary")
        for key in self.space:
            for values in self._corners(key):
                try:
                    self.base.override(values)
                except ConfigError as error:
                    at = ", ".join(f"space.{name} at {value}" for name, value in values.items())
                    raise ValueError(f"{at}: {error.args[0]}") from None
        if self.objective == "inferred_and_heads" and self.stopping is not None:
            raise ValueError(
                "stopping ranks trials by one metric; set stopping: null for a Pareto front"
            )
        return self
