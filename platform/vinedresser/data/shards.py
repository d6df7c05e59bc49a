"""Shards: a task's corpus, cleaned, tokenized and written once under the digest of its inputs."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vinedresser.config.task import Task
from vinedresser.data.corpora.corpus import Corpus, open_corpus
from vinedresser.data.prepare.build import build_shards, rebuild_shards
from vinedresser.data.prepare.execute import Connect, Executor
from vinedresser.data.tokenizers.tokenizer import (
    SourceEncoder,
    TextTokenizer,
    load_source,
    load_tokenizer,
)
from vinedresser.errors import DamagedError, DataError
from vinedresser.workspace.commit import (
    Manifest,
    commit,
    differing,
    digest_of,
    quarantine,
    read_manifest,
    repair,
    staging,
    verify,
)
from vinedresser.workspace.holds import hold
from vinedresser.workspace.layout import content_folder
from vinedresser.workspace.storage import POSIX, make_folder, node_cache

_log = logging.getLogger(__name__)

# Raised when the same task and files would give other shards.
SCHEMA = 2


@dataclass(frozen=True)
class ShardSet:
    """A complete, verified folder of shards: a plain value that a command opens once and passes on.

    Attributes:
        folder: path of the set.
        digest: SHA-256 in hex of its inputs; the same digest, the same content.
        task: the task that it was prepared for.
        counts: split -> rows.
        source_size: ids of the source vocabulary, specials included; 0 for frames.
        target_size: ids of the target vocabulary; equal to `source_size` when joint.
        is_joint: True where both sides share one vocabulary.
        meta: the manifest's report: drops, lengths, padding, sources, overlap, notes.
        features: numbers per source frame; 0 where the source is ids.
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
        """Return the SHA-256 of a dev or test split's references, to compare scores by."""
        return str(self.meta["reference_digests"][split])


@dataclass(frozen=True)
class Located:
    """Inspected corpus of a task, and the shard set that belongs to both.

    Attributes:
        corpus: inspected.
        digest: of everything that decides the shards.
        folder: of the set, complete or absent.
    """

    corpus: Corpus
    digest: str
    folder: Path


def locate(task: Task, root: Path) -> Located:
    """Inspect the corpus of a task, and return the folder of its shard set under `root`.

    Raises:
        DataError: the corpus is not as expected.
        ConfigError: a package that the corpus lives in is not installed.
    """
    corpus = open_corpus(task)
    # Everything that decides the shards: paths count by content, names not at all.
    plain = task.to_json()
    del plain["name"]
    plain["corpus"] = corpus.content()
    if task.tokenizers_of is None:
        del plain["tokenizers_of"]
    else:
        folder = Path(task.tokenizers_of)
        sides = [load_source(folder, side).digest for side in ("source", "target")]
        plain["tokenizers_of"] = sides
    import sentencepiece

    digest = digest_of({"schema": SCHEMA, "task": plain, "pieces": sentencepiece.__version__})
    return Located(corpus, digest, content_folder(root, task.name, digest))


def prepare(
    task: Task, root: Path, *, executor: Executor = "auto", connect: Connect | None = None
) -> ShardSet:
    """Write a task's shards under `root`, or verify them where they exist.

    Every file of the set is hashed once, and every row read and cleaned once. A set whose shards
    were damaged since is repaired: those shards alone are written anew.

    Args:
        task: corpus, tokenizers, limits and cleaning.
        root: folder of shard sets; with Ray every node must see it, and the corpus.
        executor: `auto` is Ray where the corpus is large enough to pay for it, and this process
            is connected or may connect. Both write the same bytes, with any number of workers.
        connect: a context in which this process is connected to Ray, as `cluster.connect`.

    Raises:
        DataError: the corpus is not as expected, nothing of it is left, or too much lost.
        ConfigError: a package that the corpus lives in is not installed.
        MachineError: disk full, no permission, no object storage, or Ray failed.
    """
    located = locate(task, root)
    corpus, folder = located.corpus, located.folder
    if folder.exists() and (shards := _reuse(folder, task, corpus)) is not None:
        return shards
    with commit(folder) as stage:
        build_shards(task, corpus, stage, executor, connect)
        stage.meta |= {
            "digest": located.digest,
            "schema": SCHEMA,
            "task": task.to_json(),
            "corpus": digest_of(corpus.content()),
        }
    hold(folder)
    shards = _shard_set(folder, read_manifest(folder))
    _log_report(shards, corpus)
    return shards


def _reuse(folder: Path, task: Task, corpus: Corpus) -> ShardSet | None:
    """Verify a set, and repair its shards; None where it must be built again."""
    try:
        shards = _shard_set(folder, _verified(folder))
    except DamagedError as error:
        problem = error.args[0]
    else:
        _log.info("prepare: %s unchanged", folder.name)
        return shards
    try:
        manifest = read_manifest(folder)
        damaged, extra = differing(folder, manifest)
        names = {name for names in manifest.meta["shards"].values() for name in names}
        if not extra and set(damaged) <= names:
            with staging(folder) as out:
                written = rebuild_shards(task, corpus, folder, out, damaged)
                if all(written.get(name) == manifest.files[name][1] for name in damaged):
                    repair(folder, damaged, out)
                    _log.warning(
                        "prepare: %s: damaged %s written anew", folder.name, ", ".join(damaged)
                    )
                    return _shard_set(folder, manifest)
    except (DataError, KeyError, TypeError, AttributeError):
        pass  # a manifest of unknown form, or tokenizers that cannot be read
    aside = quarantine(folder)
    _log.warning("prepare: %s; moved to %s, building again", problem, aside.name)
    return None


