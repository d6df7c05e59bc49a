"""Recordings as a corpus: manifests of transcribed utterances, and strings of spoken digits."""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vinedresser.config.speech import DigitsCorpus, Frames, SpeechCorpus
from vinedresser.config.task import Task
from vinedresser.data.corpora import row
from vinedresser.data.corpora.lexicon import locate
from vinedresser.data.corpora.row import Block, Row, RowCounts
from vinedresser.data.corpora.textfile import MAX_PROBLEMS, inspect_all, lines_of
from vinedresser.data.corpora.textfile import refuse_changed as refuse_changed_text
from vinedresser.data.corpora.utterances import Utterance, read_manifest
from vinedresser.data.tokenizers.frames import Filterbank
from vinedresser.errors import DataError
from vinedresser.workspace.commit import digest_of, file_digest

# Utterances of a block: 15 s of 80 mel bands are 240 kB, and a block is held twice.
BLOCK_UTTERANCES = 200

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_RECORDING = re.compile(r"([0-9])_(.+)_([0-9]+)\.(?:wav|flac)")


class _Recording(NamedTuple):
    """What inspection found of a recording; differs once the file was touched."""

    digest: str
    size: int
    changed: int
    samples: int


class _Recordings:
    """Recordings that exist and are what the settings say, by path."""

    def __init__(self, frames: Frames) -> None:
        self._bank = Filterbank(frames)
        self._window = frames.sample_rate * frames.window_ms / 1000
        self._found: dict[str, _Recording] = {}

    def add(self, utterances: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Reads the recordings of some utterances.

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
        return self._found[path].digest

    def refuse_changed(self) -> None:
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
    """DataError with the first 20 problems, a line each, and how many there are."""
    more = [f"{len(problems)} such places in all"] * (len(problems) > MAX_PROBLEMS)
    if problems:
        raise DataError("\n".join([*problems[:MAX_PROBLEMS], *more]))


def _parts(total: int) -> Iterator[tuple[int, int, int]]:
    """(number, first row, rows) of the blocks of a split."""
    size = min(row.BLOCK_ROWS, BLOCK_UTTERANCES)
    for number, first in enumerate(range(0, total, size)):
        yield number, first, min(size, total - first)


@dataclass(frozen=True)
class UtteranceBlock(Block):
    """Some utterances of a manifest.

    Attributes:
        first: rows of the manifest before it.
        manifest: path of the manifest.
        keys: names of the columns of audio and transcript.
        digest: of the manifest, so that a changed one is parsed anew.
        leaked: its lines that are dropped because a held-out recording is in them.
    """

    first: int
    manifest: str
    keys: tuple[str, str]
    digest: str
    leaked: frozenset[int]

    def rows(self, account: RowCounts) -> Iterator[Row]:
        """Its utterances, the recordings of each as absolute paths."""
        every = _parsed(self.manifest, self.keys, self.digest)
        for utterance in every[self.first : self.first + self.count]:
            account.rows_in += 1
            if utterance.line in self.leaked:
                account.drop("leaked", utterance.line)
            else:
                yield Row(utterance.paths, utterance.text, utterance.line)


# A worker parses a manifest once, not once a block.
@functools.lru_cache(maxsize=3)
def _parsed(manifest: str, keys: tuple[str, str], digest: str) -> list[Utterance]:
    assert digest
    return read_manifest(manifest, *keys)


class Speech:
    """A `SpeechCorpus` whose recordings exist and have transcripts."""

    is_parallel = False

    def __init__(self, task: Task) -> None:
        corpus, frames = task.corpus, task.source_tokenizer
        assert isinstance(corpus, SpeechCorpus)
        assert isinstance(frames, Frames)
        named = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
        self._manifests = {split: path for split, path in named.items() if path is not None}
        self._corpus, self._keys = corpus, (corpus.audio, corpus.transcript)
        self._facts = inspect_all(list(self._manifests.values()))
        self.notes = [note for facts in self._facts.values() for note in facts.notes]
        self.splits = tuple(self._manifests)
        self._recordings = _Recordings(frames)
        self._recordings.add(
            (f"{path}:{utterance.line}: ", utterance.paths)
            for split, path in self._manifests.items()
            for utterance in self._utterances(split)
        )
        self.digests = {}
        for split, path in self._manifests.items():
            self.digests[path] = self._facts[path].digest
            self.digests[f"{path}: recordings"] = digest_of(
                [self._recordings.digest(each) for u in self._utterances(split) for each in u.paths]
            )
        self._leaked = self._look_for_leaks(task.cleaning.leakage)

    def _utterances(self, split: str) -> list[Utterance]:
        path = self._manifests[split]
        return _parsed(path, self._keys, self._facts[path].digest)

    def _look_for_leaks(self, leakage: str) -> frozenset[int]:
        """Train lines to drop: those with a recording, by content, that dev or test holds."""
        train, leaked = self._manifests["train"], set[int]()
        for split in self.splits[1:]:
            held = {
                self._recordings.digest(path): utterance.line
                for utterance in self._utterances(split)
                for path in utterance.paths
            }
            shared = [
                (utterance.line, held[digest])
                for utterance in self._utterances("train")
                for digest in map(self._recordings.digest, utterance.paths)
                if digest in held
            ]
            if not shared:
                continue
            line, other = shared[0]
            text = (
                f"{train}:{line}: a recording that {self._manifests[split]}:{other} holds too; "
                f"train shares {len(shared)} with {split}"
            )
            if split == "test" and leakage == "refuse":
                raise DataError(f"{text}. Fix: remove them, or set cleaning.leakage=drop or allow")
            self.notes.append(f"warning: {text}")
            leaked.update(line for line, _ in shared)
        return frozenset(leaked if leakage == "drop" else ())

    def content(self) -> Any:
        """Names of the columns, and the digests of manifests and recordings."""
        keys = {"audio": self._corpus.audio, "transcript": self._corpus.transcript}
        digests = {
            split: [self.digests[path], self.digests[f"{path}: recordings"]]
            for split, path in self._manifests.items()
        }
        return {"kind": "speech", **keys, **digests}

    def blocks(self, split: str) -> Iterator[UtteranceBlock]:
        """The manifest's rows in their order."""
        path, utterances = self._manifests[split], self._utterances(split)
        digest = self._facts[path].digest
        path = str(Path(path).absolute())  # a worker stands in another folder
        for number, first, count in _parts(len(utterances)):
            lines = {u.line for u in utterances[first : first + count]} if split == "train" else ()
            leaked = self._leaked.intersection(lines)
            yield UtteranceBlock(split, number, count, first, path, self._keys, digest, leaked)

    def unpack(self, folder: Path) -> None:
        """Nothing: recordings are read whole."""

    def refuse_changed(self) -> None:
        """DataError where a manifest or a recording was touched since it was inspected."""
        refuse_changed_text(self._facts.values())
        self._recordings.refuse_changed()

    def place(self, split: str, line: int) -> str:
        """The manifest's line."""
        return f"{self._manifests[split]}:{line}"


@dataclass(frozen=True)
class DigitsBlock(Block):
    """Some strings of digits.

    Attributes:
        first: strings of the split before it.
        corpus: the settings.
        lexicon: path of the dictionary.
        digest: of recordings and dictionary, so that strings are dealt anew when they change.
    """

    first: int
    corpus: DigitsCorpus
    lexicon: str
    digest: str

    def rows(self, account: RowCounts) -> Iterator[Row]:
        """Its strings; `line` counts them from 1."""
        every = _dealt(self.corpus, self.lexicon, self.split, self.digest)
        for string in every[self.first : self.first + self.count]:
            account.rows_in += 1
            yield string


@functools.lru_cache(maxsize=3)
def _dealt(corpus: DigitsCorpus, lexicon: str, split: str, digest: str) -> list[Row]:
    """All strings of a split: a pure function of settings, names of recordings and dictionary."""
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
        rows.append(Row(tuple(str(Path(corpus.path) / name) for name in names), target, line))
    return rows


def _strings(
    corpus: DigitsCorpus, split: str, speaker: str, names: Sequence[str]
) -> Iterator[list[str]]:
    """A speaker's strings, without end: a deck of all recordings is dealt, shuffled, dealt, ..."""

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
    """Split -> speaker -> names of recordings.

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
    """Phones of zero to nine, the first pronunciation of each.

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


class Digits:
    """A `DigitsCorpus` whose recordings and dictionary exist. No recording is in two splits."""

    is_parallel = False

    def __init__(self, task: Task) -> None:
        corpus, frames = task.corpus, task.source_tokenizer
        assert isinstance(corpus, DigitsCorpus)
        assert isinstance(frames, Frames)
        self._corpus = corpus
        self._lexicon = str(locate(corpus.lexicon).absolute())
        self._facts = inspect_all([self._lexicon])
        _phones_of_digits(self._lexicon, keep_stress=corpus.keep_stress)
        self.splits = ("train", "dev", *(["test"] if corpus.test_strings else []))
        by_split = _recordings_of(corpus)
        names = [n for split in self.splits for of in by_split[split].values() for n in of]
        paths = [str(Path(corpus.path) / name) for name in sorted(names)]
        self._recordings = _Recordings(frames)
        self._recordings.add(("", [path]) for path in paths)
        recordings = digest_of([[Path(p).name, self._recordings.digest(p)] for p in paths])
        self.digests = {
            corpus.path: recordings,
            corpus.lexicon: self._facts[self._lexicon].digest,
        }
        self.notes = [note for facts in self._facts.values() for note in facts.notes]

    def content(self) -> Any:
        """The settings, with recordings and dictionary by their digests."""
        named = {key: self.digests[getattr(self._corpus, key)] for key in ("path", "lexicon")}
        return {**self._corpus.to_json(), **named}

    def blocks(self, split: str) -> Iterator[DigitsBlock]:
        """The strings in the order they are dealt."""
        digest = digest_of(self.digests)
        # A worker stands in another folder.
        corpus = self._corpus.override({"path": str(Path(self._corpus.path).absolute())})
        total = len(_dealt(corpus, self._lexicon, split, digest))
        for number, first, count in _parts(total):
            yield DigitsBlock(split, number, count, first, corpus, self._lexicon, digest)

    def unpack(self, folder: Path) -> None:
        """Nothing: recordings are read whole."""

    def refuse_changed(self) -> None:
        """DataError where a recording or the dictionary was touched since it was inspected."""
        refuse_changed_text(self._facts.values())
        self._recordings.refuse_changed()

    def place(self, split: str, line: int) -> str:  # noqa: ARG002 - strings stand in no file
        """The string's number."""
        return f"string {line}"
