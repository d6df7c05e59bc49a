"""Recordings -> frames: log-mel filterbanks, a pure function of the recordings and the settings.

Needs the extra `speech`: soundfile reads WAV and FLAC, kaldi-native-fbank computes.
"""

import hashlib
import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sound:
    """What a recording's header says.

    Attributes:
        samples: a channel's.
        rate: in Hz.
        channels: how many.
    """

    samples: int
    rate: int
    channels: int


class Filterbank:
    """The source side of a speech task, in the place that a tokenizer has in a text task.

    Attributes:
        config: the settings.
    """

    def __init__(self, config: Frames) -> None:
        self.config = config

    @property
    def size(self) -> int:
        """0: frames have no ids."""
        return 0

    @property
    def features(self) -> int:
        """Numbers of a frame."""
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

        Every value is one that float16 can hold: that is what shards store, so that a finished
        model sees what it was trained on.

        Raises:
            DataError: a recording is absent, unreadable, empty or of another form than the
                settings say, or all of them are shorter than one window; names it.
            ConfigError: the extra `speech` is not installed, or some bands are empty.
        """
        samples = np.concatenate([self._samples(Path(path)) for path in paths])
        frames = self._frames(samples)
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

    def look(self, path: Path) -> Sound:
        """Read a header and refuse what `encode` would refuse because of it.

        Raises:
            DataError: see `encode`.
        """
        soundfile, _ = _libraries()
        _refuse_absent(path)
        try:
            info = soundfile.info(str(path))
        except soundfile.LibsndfileError as error:
            raise DataError(f"{path}: not a recording ({_reason(error)}); {_WANTED}") from None
        found = Sound(int(info.frames), int(info.samplerate), int(info.channels))
        self._refuse(path, found)
        return found

    def _refuse(self, path: Path, found: Sound) -> None:
        wanted = self.config.sample_rate
        if found.channels != 1:
            raise DataError(
                f"{path}: {found.channels} channels; expected one. Fix: mix them, as with "
                f"`sox {path.name} OUT.wav channels 1`"
            )
        if found.rate != wanted:
            raise DataError(
                f"{path}: {found.rate} samples a second; expected {wanted}. Fix: set "
                f"source_tokenizer.sample_rate={found.rate}, or resample it"
            )
        if not found.samples:
            raise DataError(f"{path}: no sample in it; {_WANTED}")
        _refuse_cut(path)

    def _samples(self, path: Path) -> NDArray[np.float32]:
        soundfile, _ = _libraries()
        _refuse_absent(path)
        try:
            with soundfile.SoundFile(str(path)) as file:
                found = Sound(file.frames, file.samplerate, file.channels)
                self._refuse(path, found)
                samples: NDArray[np.float32] = file.read(dtype="float32")
        except soundfile.LibsndfileError as error:
            raise DataError(f"{path}: not a recording ({_reason(error)}); {_WANTED}") from None
        if len(samples) != found.samples:
            raise DataError(
                f"{path}: {len(samples)} of {found.samples} samples; the file is truncated"
            )
        if not np.isfinite(samples).all():
            raise DataError(f"{path}: a sample is not a finite number; {_WANTED}")
        return samples

    def _frames(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        _, fbank = _libraries()
        computer = fbank.OnlineFbank(self._options)
        computer.accept_waveform(self.config.sample_rate, samples * np.float32(_SCALE))
        computer.input_finished()
        shape = (computer.num_frames_ready, self.features)
        frames = np.empty(shape, dtype=np.float32)
        for index in range(shape[0]):
            frames[index] = computer.get_frame(index)
        return frames

    @cached_property
    def _options(self) -> Any:
        _, fbank = _libraries()
        options = fbank.FbankOptions()
        options.frame_opts.samp_freq = self.config.sample_rate
        options.frame_opts.frame_length_ms = self.config.window_ms
        options.frame_opts.frame_shift_ms = self.config.shift_ms
        options.frame_opts.dither = 0.0  # else the frames are another's at every call
        options.mel_opts.num_bins = self.config.num_mels
        self._refuse_empty_bands(fbank, options)
        return options

    def _refuse_empty_bands(self, fbank: ModuleType, options: Any) -> None:
        """Refuse bands without a frequency: a click has every frequency, and must be in each."""
        config = self.config
        click = np.zeros(int(config.sample_rate * config.window_ms / 1000) + 1, dtype=np.float32)
        click[len(click) // 2] = _SCALE
        computer = fbank.OnlineFbank(options)
        computer.accept_waveform(config.sample_rate, click)
        computer.input_finished()
        # log of the smallest float32 step, which is what an empty band holds, is -15.9.
        empty = int((np.asarray(computer.get_frame(0)) < -15).sum())
        if empty:
            raise ConfigError(
                f"num_mels: {empty} of {config.num_mels} mel bands hold no frequency of a "
                f"{config.window_ms:g} ms window at {config.sample_rate} Hz. Fix: fewer bands, or "
                "a longer window_ms"
            )

    # The libraries' objects cannot be pickled; the settings say it all.
    def __reduce__(self) -> tuple[type["Filterbank"], tuple[Frames]]:
        return type(self), (self.config,)


_WANTED = "expected WAV or FLAC with one channel"


def features(paths: Sequence[str | Path], config: Frames) -> NDArray[np.float32]:
    """Return `Filterbank.encode` of one utterance: (frames, num_mels)."""
    return Filterbank(config).encode(paths)


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


def _refuse_absent(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        what = getattr(error, "strerror", None) or "not a file name"
        shown = str(path).replace("\0", "\\0")[:300]
        raise DataError(f"{shown}: {what.lower()}; {_WANTED}") from None
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a plain file"
        raise DataError(f"{path}: {what}; {_WANTED}")


# Sizes that writers into a pipe put for "unknown": sox this one and a bit, ffmpeg all ones.
_UNKNOWN_SIZE = 0x7FFFF000


def _refuse_cut(path: Path) -> None:
    """Refuse a WAV shorter than its header says: libsndfile reads what is left silently."""
    with path.open("rb") as stream:
        head = stream.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return
    wanted, size = int.from_bytes(head[4:8], "little") + 8, path.stat().st_size
    if size < wanted < _UNKNOWN_SIZE:
        raise DataError(f"{path}: {size:,} of {wanted:,} bytes; the file is truncated")


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", error))
    return " ".join(text.split()).rstrip(".")