def _log_report(shards: ShardSet, corpus: Corpus) -> None:
    for note in shards.meta["notes"]:
        _log.info("prepare: %s", note)
    rows = ", ".join(f"{count:,} {split}" for split, count in shards.counts.items())
    sizes = f"{shards.source_size:,}" + ("" if shards.is_joint else f" and {shards.target_size:,}")
    if shards.features:
        sizes = f"{shards.target_size:,}, frames of {shards.features} bands"
    _log.info("prepare: %s: %s pairs; vocabulary %s", shards.folder.name, rows, sizes)
    for split, counts in shards.meta["account"].items():
        reasons = []
        for reason, number in counts["dropped"].items():
            lines = ", ".join(corpus.place(split, n) for n in counts["first_lines"][reason][:3])
            reasons.append(f"{number:,} {reason} (lines {lines} ...)")
        if reasons:
            _log.info(
                "prepare: %s: of %s rows dropped %s",
                split,
                f"{counts['rows_in']:,}",
                "; ".join(reasons),
            )
    if repeats := shards.meta["overlap"].get("train_repeats", 0):
        _log.info("prepare: train: %s rows repeat an earlier pair", f"{repeats:,}")


def open_shards(folder: Path, *, task: Task | None = None, digest: str = "") -> ShardSet:
    """Read the report of a shard set and verify its files; hold it until this process ends.

    A command calls this once, or `prepare`, and passes the value on. With a digest, as a worker
    process passes it, the files are hashed once per node, by one process while the others wait;
    later calls only compare sizes and times of the files with those of the verification. A worker
    reads from the node's copy where VINEDRESSER_CACHE names a folder on a local disk.

    Args:
        folder: of `prepare`.
        task: if given, its tokenizers must be the ones that the shards were made with.
        digest: `ShardSet.digest` of the set that a command has opened; "" always hashes.

    Raises:
        DamagedError: incomplete, or a file differs from the manifest.
        DataError: written by another version, tokenized in another way, or of another digest.
    """
    hold(folder)
    if digest and (cache := node_cache()) is not None:
        folder = _copy_on_node(folder, cache.shards)
    hold(folder)
    shards = _shard_set(folder, _verified(folder) if digest else verify(folder))
    if digest and shards.digest != digest:
        raise DataError(
            f"{folder}: holds shards of digest {shards.digest[:12]}, expected {digest[:12]}; "
            "run the command again"
        )
    if task is not None and _tokenizers_of(task) != _tokenizers_of(shards.task):
        raise DataError(
            f"{folder}: tokenized with {_tokenizers_of(shards.task)}, expected "
            f"{_tokenizers_of(task)}; re-run `prepare`"
        )
    return shards


def _copy_on_node(folder: Path, cache: Path) -> Path:
    """Return a copy of a shard set on this node's disk, made by the first process that asks.

    A copy that was damaged since is made again.
    """
    target = cache / folder.name
    make_folder(cache)
    with FileLock(cache / f".{folder.name}.guard"):
        try:
            _verified(target)
        except DamagedError:
            shutil.rmtree(target, ignore_errors=True)
            with staging(target) as path:
                shutil.copytree(folder, path, dirs_exist_ok=True)
                POSIX.publish(path, target)
    return target


def _verified(folder: Path) -> Manifest:
    """Return the manifest of a set whose files were hashed once on this node since they changed.

    Raises:
        DamagedError: incomplete, or a file differs from the manifest.
    """
    manifest = read_manifest(folder)
    marker = _marker(folder, manifest)
    try:
        marker.parent.mkdir(mode=0o700, exist_ok=True)
        is_own = marker.parent.stat().st_uid == os.getuid()
        if is_own and marker.exists():
            return manifest
        with FileLock(marker.parent / ".guard") if is_own else contextlib.nullcontext():
            if not (is_own and marker.exists()):
                manifest = verify(folder)
                if is_own:
                    marker.touch()
    except OSError:  # no place for the mark: each process verifies
        return verify(folder)
    return manifest


def _marker(folder: Path, manifest: Manifest) -> Path:
    """Return the path of the mark of this node that these files were verified: an empty file."""
    files = []
    for path in sorted(folder.rglob("*")):
        found = path.stat()
        files.append([str(path), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns])
    key = digest_of([str(folder.resolve()), manifest.digest, files])
    return Path(tempfile.gettempdir()) / f"vinedresser-verified-{os.getuid()}" / key


def _shard_set(folder: Path, manifest: Manifest) -> ShardSet:
    meta = manifest.meta
    if meta.get("schema") != SCHEMA:
        raise DataError(f"{folder}: not a shard set of version {SCHEMA}; re-run `prepare`")
    task = Task.from_json(meta["task"], where=str(folder))
    sides, counts = meta["tokenizers"], meta["account"]
    return ShardSet(
        folder=folder,
        digest=meta["digest"],
        task=task,
        counts={s: counts[s]["rows_out"] for s in ("train", "dev", "test") if s in counts},
        source_size=sides["source"]["size"],
        target_size=sides["target"]["size"],
        is_joint=task.has_joint_vocabulary,
        meta=meta,
        features=sides["source"]["features"],
    )


def _tokenizers_of(task: Task) -> str:
    plain = task.to_json()
    names = ("tokenizer", "source_tokenizer", "target_tokenizer")
    return json.dumps({name: plain[name] for name in names if plain[name]}, sort_keys=True)


def tokenizers(shards: ShardSet) -> tuple[SourceEncoder, TextTokenizer]:
    """Return the (source, target) tokenizers of a shard set; one object when joint."""
    names = [shards.meta["tokenizers"][side]["name"] for side in ("source", "target")]
    target = load_tokenizer(shards.folder, names[1])
    return target if names[0] == names[1] else load_source(shards.folder, names[0]), target
