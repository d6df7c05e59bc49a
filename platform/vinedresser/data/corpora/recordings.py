"""Recordings of a corpus: inspected before any work, then read by any process."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from vinedresser.config.corpus import REMOTE_PREFIX, DataPath
from vinedresser.config.task import Frames
from vinedresser.data.corpora import row
from vinedresser.data.corpora.textfile import MAX_PROBLEMS
from vinedresser.data.tokenizers.frames import Filterbank
from vinedresser.errors import DataError
from vinedresser.workspace.commit import file_digest

# Utterances per block: 15 s of 80 mel bands are 240 kB, and a block is in memory twice.
BLOCK_UTTERANCES = 200


def _on_disk(path: str) -> str:
    if path.startswith(REMOTE_PREFIX):
        raise ValueError("recordings are read from disk alone; copy them there")
    return path


DiskPath = Annotated[DataPath, AfterValidator(_on_disk)]


class _Recording(NamedTuple):
    """What inspection found of a recording; differs once the file was touched."""

    digest: str
    size: int
    changed: int
    samples: int


class Recordings:
    """Recordings that exist and are what the settings say, by path."""

    def __init__(self, frames: Frames) -> None:
        self._bank = Filterbank(frames)
        self._window = frames.sample_rate * frames.window_ms / 1000
        self._found: dict[str, _Recording] = {}

    def add(self, utterances: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Read the recordings of some utterances.

        Args:
            utterances: (what a message begins with, paths).

        Raises:
            DataError: the first 20 that are not what they should be, and how many there are.
        """
        problems = []
        for where, paths in utterances:
            try:
                samples = sum(self._look(path).samples for path in paths)
            except DataError as error:
                problems.append(f"{where}{error.args[0]}")
                continue
            if samples < self._window:
                problems.append(
                    f"{where}{paths[0]}: {samples} samples; expected one window or more, "
                    f"{self._window:g} samples"
                )
        refuse(problems)

    def _look(self, path: str) -> _Recording:
        if path not in self._found:
            sound = self._bank.look(Path(path))
            stat = Path(path).stat()
            digest = file_digest(Path(path))
            self._found[path] = _Recording(digest, stat.st_size, stat.st_mtime_ns, sound.samples)
        return self._found[path]

    def digest(self, path: str) -> str:
        """Return the SHA-256 in hex of a recording's bytes."""
        return self._found[path].digest

    def refuse_changed(self) -> None:
        """Refuse recordings that were touched since they were inspected.

        Raises:
            DataError: with the first such file.
        """
        for path, found in self._found.items():
            try:
                stat = Path(path).stat()
            except OSError:
                stat = None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != (found.size, found.changed):
                raise DataError(
                    f"{path}: changed while it was being read; run again when it is complete"
                )


def refuse(problems: Sequence[str]) -> None:
    """Refuse with the first 20 problems, one per line, and their number."""
    more = [f"{len(problems)} such places in all"] * (len(problems) > MAX_PROBLEMS)
    if problems:
        raise DataError("\n".join([*problems[:MAX_PROBLEMS], *more]))


def parts(total: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, first row, rows) of the blocks of a split."""
    size = min(row.BLOCK_ROWS, BLOCK_UTTERANCES)
    for number, first in enumerate(range(0, total, size)):
        yield number, first, min(size, total - first)
