"""LaterTracker: a run that is opened in a thread, so that training does not wait for MLflow.

Importing mlflow takes 1 s of processor, opening a run in a new database 3 s, all of it Python that
holds the interpreter. So it begins when there is something to say, after the first updates.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vinedresser.tracking.tracker import State, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A run whose first words take longer is opened without them: it should be seen to be RUNNING.
PATIENCE = 5.0


class LaterTracker:
    """Keeps what is said until the run is open, and hands it on in its order.

    An error of opening that the user can act on is raised by the next thing that is said, by
    `close` never.
    """

    def __init__(self, opening: Callable[[], Tracker], *, patience: float = PATIENCE) -> None:
        """Starts the thread.

        Args:
            opening: makes the tracker; called once, in the thread.
            patience: seconds to wait for something to say before it is called anyway.
        """
        self._opening, self._patience = opening, patience
        self._said: list[Callable[[Tracker], None]] = []
        self._tracker: Tracker | None = None
        self._error: Exception | None = None
        self._lock, self._wanted = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._open, name="open-run", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """Of the run; waits until it is open.

        Raises:
            VinedresserError: it could not be opened.
        """
        self._wanted.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._tracker is not None
        return self._tracker.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Notes metrics at a step."""
        kept = {key: float(value) for key, value in metrics.items()}
        self._say(lambda tracker: tracker.log(kept, step))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        kept = dict(tags)
        self._say(lambda tracker: tracker.tag(kept))

    def text(self, content: str, name: str) -> None:
        """Stores a text."""
        self._say(lambda tracker: tracker.text(content, name))

    def table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Stores a table."""
        kept = {key: list(column) for key, column in columns.items()}
        self._say(lambda tracker: tracker.table(kept, name))

    def figure(self, figure: "Figure", name: str) -> None:
        """Stores a figure, which must not be changed afterwards."""
        self._say(lambda tracker: tracker.figure(figure, name))

    def close(self, state: State, reason: str = "") -> None:
        """Waits until the run is open, and ends it."""
        self._wanted.set()
        self._thread.join()
        if self._tracker is not None:
            self._tracker.close(state, reason)

    def _say(self, call: Callable[[Tracker], None]) -> None:
        self._wanted.set()
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._tracker is None:
                return self._said.append(call)
        return call(self._tracker)

    def _open(self) -> None:
        self._wanted.wait(self._patience)
        try:
            tracker = self._opening()
        except Exception as error:  # noqa: BLE001 (raised where somebody can act on it)
            with self._lock:
                self._error, self._said = error, []
            return
        with self._lock:
            for call in self._said:
                call(tracker)
            self._said = []
            self._tracker = tracker
