"""What a run has logged, as its rules read it."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vinedresser.config import Experiment

# (step, value), in the order of steps.
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Facts:
    """What the rules have to know about a run.

    Attributes:
        uniform: ln |V|, the loss of uniform guessing, nats a token.
        steps: updates of the whole run.
        warmup: updates of warm-up.
        anneal: share of the run at its end over which the rate falls to 0.
        clip_norm: gradients above it are scaled down.
    """

    uniform: float
    steps: int
    warmup: int
    anneal: float
    clip_norm: float

    @classmethod
    def of(cls, experiment: Experiment, *, vocabulary: int) -> "Facts":
        """Of an experiment whose target side has so many ids."""
        optim = experiment.optim
        return cls(
            uniform=math.log(vocabulary),
            steps=experiment.steps,
            warmup=optim.warmup_steps,
            anneal=optim.anneal,
            clip_norm=optim.clip_norm,
        )


class Log:
    """Everything that a run logged: key -> (step, value), in order; what is not finite is left out.

    Attributes:
        facts: of the run.
    """

    def __init__(self, facts: Facts, points: Mapping[str, Iterable[Sequence[float]]] = {}) -> None:
        self.facts = facts
        self._points: dict[str, list[tuple[int, float]]] = {}
        for key, pairs in points.items():
            self._points[key] = [(int(step), float(value)) for step, value in pairs]

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Notes metrics at a step."""
        for key, value in metrics.items():
            if math.isfinite(value):
                self._points.setdefault(key, []).append((step, value))

    def of(self, key: str, *, after: float = 0) -> Points:
        """The points of a key at steps above `after`."""
        return [point for point in self._points.get(key, ()) if point[0] > after]

    def last(self, key: str, count: int, *, after: float = 0) -> Points:
        """The last `count` points above `after`; none where there are fewer."""
        points = self.of(key, after=after)
        return points[-count:] if len(points) >= count else ()

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin so."""
        return [key for key in self._points if key.startswith(prefix)]

    def to_json(self) -> dict[str, list[tuple[int, float]]]:
        """Plain JSON."""
        return self._points


def median(points: Points) -> float:
    """Of the values; 0 without any."""
    return statistics.median(value for _, value in points) if points else 0.0


def least(points: Points) -> float:
    """Of the values; 0 without any."""
    return min((value for _, value in points), default=0.0)
