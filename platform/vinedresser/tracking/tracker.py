"""Tracker: what training may say to a tracking store; in memory for tests, null for silence."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vinedresser.errors import InterruptedRunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Where a run's metrics, tags and artifacts go. No method raises for a server's trouble."""

    @property
    def run_id(self) -> str:
        """Of the store; empty where nothing is tracked."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Notes metrics at a step (1-based). Non-finite values are skipped and counted."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Sets tags; a later value of the same key replaces the earlier."""

    def text(self, content: str, name: str) -> None:
        """Stores a text as the artifact `name`, a relative POSIX path."""

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Stores columns of equal length as a JSON table that the user interface can show."""

    def figure(self, figure: "Figure", name: str) -> None:
        """Stores a Matplotlib figure; the name's ending (.png, .svg) says the format."""

    def close(self, state: State, reason: str = "") -> None:
        """Ends the run with its state, and says why. Only the first call counts."""


class NullTracker:
    """Forgets everything: rank > 0, a dry run, or a tracking server that was not there."""

    def __init__(self, run_id: str = "") -> None:
        self.run_id = run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Forgets metrics."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Forgets tags."""

    def text(self, content: str, name: str) -> None:
        """Forgets a text."""

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Forgets a table."""

    def figure(self, figure: "Figure", name: str) -> None:
        """Forgets a figure."""

    def close(self, state: State, reason: str = "") -> None:
        """Does nothing."""


class MemoryTracker:
    """Keeps everything in lists and dicts, for tests.

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
        """Appends each metric."""
        self.metrics += [(key, float(value), step) for key, value in metrics.items()]

    def tag(self, tags: Mapping[str, str]) -> None:
        """Merges tags."""
        self.tags |= tags

    def text(self, content: str, name: str) -> None:
        """Keeps a text."""
        self.artifacts[name] = content

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Keeps a copy of the columns."""
        self.artifacts[name] = copy.deepcopy(dict(columns))

    def figure(self, figure: "Figure", name: str) -> None:
        """Keeps the figure itself."""
        self.artifacts[name] = figure

    def close(self, state: State, reason: str = "") -> None:
        """Keeps the first state."""
        if self.state is None:
            self.state, self.reason = state, reason


@contextlib.contextmanager
def ending(tracker: Tracker) -> Iterator[None]:
    """Closes a run with the state that the block's end deserves; whatever it raises passes.

    FINISHED; KILLED for a trial that Tune stops (by SystemExit out of its report), for Ctrl-C and
    for SIGTERM; FAILED with the reason for everything else.
    """
    try:
        yield
    except SystemExit:
        tracker.close("KILLED", "stopped early")
        raise
    except (KeyboardInterrupt, InterruptedRunError):
        tracker.close("KILLED", "interrupted")
        raise
    except BaseException as error:
        tracker.close("FAILED", str(error))
        raise
    tracker.close("FINISHED")
