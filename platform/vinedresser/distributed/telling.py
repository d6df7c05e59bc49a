"""What a group's workers do and say, for the process that waits for them, by files in the folder.

Ray forwards what workers print or report, but late or not at all, and keeps what they log in files
of its own session, which are gone with it; the run's folder is there anyway.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from vinedresser.training.progress import Best, Progress, Tell

_log = logging.getLogger("vinedresser")

# Where rank 0 stands, written anew each time; what any rank logs, added line by line and kept.
_PROGRESS, _WORDS = ".progress.json", "workers.log"
# Seconds between two looks, and between two writings at least: 20 microseconds each on a disk.
_EVERY = 0.5


class FileTell:
    """Writes where the run stands twice a second; a full disk does not end a run for that."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _PROGRESS
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
    handler = logging.FileHandler(folder / _WORDS)
    handler.setFormatter(_Line(rank))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)


@contextlib.contextmanager
def relaying(folder: Path, tell: Tell) -> Iterator[None]:
    """Tells and logs, while the block runs, what a FileTell and `write_words` write meanwhile."""
    relay, ended = _Relay(folder, tell), threading.Event()

    def look() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(_EVERY)
            relay.tell()
            relay.log()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        relay.progress.unlink(missing_ok=True)


class _Relay:
    """What has been told of both files; an older progress is removed, older words are skipped."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self.progress, self._words, self._tell = folder / _PROGRESS, folder / _WORDS, tell
        self.progress.unlink(missing_ok=True)
        self._seen, self._line = "", -1
        self._at = self._words.stat().st_size if self._words.exists() else 0

    def tell(self) -> None:
        """Tells where rank 0 stands, if that is new."""
        with contextlib.suppress(OSError, ValueError):
            text = self.progress.read_text()
            if text == self._seen:
                return
            self._seen, found = text, json.loads(text)
            step, loss, rate = found.pop("logged")
            # Each log line is told once, at the update where it is seen.
            is_new, self._line = step != self._line, step
            best = found["best"]
            found |= {
                "best": Best(**best) if best else None,
                "loss": loss if is_new else None,
                "tokens_per_second": rate if is_new else None,
            }
            self._tell(Progress(**found))

    def log(self) -> None:
        """Logs the lines that were added."""
        with contextlib.suppress(OSError), self._words.open("rb") as stream:
            stream.seek(self._at)
            # A line that is still being written is left for the next look.
            whole = stream.read().rpartition(b"\n")[0]
            self._at += len(whole) + 1 if whole else 0
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    said = json.loads(line)
                    _log.log(said["level"], "rank %d: %s", said["rank"], said["text"])
