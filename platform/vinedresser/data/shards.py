"""Shards: a task's corpus, cleaned, tokenised and written once under the digest of its inputs."""

import contextlib
import itertools
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from vinedresser.commit import Staging, commit, digest_of, quarantine, verify
from vinedresser.config.corpus import TextCorpus
from vinedresser.config.task import Task
from vinedresser.data.account import Clean, Facts, describe, overlap
from vinedresser.data.corpus import Corpus, open_corpus
from vinedresser.data.encode import (
    BLOCK_ROWS,
    BlockJob,
    block_table,
    encode_block,
    write_lengths,
)
from vinedresser.data.tokenizers import TextTokenizer, load_tokenizer, train_tokenizer
from vinedresser.errors import DamagedError, DataError, MachineError

# Raised whenever the same task and files would give other shards.
SCHEMA = 2
# Rows that SentencePiece learns from, at most: it holds them in memory, about 1 GB a million.
MAX_TRAINING_ROWS = 1_000_000

Executor = Literal["auto", "in_process", "ray"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class ShardSet:
    """A complete, verified folder of shards.

    Attributes:
        folder: where it is.
        digest: SHA-256 in hex of what it was made from; the same digest, the same content.
        task: what it was prepared for.
        counts: split -> rows.
        source_size: ids of the source vocabulary, specials included.
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
    task: Task, root: Path, *, executor: Executor = "auto", say: Say = lambda _: None
) -> ShardSet:
    """Writes a task's shards under `root`, or recognises them there.

    Args:
        task: corpus, tokenizers and limits.
        root: folder of shard sets; with Ray it must be one that every node sees.
        executor: `auto` is Ray where this process is already connected to one. Both write the
            same bytes, with any number of workers.
        say: takes one line of progress or warning.

    Raises:
        DataError: the corpus is not what it should be, or nothing of it is left.
        ConfigError: a package that the corpus lives in is not installed.
        MachineError: disk full, no permission, or Ray failed.
    """
    corpus = open_corpus(task)
    digest = _address(task, corpus)
    folder = root / f"{task.name}-{digest[:12]}"
    if (found := _recognised(folder, say)) is not None:
        say(f"prepare: {folder.name} unchanged")
        return found
    with commit(folder) as staging:
        _build(task, corpus, staging, _executor(executor), say)
        staging.meta |= {"digest": digest, "schema": SCHEMA, "task": task.to_json()}
    shards = open_shards(folder)
    _tell(shards, say)
    return shards


def _address(task: Task, corpus: Corpus) -> str:
    """SHA-256 of everything that decides the shards: paths count by content, names not at all."""
    plain = task.to_json()
    del plain["name"]

    def by_content(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: by_content(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [by_content(inner) for inner in value]
        return corpus.digests.get(value, value) if isinstance(value, str) else value

    plain["corpus"] = by_content(plain["corpus"])
    if not isinstance(task.corpus, TextCorpus):  # an absent list is as good as none
        present = [name for name in task.corpus.exclude if name in corpus.digests]
        plain["corpus"]["exclude"] = [corpus.digests[name] for name in present]
    import sentencepiece

    return digest_of({"schema": SCHEMA, "task": plain, "pieces": sentencepiece.__version__})


def _recognised(folder: Path, say: Say) -> ShardSet | None:
    if not folder.exists():
        return None
    try:
        return open_shards(folder)
    except DamagedError as error:
        aside = quarantine(folder)
        say(f"prepare: {error.args[0]}; moved to {aside.name}, building again")
        return None


def _build(task: Task, corpus: Corpus, staging: Staging, run: "Run", say: Say) -> None:
    job = _train_tokenizers(task, corpus, staging.path)
    clean = Clean(task, corpus)
    tables = (table for split in corpus.splits for table in _blocks(clean, split))
    facts = Facts()
    for result in run(tables, job):
        facts.add(result)
    # A worker that died while writing leaves a part behind; it is no shard.
    for partial in staging.path.glob(".*"):
        partial.unlink()
    facts.refuse_missing(staging.path)
    write_lengths(staging.path, facts.histogram())
    source, target = (load_tokenizer(staging.path, n) for n in (job.source_name, job.target_name))
    staging.meta |= describe(task, corpus, clean, facts)
    staging.meta["overlap"] = overlap(clean, staging.meta["notes"])
    staging.meta["tokenizers"] = {
        side: {"name": name, "digest": tokenizer.digest, "size": tokenizer.size}
        for side, name, tokenizer in (
            ("source", job.source_name, source),
            ("target", job.target_name, target),
        )
    }
    for note in staging.meta["notes"]:
        say(f"prepare: {note}")


def _train_tokenizers(task: Task, corpus: Corpus, folder: Path) -> BlockJob:
    clean = Clean(task, corpus)

    def pairs(kind: str) -> Iterator[tuple[str, str]]:
        rows = clean.rows("train")
        if kind in ("bpe", "unigram"):
            lines = max(facts.lines for facts in corpus.facts())
            rows = itertools.islice(rows, 0, None, -(-lines // MAX_TRAINING_ROWS))
        return ((row.source, row.target) for row in rows)

    clean.refuse_empty("train")
    if task.tokenizer:
        texts = itertools.chain.from_iterable(pairs(task.tokenizer.kind))
        train_tokenizer(task.tokenizer, texts).save(folder, "joint")
        names = ("joint", "joint")
    else:
        assert task.source_tokenizer is not None
        assert task.target_tokenizer is not None
        for side, config in enumerate((task.source_tokenizer, task.target_tokenizer)):
            one = (pair[side] for pair in pairs(config.kind))
            train_tokenizer(config, one).save(folder, ("source", "target")[side])
        names = ("source", "target")
    lengths = (task.max_source_length, task.max_target_length)
    return BlockJob(str(folder), *names, *lengths, task.bucket_width)


def _blocks(clean: Clean, split: str) -> Iterator[pa.Table]:
    rows = clean.rows(split)
    for block in itertools.count():
        if not (part := list(itertools.islice(rows, BLOCK_ROWS))):
            break
        yield block_table(split, block, part)
    clean.refuse_empty(split)


Run = Callable[[Iterator[pa.Table], BlockJob], Iterator[dict[str, Any]]]


def _executor(name: Executor) -> Run:
    if name == "auto":
        ray = sys.modules.get("ray")
        name = "ray" if ray is not None and ray.is_initialized() else "in_process"
    return _with_ray if name == "ray" else _in_process


def _in_process(tables: Iterator[pa.Table], job: BlockJob) -> Iterator[dict[str, Any]]:
    for table in tables:
        yield from encode_block(table, job).to_pylist()


def _with_ray(tables: Iterator[pa.Table], job: BlockJob) -> Iterator[dict[str, Any]]:
    """One task a block. Half a CPU each: tasks that take every CPU starve Ray Data's reads."""
    import ray
    import ray.data
    from ray.exceptions import RayError

    if not ray.is_initialized():  # Ray Data would join whatever cluster it finds on this machine
        raise MachineError(
            f"{job.folder}: this process is not connected to Ray. Fix: connect it first, or "
            'prepare with executor="in_process"'
        )
    encode: Callable[..., Any] = encode_block  # Ray's own types know no keyword arguments
    blocks: list[Any] = [ray.put(table) for table in tables]
    try:
        with _quiet_ray_data():
            encoded = ray.data.from_arrow_refs(blocks).map_batches(
                encode,
                batch_size=None,
                batch_format="pyarrow",
                fn_kwargs={"job": job},
                num_cpus=0.5,
            )
            return iter(list(encoded.iter_rows()))
    except RayError as error:
        raise MachineError(
            f"{job.folder}: Ray could not write the shards: {_reason(error)}. "
            'Fix: see the Ray logs, or prepare with executor="in_process"'
        ) from error


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Datasets made inside keep their order and draw no bars; the caller's context comes back."""
    from ray.data import DataContext

    with warnings.catch_warnings():  # its own defaults set three names that it calls deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_options.preserve_order = True
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # else four lines a dataset: its plan, its log, its time
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """A worker's own error out of the traceback that Ray makes of it: one line."""
    raised = re.search(r"^[\w.]*Error: (?!ray\.)(.+)$", str(error), re.MULTILINE)
    return raised[1] if raised else type(error).__name__


def _tell(shards: ShardSet, say: Say) -> None:
    rows = ", ".join(f"{count:,} {split}" for split, count in shards.counts.items())
    sizes = f"{shards.source_size:,}" + ("" if shards.is_joint else f" and {shards.target_size:,}")
    say(f"prepare: {shards.folder.name}: {rows} pairs; vocabulary {sizes}")
    for split, account in shards.meta["account"].items():
        if dropped := account["dropped"]:
            lines = {why: ", ".join(map(str, account["first_lines"][why][:3])) for why in dropped}
            reasons = "; ".join(
                f"{n:,} {why} (lines {lines[why]} ...)" for why, n in dropped.items()
            )
            say(f"prepare: {split}: of {account['rows_in']:,} rows dropped {reasons}")


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
    )


def _tokenizers_of(task: Task) -> str:
    plain = task.to_json()
    names = ("tokenizer", "source_tokenizer", "target_tokenizer")
    return json.dumps({name: plain[name] for name in names if plain[name]}, sort_keys=True)


def tokenizers(shards: ShardSet) -> tuple[TextTokenizer, TextTokenizer]:
    """The (source, target) tokenizers of a shard set; one and the same object when joint."""
    names = [shards.meta["tokenizers"][side]["name"] for side in ("source", "target")]
    loaded = {name: load_tokenizer(shards.folder, name) for name in dict.fromkeys(names)}
    return loaded[names[0]], loaded[names[1]]
