"""Recordings with transcripts: one manifest per split."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vinedresser.config.corpus import CorpusConfig
from vinedresser.config.task import Frames, Task
from vinedresser.data.corpora.recordings import DiskPath, Recordings, parts
from vinedresser.data.corpora.row import Block, Row, RowCounts
from vinedresser.data.corpora.textfile import inspect_all, refuse_changed
from vinedresser.data.corpora.utterances import Utterance, read_manifest
from vinedresser.errors import DataError
from vinedresser.workspace.commit import digest_of

Key = Annotated[str, Field(min_length=1)]


class SpeechCorpus(CorpusConfig):
    """Recordings (WAV, FLAC) with transcripts: one manifest a split, `.jsonl` or `.tsv`.

    A TSV has a header line. Audio paths are meant from the manifest's folder; a JSON list of them
    is one utterance, its recordings one after the other.
    """

    has_recordings: ClassVar[bool] = True
    kind: Literal["speech"]
    train: DiskPath
    dev: DiskPath
    test: DiskPath | None = None
    # Names of the columns (keys) that hold audio paths and transcripts.
    audio: Key = "audio"
    transcript: Key = "text"

    def open(self, task: Task) -> "Speech":
        """See `CorpusConfig.open`."""
        return Speech(self, task)


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
        """Yield its utterances, the recordings of each as absolute paths."""
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

    def __init__(self, corpus: SpeechCorpus, task: Task) -> None:
        frames = task.source_tokenizer
        assert isinstance(frames, Frames)
        named = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
        self._manifests = {split: path for split, path in named.items() if path is not None}
        self._corpus, self._keys = corpus, (corpus.audio, corpus.transcript)
        self._facts = inspect_all(list(self._manifests.values()))
        self.notes = [note for facts in self._facts.values() for note in facts.notes]
        self.splits = tuple(self._manifests)
        self._recordings = Recordings(frames)
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
        """Return train lines to drop: those with a recording that dev or test holds too."""
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
        """Return names of the columns, and the digests of manifests and recordings."""
        keys = {"audio": self._corpus.audio, "transcript": self._corpus.transcript}
        digests = {
            split: [self.digests[path], self.digests[f"{path}: recordings"]]
            for split, path in self._manifests.items()
        }
        return {"kind": "speech", **keys, **digests}

    def blocks(self, split: str) -> Iterator[UtteranceBlock]:
        """Yield the manifest's rows in their order."""
        path, utterances = self._manifests[split], self._utterances(split)
        digest = self._facts[path].digest
        path = str(Path(path).absolute())  # a worker stands in another folder
        for number, first, count in parts(len(utterances)):
            lines = {u.line for u in utterances[first : first + count]} if split == "train" else ()
            leaked = self._leaked.intersection(lines)
            yield UtteranceBlock(split, number, count, first, path, self._keys, digest, leaked)

    def unpack(self, folder: Path) -> None:
        """Do nothing: recordings are read whole."""

    def refuse_changed(self) -> None:
        """Refuse files that were touched since they were inspected."""
        refuse_changed(self._facts.values())
        self._recordings.refuse_changed()

    def place(self, split: str, line: int) -> str:
        """Return the manifest's line."""
        return f"{self._manifests[split]}:{line}"
