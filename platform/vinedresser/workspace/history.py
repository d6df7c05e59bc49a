"""History of a run: its failures, rollbacks and deaths of workers, over all of its restarts.

Kept in a file of the run's folder: a supervisor, Ray or a user may start a new process each time.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vinedresser.errors import DataError, MachineError, TrainingError, VinedresserError
from vinedresser.workspace.storage import POSIX, Storage, parsed_object

# Equal failures in a row, at the same step, after which a start is refused.
_SAME_FAILURES = 3
# Repaired outside of the run: a mount that is away, a checkpoint to be restored from a copy.
_EXTERNAL = (OSError, DataError, MachineError)


class RunHistory:
    """Counters of a run's folder; safe to be written by several processes."""

    def __init__(self, path: Path, *, storage: Storage = POSIX) -> None:
        self._path, self._storage = path, storage

    def require_progress(self) -> None:
        """Refuse a run whose last three starts failed in the same way at the same step.

        A refusal costs nothing and resets the count, because the repair may be in code, by which
        no run is named. A supervisor that repeats the same command for ever trains in three of
        four starts, from the last checkpoint to the same step; the fourth ends at once with exit
        code 4, by which the supervisor can stop.

        Raises:
            TrainingError: the step and the reason; the next start may try again.
        """
        last = self._entries("failures")[-_SAME_FAILURES:]
        if len(last) == _SAME_FAILURES and all(entry == last[0] for entry in last):
            step, reason = last[0]
            self.forget_failures()
            raise TrainingError(
                f"{self._path.parent.name} failed {_SAME_FAILURES} times after step {step} with: "
                f"{reason}. Fix: repair that, or change the experiment; the next command tries "
                "again from the last checkpoint"
            )

    def add_failure(self, step: int, error: Exception) -> None:
        """Note how a start ended; errors of data, disk and machine are not noted."""
        if isinstance(error, _EXTERNAL):
            return
        text = error.args[0] if isinstance(error, VinedresserError) else str(error)
        reason = ": ".join([type(error).__name__, *text.strip().splitlines()[:1]])
        with contextlib.suppress(OSError, MachineError):  # the error itself matters more
            self._change("failures", lambda entries: [*entries, [step, reason]])

    def forget_failures(self) -> None:
        """Reset the count of failures."""
        self._change("failures", lambda _: [])

    @property
    def rollbacks(self) -> int:
        """Times that the run went back to its last checkpoint because it diverged."""
        return len(self._entries("rollbacks"))

    def add_rollback(self, *, done: int, reason: str) -> None:
        """Note one rollback more than `done`; ranks that note the same one count once."""
        self._change("rollbacks", lambda entries: [*entries[:done], [done + 1, reason]])

    def add_death(self, checkpoint: int) -> int:
        """Note that workers died; return the deaths since the newest checkpoint.

        Args:
            checkpoint: step of the newest checkpoint.
        """
        return len(
            self._change("deaths", lambda old: [*(s for s in old if s == checkpoint), checkpoint])
        )

    @property
    def deaths(self) -> list[int]:
        """Deaths of workers, each as the step of the newest checkpoint before it."""
        return self._entries("deaths")

    def take_deaths(self) -> list[int]:
        """Return and forget the deaths."""
        deaths = self.deaths
        self._change("deaths", lambda _: [])
        return deaths

    def _entries(self, name: str) -> list[Any]:
        found = parsed_object(self._storage.read(self._path)).get(name)
        return found if isinstance(found, list) else []

    def _change(self, name: str, change: Callable[[list[Any]], list[Any]]) -> list[Any]:
        while True:
            found = self._storage.read(self._path)
            content = parsed_object(found)
            before = content.get(name)
            entries = change(before if isinstance(before, list) else [])
            if entries == before:
                return entries
            text = json.dumps({**content, name: entries}) + "\n"
            if self._storage.replace(self._path, text.encode(), expected=found):
                return entries
