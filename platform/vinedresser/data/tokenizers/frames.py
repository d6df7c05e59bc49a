"""Recordings -> frames: log-mel filterbanks, a pure function of the recordings and the settings.

Needs the extra `speech`: soundfile reads WAV and FLAC, kaldi-native-fbank computes.
"""

import contextlib
import hashlib
import json
import stat
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vinedresser.config.task import Frames
from vinedresser.data.tokenizers.flat import Flat
from vinedresser.errors import ConfigError, DataError
from vinedresser.workspace.commit import canonical_json
from vinedresser.workspace.storage import write_file

# Kaldi's scale, that of 16-bit samples: at 1 a quiet band would lie below the logarithm's floor.
_SCALE = 32768.0
# A band that never changes (digital silence) stays at 0 instead of being divided by 0.
_FLOOR = 1e-5
# Raised when the same settings would give other frames.
_VERSION = 1
_EXPECTED = "expected WAV or FLAC with one channel"
# Sizes that writers into a pipe declare for "unknown": sox this one and more, ffmpeg all ones.
_UNKNOWN_SIZE = 0x7FFFF000


class Filterbank:
    """The encoder of the source side of a speech task, as a tokenizer is of a text task."""

    def __init__(self, config: Frames) -> None:
        self.config = config

    @property
    def size(self) -> int:
        """0: frames have no ids."""
        return 0

    @property
    def features(self) -> int:
        """Number of values per frame."""
        return self.config.num_mels

    @property
    def digest(self) -> str:
        """SHA-256 in hex of everything that decides the frames of a recording."""
        return hashlib.sha256(canonical_json(self._content()).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {**self.config.to_json(), "version": _VERSION}

    def save(self, folder: Path, name: str) -> None:
        """Write `name.json`."""
        write_file(folder / f"{name}.json", json.dumps(self._content(), indent=1) + "\n")

    def encode(self, paths: Sequence[str | Path]) -> NDArray[np.float32]:
        """Return (frames, features) of one utterance: its recordings one after the other.

        Values are rounded to float16, the type of the shards, so that a finished model receives
        the frames that it was trained on.

        Raises:
            DataError: a recording is absent, unreadable, empty or of another form than in the
                settings, or all of them are shorter than one window; names it.
            ConfigError: the extra `speech` is not installed, or some bands are empty.
        """
        samples = np.concatenate([self._samples(Path(path)) for path in paths])
        frames = self._frames(samples, self._options)
        if not len(frames):
            raise DataError(
                f"{paths[0]}: {len(samples)} samples, less than one window of "
                f"{self.config.window_ms:g} ms at {self.config.sample_rate} Hz"
            )
        if self.config.normalization != "none":
            frames -= frames.mean(axis=0, dtype=np.float64).astype(np.float32)
        if self.config.normalization == "utterance":
            deviation = frames.std(axis=0, dtype=np.float64).astype(np.float32)
            frames /= np.maximum(deviation, _FLOOR)
        return frames.astype(np.float16).astype(np.float32)

    def flat(self, items: Sequence[Sequence[str | Path]]) -> Flat:
        """Return the frames of some utterances, as float16."""
        frames = [self.encode(paths).astype(np.float16) for paths in items]
        lengths = np.fromiter(map(len, frames), np.int64, len(frames))
        none = np.zeros((0, self.features), np.float16)
        return Flat(np.concatenate([none, *frames]).ravel(), lengths)

    def inspect_recording(self, path: Path) -> int:
        """Return the samples of a recording by its header, and refuse other forms.

        Raises:
            DataError: see `encode`.
        """
        soundfile, _ = _libraries()
        try:
            found = path.stat()
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            what = getattr(error, "strerror", None) or "not a file name"
            shown = str(path).replace("\0", "\\0")[:300]
            raise DataError(f"{shown}: {what.lower()}; {_EXPECTED}") from None
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "not a plain file"
            raise DataError(f"{path}: {what}; {_EXPECTED}")
        with _decoding(path):
            info = soundfile.info(str(path))
        if info.channels != 1:
            raise DataError(
                f"{path}: {info.channels} channels; expected one. Fix: mix them, as with "
                f"`sox {path.name} OUT.wav channels 1`"
            )
        if info.samplerate != self.config.sample_rate:
            raise DataError(
                f"{path}: {info.samplerate} samples per second; expected "
                f"{self.config.sample_rate}. Fix: set "
                f"source_tokenizer.sample_rate={info.samplerate}, or resample it"
            )
        if not info.frames:
            raise DataError(f"{path}: no sample in it; {_EXPECTED}")
        # libsndfile reads a WAV shorter than its header declares without an error.
        with path.open("rb") as stream:
            head = stream.read(12)
        declared, size = int.from_bytes(head[4:8], "little") + 8, found.st_size
        if (head[:4], head[8:]) == (b"RIFF", b"WAVE") and size < declared < _UNKNOWN_SIZE:
            raise DataError(f"{path}: {size:,} of {declared:,} bytes; the file is truncated")
        return int(info.frames)

    def _samples(self, path: Path) -> NDArray[np.float32]:
        expected = self.inspect_recording(path)
        soundfile, _ = _libraries()
        with _decoding(path):
            samples: NDArray[np.float32] = soundfile.read(str(path), dtype="float32")[0]
        if len(samples) != expected:
            raise DataError(f"{path}: {len(samples)} of {expected} samples; the file is truncated")
        if not np.isfinite(samples).all():
            raise DataError(f"{path}: a sample is not a finite number; {_EXPECTED}")
        return samples

    def _frames(self, samples: NDArray[np.float32], options: Any) -> NDArray[np.float32]:
        _, fbank = _libraries()
        computer = fbank.OnlineFbank(options)
        computer.accept_waveform(self.config.sample_rate, samples * np.float32(_SCALE))
        computer.input_finished()
        frames = [computer.get_frame(index) for index in range(computer.num_frames_ready)]
        return np.array(frames, dtype=np.float32).reshape(-1, self.features)

    @cached_property
    def _options(self) -> Any:
        _, fbank = _libraries()
        options = fbank.FbankOptions()
        options.frame_opts.samp_freq = self.config.sample_rate
        options.frame_opts.frame_length_ms = self.config.window_ms
        options.frame_opts.frame_shift_ms = self.config.shift_ms
        options.frame_opts.dither = 0.0  # else each call gives other frames
        options.mel_opts.num_bins = self.config.num_mels
        # A click has every frequency, so that a band without one is empty in its frame.
        config = self.config
        click = np.zeros(int(config.sample_rate * config.window_ms / 1000) + 1, dtype=np.float32)
        click[len(click) // 2] = 1
        # log of the smallest float32 step, the value of an empty band, is -15.9.
        empty = int((self._frames(click, options)[0] < -15).sum())
        if empty:
            raise ConfigError(
                f"num_mels: {empty} of {config.num_mels} mel bands hold no frequency of a "
                f"{config.window_ms:g} ms window at {config.sample_rate} Hz. Fix: fewer bands, or "
                "a longer window_ms"
            )
        return options

    # Objects of the libraries cannot be pickled; the settings are enough to make them again.
    def __reduce__(self) -> tuple[type["Filterbank"], tuple[Frames]]:
        return type(self), (self.config,)


def load_filterbank(content: dict[str, Any]) -> Filterbank:
    """Restore what `Filterbank.save` wrote.

    Raises:
        ValueError: written by another version.
    """
    if content.get("version") != _VERSION:
        raise ValueError(content.get("version"))
    return Filterbank(Frames.model_validate({k: v for k, v in content.items() if k != "version"}))


def _libraries() -> tuple[ModuleType, ModuleType]:
    try:
        import kaldi_native_fbank
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself cannot be loaded
        raise ConfigError(
            f"recordings cannot be read ({_reason(error)}). Fix: pip install 'vinedresser[speech]'"
        ) from None
    return soundfile, kaldi_native_fbank


@contextlib.contextmanager
def _decoding(path: Path) -> Iterator[None]:
    soundfile, _ = _libraries()
    try:
        yield
    except soundfile.LibsndfileError as error:
        raise DataError(f"{path}: not a recording ({_reason(error)}); {_EXPECTED}") from None


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", error))
    return " ".join(text.split()).rstrip(".")
