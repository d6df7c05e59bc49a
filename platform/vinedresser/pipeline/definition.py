"""Pipeline: all inputs of `retrain`, as one value."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from vinedresser.bundle import Bundle
from vinedresser.config import Experiment, SafeName, Section, Task
from vinedresser.config.study import Study
from vinedresser.errors import ConfigError
from vinedresser.pruning.search import Pruning
from vinedresser.registry.gate import Gate
from vinedresser.sweep import TrialRow

StepName = Literal["prepare", "sweep", "finalist", "finetune", "prune", "register", "evaluate"]
# Steps of which one must come before a step.
_NEEDS: Mapping[str, tuple[StepName, ...]] = {
    "finalist": ("sweep",),
    "prune": ("finalist", "finetune"),
    "register": ("prune",),
}


class Pipeline(Section):
    """All inputs of `retrain`, as one value."""

    name: SafeName
    # Names of STEPS, in order.
    steps: tuple[StepName, ...] = ("prepare", "sweep", "finalist", "prune", "register")
    study: Study
    # Keys in which the training of `finalist` differs from the best trial's, and that of
    # `finetune` from the champion's; it starts from their weights.
    finalist: Mapping[str, Any] = {}
    pruning: Pruning
    # Name of the registered model.
    model_name: SafeName
    gate: Gate = Field(default_factory=Gate)
    # Replaces the seed of the study and its experiments when given.
    seed: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        """Refuse a step without the results that it needs."""
        if self.steps[:1] != ("prepare",) or len(set(self.steps)) < len(self.steps):
            raise ValueError(
                f"steps: found {', '.join(self.steps)}; begin with prepare, name each step once"
            )
        for index, name in enumerate(self.steps):
            needed = _NEEDS.get(name, ())
            if needed and not set(needed) & set(self.steps[:index]):
                raise ValueError(f"steps: {name} needs {' or '.join(needed)} before it")
        return self

    def seeded(self) -> "Pipeline":
        """Return the pipeline with its seed in the study and its base experiment."""
        if self.seed is None:
            return self
        seeds = {"study.seed": self.seed, "study.base.seed": self.seed, "seed": None}
        return self.override(seeds)

    def finalist_experiment(self, best: TrialRow) -> Experiment:
        """Return the best configuration, trained further from the best trial's weights."""
        base = self.study.base.override(best.params)
        changes = {"name": f"{self.name}-finalist", "init": best.bundle, **self.finalist}
        return base.override(changes)

    def finetune_experiment(self, champion: Bundle, task: Task) -> Experiment:
        """Return the champion's configuration, trained further on a task from its weights."""
        base = champion.experiment.model_copy(update={"task": task, "seed": self.study.base.seed})
        changes = {"name": f"{self.name}-finetune", "init": str(champion.folder), **self.finalist}
        return base.override(changes)

    def index(self, name: str | None, default: int) -> int:
        """Return the position of a step.

        Raises:
            ConfigError: the pipeline has no such step.
        """
        if name is not None and name not in self.steps:
            raise ConfigError(
                f"step {name}: not in pipeline {self.name}; it has {', '.join(self.steps)}"
            )
        return default if name is None else self.steps.index(name)
