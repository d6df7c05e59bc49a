"""Shards: a task's corpus, cleaned, tokenised and written once under the digest of its inputs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vinedresser.config.task import Task
from vinedresser.data.corpora.corpus import Corpus, open_corpus
from vinedresser.data.prepare.build import How, build, build_again
from vinedresser.data.prepare.execute import Connect, Executor
from vinedresser.data.tokenizers.tokenizer import (
    SourceEncoder,
    TextTokenizer,
    load_source,
    load_tokenizer,
)
from vinedresser.errors import DamagedError, DataError
from vinedresser.workspace.commit import (
    commit,
    differing,
    digest_of,
    quarantine,
    read_manifest,
    repair,
    staging,
    verify,
)

# Raised whenever the same task and files would give other shards.
SCHEMA = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class ShardSet:
    """A complete, verified folder of shards.

    Attributes:
        folder: where it is.
        digest: SHA-256 in hex of what it was made from; the same digest, the same content.
        task: what it was prepared for.
        counts: split -> rows.
        source_size: ids of the source vocabulary, specials included; 0 for frames.
        target_size: ids of the target vocabulary; equal to `source_size` when joint.
        is_joint: whether both sides share one vocabulary.
        meta: the manifest's account: drops, lengths, padding, sources, overlap, notes.
        features: numbers of a source frame; 0 where the source is ids.
    """

    folder: Path
    digest: str
    task: Task
    counts: Mapping[str, int]
    source_size: int
    target_size: int
    is_joint: bool
    meta: Mapping[str, Any]
    features: int = 0

    def reference_digest(self, split: str) -> str:
        """SHA-256 of a dev or test split's references: equal for models scored on one set."""
        return str(self.meta["reference_digests"][split])


def prepare(
    task: Task,
    root: Path,
    *,
    executor: Executor = "auto",
    connect: Connect | None = None,
    say: Say = lambda _: None,
) -> ShardSet:
    """Writes a task's shards under `root`, or recognises them there.

    A set whose shards were damaged since is repaired: those shards alone are written anew.

    Args:
        task: corpus, tokenizers, limits and cleaning.
        root: folder of shard sets; with Ray it must be one that every node sees, as must the
            corpus.
        executor: `auto` is Ray where the corpus is large enough to pay for it, and this process
            is connected or may connect. Both write the same bytes, with any number of workers.
        connect: a context in which this process is connected to Ray, as `cluster.connect`.
        say: takes one line of progress or warning.

    Raises:
        DataError: the corpus is not what it should be, nothing of it is left, or too much lost.
        ConfigError: a package that the corpus lives in is not installed.
        MachineError: disk full, no permission, no object storage, or Ray failed.
    """
    corpus = open_corpus(task)
    digest = _address(task, corpus)
    folder = root / f"{task.name}-{digest[:12]}"
    if (found := _recognised(folder, task, corpus, say)) is not None:
        say(f"prepare: {folder.name} unchanged")
        return found
    with commit(folder) as staging:
        build(task, corpus, staging, How(executor, connect), say)
        staging.meta |= {"digest": digest, "schema": SCHEMA, "task": task.to_json()}
    shards = open_shards(folder)
    _tell(shards, corpus, say)
    return shards


def _address(task: Task, corpus: Corpus) -> str:
    """SHA-256 of everything that decides the shards: paths count by content, names not at all."""
    plain = task.to_json()
    del plain["name"]
    plain["corpus"] = corpus.content()
    import sentencepiece

    return digest_of({"schema": SCHEMA, "task": plain, "pieces": sentencepiece.__version__})


def _recognised(folder: Path, task: Task, corpus: Corpus, say: Say) -> ShardSet | None:
    if not folder.exists():
        return None
    try:
        return open_shards(folder)
    except DamagedError as error:
        if repaired := _repaired(folder, task, corpus):
            say(f"prepare: {folder.name}: damaged {', '.join(repaired)} written anew")
            return open_shards(folder)
        aside = quarantine(folder)
        say(f"prepare: {error.args[0]}; moved to {aside.name}, building again")
        return None


