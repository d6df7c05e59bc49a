"""Spool: what a run has to deliver to its tracking store, in files of the run's folder.

Each start of a run appends to a file of its own, one JSON object per line, in the order of events:
the opening of the run, metrics, tags, artifacts, the end. Whatever the store, the network or the
process do, an event is in the file once; `delivery` sends it and deletes the file after its end.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vinedresser.workspace.layout import SpoolFolder
from vinedresser.workspace.storage import POSIX, disk_errors, make_folder, parsed_object

_log = logging.getLogger(__name__)


def starts_of(folder: SpoolFolder) -> list[Path]:
    """Return the files of a spool that are not delivered to their end, in the order of starts."""
    return sorted(folder.path.glob("*.jsonl"))


def now_ms() -> int:
    """Return the time as MLflow counts it, in milliseconds."""
    return time.time_ns() // 1_000_000


class Spool:
    """The file of one start, open for appending; entries are safe from the process's death.

    Attributes:
        folder: of the run.
        path: the file.
        lost: entries that the disk did not take.
    """

    def __init__(self, folder: SpoolFolder, opening: Mapping[str, Any]) -> None:
        """Write the first entry.

        Args:
            folder: of the run.
            opening: what the run is opened or created with, as plain JSON.

        Raises:
            MachineError: the disk refuses.
        """
        make_folder(folder.path)
        self.folder, self.lost = folder, 0
        self.path = folder.path / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"
        with disk_errors(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._is_torn = False
            os.write(self._file, _line({"open": dict(opening), "time": now_ms()}))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; one that the disk does not take is counted, with one warning."""
        try:
            line = _line({**entry, "time": now_ms()})
            # After a partial write the next entry begins a new line.
            self._is_torn = os.write(self._file, b"\n" * self._is_torn + line) < len(line)
        except OSError as error:
            self._is_torn = True
            self.lost += 1
            if self.lost == 1:
                _log.warning("%s: %s; metrics are lost until it can be written", self.path, error)

    def add_file(self, name: str, content: bytes) -> None:
        """Append an artifact; its content goes into a file of its own."""
        stored = SpoolFolder.artifacts(self.path) / f"{time.time_ns():020d}"
        try:
            stored.parent.mkdir(exist_ok=True)
            stored.write_bytes(content)
        except OSError as error:
            self.lost += 1
            _log.warning("%s: %s; the artifact %s is lost", stored, error, name)
            return
        self.add({"file": name, "content": stored.name})


def entries_of(start: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the complete entries of a file from an offset on, each with the offset of its end.

    A line that is no JSON object, of a write that the disk refused in its middle, is empty.
    """
    with start.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield parsed_object(line), offset


def opening_of(start: Path) -> dict[str, Any]:
    """Return what a start opens its run with; empty where the first line is damaged."""
    first = (POSIX.read(start) or b"").partition(b"\n")[0]
    found = parsed_object(first).get("open")
    return found if isinstance(found, dict) else {}


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, default=str, ensure_ascii=False) + "\n").encode()
