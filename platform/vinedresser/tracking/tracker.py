"""Tracker: interface of training to a tracking store; in memory for tests, null for none."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vinedresser.errors import InterruptedRunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Receiver of a run's metrics, tags and artifacts. No method raises for a server's error."""

    @property
    def run_id(self) -> str:
        """Id of the run in the store; empty without tracking."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note metrics at a step (1-based). Non-finite values are skipped and counted."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value of the same key replaces the earlier."""

    def text(self, content: str, name: str) -> None:
        """Store a text as the artifact `name`, a relative POSIX path."""

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Store columns of equal length as a JSON table that the user interface can show."""

    def figure(self, figure: "Figure", name: str) -> None:
        """Store a Matplotlib figure; the ending of the name (.png, .svg) is the format."""

    def close(self, state: State, reason: str = "") -> None:
        """End the run with its state and the reason. Only the first call counts."""


class NullTracker:
    """Tracker without effect: rank > 0, or a dry run."""

    def __init__(self, run_id: str = "") -> None:
        self.run_id = run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Ignore metrics."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Ignore tags."""

    def text(self, content: str, name: str) -> None:
        """Ignore a text."""

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Ignore a table."""

    def figure(self, figure: "Figure", name: str) -> None:
        """Ignore a figure."""

    def close(self, state: State, reason: str = "") -> None:
        """Do nothing."""


class MemoryTracker:
    """Tracker that keeps everything in lists and dicts, for tests.

    Attributes:
        metrics: (key, value, step) in the order of logging.
        artifacts: name -> text, copied columns, or the figure.
        state: None until closed.
    """

    def __init__(self, run_id: str = "memory") -> None:
        self.run_id = run_id
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


@contextlib.contextmanager
def ending(tracker: Tracker) -> Iterator[None]:
    """Close a run with the state that follows from the end of the block; errors pass.

    FINISHED; KILLED for a trial that Tune stops (by SystemExit out of its report), for Ctrl-C and
    for SIGTERM; FAILED with the reason for everything else.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            tracker.close("KILLED", "stopped early")
        elif isinstance(error, KeyboardInterrupt | InterruptedRunError):
            tracker.close("KILLED", "interrupted")
        else:
            tracker.close("FAILED", str(error))
        raise
    tracker.close("FINISHED")
