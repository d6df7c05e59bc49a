"""Tracker in memory: what a run would send to a tracking store."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vinedresser.tracking.tracker import State, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MemoryTracker(Tracker):
    """Tracker that keeps everything in lists and dicts.

    Attributes:
        metrics: (key, value, step) in the order of logging.
        artifacts: name -> text, copied columns, or the figure.
        state: None until closed.
    """

    run_id = "memory"

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int]] = []
        self.tags: dict[str, str] = {}
        self.artifacts: dict[str, Any] = {}
        self.state: State | None = None
        self.reason = ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append each metric."""
        self.metrics += [(key, float(value), step) for key, value in metrics.items()]

    def tag(self, tags: Mapping[str, str]) -> None:
        """Merge tags."""
        self.tags |= tags

    def text(self, content: str, name: str) -> None:
        """Keep a text."""
        self.artifacts[name] = content

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Keep a copy of the columns."""
        self.artifacts[name] = copy.deepcopy(dict(columns))

    def figure(self, figure: "Figure", name: str) -> None:
        """Keep the figure itself."""
        self.artifacts[name] = figure

    def close(self, state: State, reason: str = "") -> None:
        """Keep the first state."""
        if self.state is None:
            self.state, self.reason = state, reason
