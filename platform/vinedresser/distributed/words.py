"""What workers of a group log, for the process that waits for the group, by a file in the folder.

Ray keeps what workers log in files of its own session, which are gone with it.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger("vinedresser")
_NAME = "workers.log"
# Seconds between two looks.
_EVERY = 0.5


class _Line(logging.Formatter):
    """A line of JSON: rank, level, text."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        said = {"rank": self._rank, "level": record.levelno, "text": record.getMessage()}
        return json.dumps(said, ensure_ascii=False)


def write_words(folder: Path, rank: int) -> None:
    """Adds what this worker logs to the run's `workers.log`; for the life of the process."""
    handler = logging.FileHandler(folder / _NAME)
    handler.setFormatter(_Line(rank))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)


@contextlib.contextmanager
def hearing(folder: Path) -> Iterator[None]:
    """Logs here, while the block runs, what workers add to the run's `workers.log`."""
    path, ended = folder / _NAME, threading.Event()
    at = path.stat().st_size if path.exists() else 0
    thread = threading.Thread(target=_hear, args=(path, at, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _hear(path: Path, at: int, ended: threading.Event) -> None:
    is_last = False
    while not is_last:
        is_last = ended.wait(_EVERY)
        with contextlib.suppress(OSError), path.open("rb") as stream:
            stream.seek(at)
            # A line that is still being written is left for the next look.
            whole = stream.read().rpartition(b"\n")[0]
            at += len(whole) + 1 if whole else 0
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    said = json.loads(line)
                    _log.log(said["level"], "rank %d: %s", said["rank"], said["text"])
