"""Recordings of a corpus: inspected before any work, then read by any process."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from vinedresser.config.corpus import REMOTE_PREFIX, DataPath
from vinedresser.config.task import Frames
from vinedresser.data.corpora import row
from vinedresser.data.corpora.inputs import Stamp, stamp
from vinedresser.data.corpora.textfile import refuse
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


class Recordings:
    """Recordings that exist and agree with the settings, by path.

    Attributes:
        digests: SHA-256 in hex of the bytes of each.
        stamps: of their files when they were inspected.
    """

    def __init__(self, frames: Frames) -> None:
        self._bank = Filterbank(frames)
        self._window = frames.sample_rate * frames.window_ms / 1000
        self.digests, self.stamps = dict[str, str](), dict[str, Stamp]()
        self._samples: dict[str, int] = {}

    def add(self, utterances: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Read the recordings of some utterances.

        An utterance is (prefix of messages, paths).

        Raises:
            DataError: the first 20 problems, and their number.
        """
        problems = []
        for where, paths in utterances:
            try:
                for path in paths:
                    if path not in self.stamps:
                        self._samples[path] = self._bank.inspect_recording(Path(path))
                        self.digests[path] = file_digest(Path(path))
                        self.stamps[path] = stamp(path)
            except DataError as error:
                problems.append(f"{where}{error.args[0]}")
                continue
            samples = sum(self._samples[path] for path in paths)
            if samples < self._window:
                problems.append(
                    f"{where}{paths[0]}: {samples} samples; expected one window or more, "
                    f"{self._window:g} samples"
                )
        refuse(problems)


def block_size() -> int:
    """Return utterances per block, at most."""
    return min(row.BLOCK_ROWS, BLOCK_UTTERANCES)