def _repaired(folder: Path, task: Task, corpus: Corpus) -> list[str]:
    """Writes damaged and missing shards anew, if all else is whole and they come out the same."""
    try:
        manifest = read_manifest(folder)
        damaged, extra = differing(folder, manifest)
        shards = {name for names in manifest.meta["shards"].values() for name in names}
    except (DataError, KeyError, TypeError, AttributeError):
        return []
    if extra or not set(damaged) <= shards:
        return []
    with staging(folder) as out:
        written = build_again(task, corpus, folder, out, damaged)
        if any(written.get(name) != manifest.files[name][1] for name in damaged):
            return []
        repair(folder, damaged, out)
    return damaged


def _tell(shards: ShardSet, corpus: Corpus, say: Say) -> None:
    rows = ", ".join(f"{count:,} {split}" for split, count in shards.counts.items())
    sizes = f"{shards.source_size:,}" + ("" if shards.is_joint else f" and {shards.target_size:,}")
    if shards.features:
        sizes = f"{shards.target_size:,}, frames of {shards.features} bands"
    say(f"prepare: {shards.folder.name}: {rows} pairs; vocabulary {sizes}")
    for split, account in shards.meta["account"].items():
        if dropped := account["dropped"]:
            first = {
                why: ", ".join(corpus.place(split, n) for n in account["first_lines"][why][:3])
                for why in dropped
            }
            reasons = "; ".join(
                f"{n:,} {why} (lines {first[why]} ...)" for why, n in dropped.items()
            )
            say(f"prepare: {split}: of {account['rows_in']:,} rows dropped {reasons}")
    if repeats := shards.meta["overlap"].get("train_repeats", 0):
        say(f"prepare: train: {repeats:,} rows repeat an earlier pair")


def open_shards(folder: Path, *, task: Task | None = None) -> ShardSet:
    """Verifies every byte of a shard set and reads its account.

    Args:
        folder: of `prepare`.
        task: if given, its tokenizers must be the ones that the shards were made with.

    Raises:
        DamagedError: incomplete, or a file differs from the manifest.
        DataError: written by another version, or tokenised in another way.
    """
    meta = verify(folder).meta
    if meta.get("schema") != SCHEMA:
        raise DataError(f"{folder}: not a shard set of version {SCHEMA}; re-run `prepare`")
    stored = Task.from_json(meta["task"], where=str(folder))
    if task is not None and _tokenizers_of(task) != _tokenizers_of(stored):
        raise DataError(
            f"{folder} was tokenised with {_tokenizers_of(stored)}, the run wants "
            f"{_tokenizers_of(task)}; re-run `prepare`"
        )
    accounts = meta["account"]
    counts = {s: accounts[s]["rows_out"] for s in ("train", "dev", "test") if s in accounts}
    sides = meta["tokenizers"]
    return ShardSet(
        folder=folder,
        digest=meta["digest"],
        task=stored,
        counts=counts,
        source_size=sides["source"]["size"],
        target_size=sides["target"]["size"],
        is_joint=stored.has_joint_vocabulary,
        meta=meta,
        features=sides["source"]["features"],
    )


def _tokenizers_of(task: Task) -> str:
    plain = task.to_json()
    names = ("tokenizer", "source_tokenizer", "target_tokenizer")
    return json.dumps({name: plain[name] for name in names if plain[name]}, sort_keys=True)


def tokenizers(shards: ShardSet) -> tuple[SourceEncoder, TextTokenizer]:
    """The (source, target) tokenizers of a shard set; one and the same object when joint."""
    names = [shards.meta["tokenizers"][side]["name"] for side in ("source", "target")]
    target = load_tokenizer(shards.folder, names[1])
    return target if names[0] == names[1] else load_source(shards.folder, names[0]), target
