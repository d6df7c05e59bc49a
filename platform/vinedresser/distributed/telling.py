"""Progress of a group's rank 0 for the process that waits for the group, by a file in the folder.

Ray forwards what workers print or report, but late or not at all; the run's folder is there anyway.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from vinedresser.train import Best, Progress, Tell, untold

_NAME = ".progress.json"
# Seconds between two looks, and between two writings at least: 20 microseconds each on a disk.
_EVERY = 0.5


class FileTell:
    """Writes where the run stands twice a second; a full disk does not end a run for that."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._told, self._phase = 0.0, ""
        # The last log line's step, loss and speed: told until there is another.
        self._logged: tuple[int, float | None, float | None] = (0, None, None)

    def __call__(self, progress: Progress) -> None:
        """Takes in where the run is."""
        if progress.loss is not None:
            self._logged = (progress.step, progress.loss, progress.tokens_per_second)
        now = time.monotonic()
        if now - self._told < _EVERY and progress.phase == self._phase:
            return
        self._told, self._phase = now, progress.phase
        partial = self._path.with_suffix(".partial")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps({**asdict(progress), "logged": self._logged}))
            partial.replace(self._path)


@contextlib.contextmanager
def relaying(folder: Path, tell: Tell) -> Iterator[None]:
    """Tells, in a thread, what a FileTell writes while the block runs; an older file is removed."""
    if tell is untold:
        yield
        return
    ended = threading.Event()
    (folder / _NAME).unlink(missing_ok=True)
    thread = threading.Thread(target=_relay, args=(folder / _NAME, tell, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        (folder / _NAME).unlink(missing_ok=True)


def _relay(path: Path, tell: Tell, ended: threading.Event) -> None:
    seen, line = "", -1
    while not ended.wait(_EVERY):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text()
            if text == seen:
                continue
            seen, found = text, json.loads(text)
            step, loss, rate = found.pop("logged")
            # Each log line is told once, at the update where it is seen.
            is_new, line = step != line, step
            best = found["best"]
            found |= {
                "best": Best(**best) if best else None,
                "loss": loss if is_new else None,
                "tokens_per_second": rate if is_new else None,
            }
            tell(Progress(**found))
