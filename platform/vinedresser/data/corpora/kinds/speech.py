"""Recordings with transcripts: one manifest per split."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vinedresser.config.corpus import CorpusConfig
from vinedresser.config.task import Frames, Task
from vinedresser.data.corpora.corpus import Corpus
from vinedresser.data.corpora.recordings import DiskPath, Recordings, block_size
from vinedresser.data.corpora.row import EntryBlock, Row
from vinedresser.data.corpora.textfile import inspect_all
from vinedresser.data.corpora.utterances import read_utterances
from vinedresser.errors import DataError
from vinedresser.workspace.commit import digest_of

Key = Annotated[str, Field(min_length=1)]


class SpeechCorpus(CorpusConfig):
    """Recordings (WAV, FLAC) with transcripts: a manifest per split, `.jsonl` or `.tsv`.

    A TSV has a header line. Audio paths are relative to the manifest's folder; a JSON list of
    paths is one utterance, its recordings one after the other.
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


# A worker parses a manifest once, not once per block.
@functools.lru_cache(maxsize=3)
def _parsed(manifest: str, keys: tuple[str, str], digest: str) -> list[Row]:
    assert digest
    return read_utterances(manifest, *keys)


@functools.lru_cache(maxsize=3)
def parse_utterances(
    manifest: str, keys: tuple[str, str], digest: str, leaked: frozenset[int]
) -> list[tuple[Row, str]]:
    """Return the rows of a manifest; those of the lines `leaked` with a reason to drop them."""
    rows = _parsed(manifest, keys, digest)
    return [(row, "leaked" if row.line in leaked else "") for row in rows]


class Speech(Corpus):
    """A `SpeechCorpus` whose recordings exist and have transcripts."""

    def __init__(self, corpus: SpeechCorpus, task: Task) -> None:
        frames = task.source_tokenizer
        assert isinstance(frames, Frames)
        named = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
        self._manifests = {split: path for split, path in named.items() if path is not None}
        self._corpus, self._keys = corpus, (corpus.audio, corpus.transcript)
        super().__init__(inspect_all(list(self._manifests.values())))
        self.splits = tuple(self._manifests)
        recordings = Recordings(frames)
        recordings.add(
            (f"{path}:{utterance.line}: ", utterance.source)
            for split, path in self._manifests.items()
            for utterance in self._utterances(split)
        )
        for split, path in self._manifests.items():
            self.digests[f"{path}: recordings"] = digest_of(
                [recordings.digests[each] for u in self._utterances(split) for each in u.source]
            )
        self._recordings = recordings.stamps
        self._leaked = self._find_leaks(task.cleaning.leakage, recordings.digests)

    def _utterances(self, split: str) -> list[Row]:
        path = self._manifests[split]
        return _parsed(path, self._keys, self.digests[path])

    def _find_leaks(self, leakage: str, digests: Mapping[str, str]) -> frozenset[int]:
        """Return train lines to drop: those with a recording that dev or test also has."""
        train, leaked = self._manifests["train"], set[int]()
        for split in self.splits[1:]:
            held = {
                digests[path]: utterance.line
                for utterance in self._utterances(split)
                for path in utterance.source
            }
            shared = [
                (utterance.line, held[digest])
                for utterance in self._utterances("train")
                for digest in map(digests.__getitem__, utterance.source)
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

    def blocks(self, split: str) -> Iterator[EntryBlock]:
        """Yield the manifest's rows in their order."""
        path, leaked = self._manifests[split], self._leaked if split == "train" else frozenset()
        # Absolute: the working directory of a worker is another one.
        arguments = (str(Path(path).absolute()), self._keys, self.digests[path], leaked)
        return EntryBlock.cut(split, parse_utterances, arguments, block_size())

    def place(self, split: str, line: int) -> str:
        """Return the manifest's line."""
        return f"{self._manifests[split]}:{line}"
