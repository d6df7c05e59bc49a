"""Tracker: interface of training to a tracking store; null for none."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from vinedresser.errors import InterruptedRunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Receiver of a run's metrics, tags and artifacts; the methods do nothing here.

    No method raises for an error of a server.
    """

    @property
    def run_id(self) -> str:
        """Id of the run in the store; empty without tracking."""
        return ""

    def wait_for_opening(self) -> None:
        """Wait for the first attempt to open the run, before runs that are a part of it begin."""

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


class NullTracker(Tracker):
    """Tracker without effect: rank > 0, or a dry run."""


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
