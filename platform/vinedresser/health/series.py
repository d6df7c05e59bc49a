"""Series of the metrics of a run, which the health rules read, and constants of the run."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vinedresser.config import Experiment
from vinedresser.figures.monitoring import Reading

# (step, value), in the order of steps.
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class RunFacts:
    """Constants of a run that the rules need.

    `uniform` is ln |V|, the loss of a uniform guess in nats per token; `steps` and `warmup` are
    updates; `anneal` is the share of the run at its end over which the learning rate falls to 0; a
    warm start is not fresh, and its first loss has no known value.
    """

    uniform: float
    steps: int
    warmup: int
    anneal: float
    clip_norm: float
    is_fresh: bool = True

    @classmethod
    def of(cls, experiment: Experiment, *, vocabulary: int) -> "RunFacts":
        """Return the facts of an experiment with `vocabulary` target ids."""
        optim = experiment.optim
        return cls(
            uniform=math.log(vocabulary),
            steps=experiment.steps,
            warmup=optim.warmup_steps,
            anneal=optim.anneal,
            clip_norm=optim.clip_norm,
            is_fresh=experiment.init is None,
        )


class Log:
    """Series of a run: key -> (step, value) in order; values that are not finite are left out."""

    def __init__(
        self, facts: RunFacts, points: Mapping[str, Iterable[Sequence[float]]] = {}
    ) -> None:
        self.facts = facts
        self.points = {
            key: [(int(step), float(value)) for step, value in pairs]
            for key, pairs in points.items()
        }

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics of a step."""
        for key, value in metrics.items():
            if math.isfinite(value):
                self.points.setdefault(key, []).append((step, value))

    def of(self, key: str, *, after: float = 0) -> Points:
        """Return the points of a key at steps above `after`."""
        return [point for point in self.points.get(key, ()) if point[0] > after]

    def last(self, key: str, count: int, *, after: float = 0) -> Points:
        """Return the last `count` points above `after`; none where there are fewer."""
        points = self.of(key, after=after)
        return points[-count:] if len(points) >= count else ()

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin with a prefix."""
        return [key for key in self.points if key.startswith(prefix)]


def reading_details(reading: Reading) -> dict[str, float]:
    """Return the statistics of single layers and functions as metrics for the rules."""
    found = {}
    for layer, values in reading.layers.items():
        if "update_ratio" in values:
            found[f"update_ratio of {layer}"] = values["update_ratio"]
    for function, values in reading.functions.items():
        if "units" in values:
            found[f"dead_share of {function}"] = values["dead"] / values["units"]
        if "saturated" in values:
            found[f"saturated of {function}"] = values["saturated"]
    return found


def median(points: Points) -> float:
    """Return the median of the values; 0 without any."""
    return statistics.median(value for _, value in points) if points else 0.0


def least(points: Points) -> float:
    """Return the smallest value; 0 without any."""
    return min((value for _, value in points), default=0.0)
