"""A shard set's files: vocabularies, then a shard a block, then the account of all of them."""

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vinedresser.config.speech import Frames
from vinedresser.config.task import Task, Tokenizer
from vinedresser.data.corpora.corpus import Corpus
from vinedresser.data.corpora.row import Account, Block, Pairs
from vinedresser.data.prepare.account import Tally, describe, refuse_empty
from vinedresser.data.prepare.clean import HELD, Sieve, clean, hashes_file, held_out, repeats_file
from vinedresser.data.prepare.encode import (
    BlockJob,
    encode_block,
    save_pairs,
    shard_name,
    write_lengths,
)
from vinedresser.data.prepare.execute import Connect, Executor, run_blocks
from vinedresser.data.prepare.hashing import find_repeats, save_lines
from vinedresser.data.tokenizers.tokenizer import load_source, train_source
from vinedresser.workspace.commit import Staging

# Blocks that SentencePiece learns from, at most: a million rows are read to choose from.
TRAINING_BLOCKS = 50
# Inside the staging folder, so that a killed job's is cleared with it; never part of the set.
_SCRATCH = ".scratch"

Say = Callable[[str], None]


@dataclass(frozen=True)
class How:
    """Where blocks are encoded; see `execute.run_blocks`."""

    executor: Executor
    connect: Connect | None


def build(task: Task, corpus: Corpus, staging: Staging, how: How, say: Say) -> None:
    """Fills a staging folder and the account in its `meta`.

    Raises:
        DataError: nothing or too little of a split is left, test rows in train, sides shifted.
        MachineError: disk full, no permission, or Ray failed.
    """
    with _scratch(staging.path) as scratch:
        corpus.unpack(scratch)
        blocks = {split: list(corpus.blocks(split)) for split in corpus.splits}
        job = _job(task, corpus, staging.path, staging.path, scratch)
        _leave_for_workers(job, corpus, blocks["train"])
        _train_tokenizers(job, blocks["train"])
        tally = Tally(corpus.splits)
        every = [*itertools.chain.from_iterable(blocks.values())]
        for encoded in run_blocks(every, job, how.executor, how.connect):
            tally.add(encoded)
        corpus.refuse_changed()
        # A worker that died while writing leaves a part behind; it is no shard.
        for partial in staging.path.glob(".*.parquet.*"):
            partial.unlink()
        tally.refuse_missing(staging.path)
        staging.meta |= describe(task, corpus, tally, scratch)
        staging.meta["reference_digests"] = _references(job, corpus, blocks)
        staging.meta["tokenizers"] = _names_and_digests(job)
        write_lengths(staging.path, tally.lengths())
    for note in staging.meta["notes"]:
        say(f"prepare: {note}")


def build_again(
    task: Task, corpus: Corpus, folder: Path, out: Path, names: Sequence[str]
) -> dict[str, str]:
    """Writes some shards of a complete set anew.

    Args:
        task: of the set.
        corpus: the same files as when it was made.
        folder: the set, whose tokenizers are whole.
        out: where the shards go; emptied of everything else.
        names: which shards.

    Returns:
        Name -> SHA-256 in hex of what was written.
    """
    with _scratch(out) as scratch:
        corpus.unpack(scratch)
        job = _job(task, corpus, folder, out, scratch)
        _leave_for_workers(job, corpus, list(corpus.blocks("train")))
        wanted = (
            block
            for split in corpus.splits
            for block in corpus.blocks(split)
            if shard_name(split, block.number) in names
        )
        done = {encoded.shard: encoded.digest for encoded in (encode_block(b, job) for b in wanted)}
        corpus.refuse_changed()
    return done


class _scratch:  # noqa: N801 - used as a function
    """A folder for what is not part of the set, gone at the end."""

    def __init__(self, parent: Path) -> None:
        self._path = parent / _SCRATCH

    def __enter__(self) -> Path:
        self._path.mkdir()
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def _job(task: Task, corpus: Corpus, folder: Path, out: Path, scratch: Path) -> BlockJob:
    names = ("joint", "joint") if task.has_joint_vocabulary else ("source", "target")
    places = (str(folder), str(out), str(scratch))
    return BlockJob(task, *places, *names, corpus.is_parallel)


def _leave_for_workers(job: BlockJob, corpus: Corpus, train: Sequence[Block]) -> None:
    """What a block must know of other rows: dev and test, and with `dedup` its repeats."""
    if not job.is_parallel:
        return
    scratch = Path(job.scratch)
    held_out(corpus, job.task).save(scratch / HELD)
    if not job.task.cleaning.dedup:
        return
    for block in train:
        save_pairs(block.number, _cleaned(block, job, has_repeats=True), scratch)
    files = [scratch / hashes_file(block.number) for block in train]
    save_lines(
        scratch,
        ((repeats_file(train[index].number), lines) for index, lines in find_repeats(files)),
    )


def _cleaned(block: Block, job: BlockJob, *, has_repeats: bool = False) -> Pairs:
    """What a tokenizer sees of a block of train."""
    account, task = Account(), job.task
    if has_repeats:
        task = task.model_copy(update={"cleaning": task.cleaning.override({"dedup": False})})
    pairs, found = clean(block.load(account), block.split, task, account)
    sieve = Sieve(Path(job.scratch), job.is_parallel)
    return sieve.sift(pairs, (block.split, block.number), task, account, found)


def _train_tokenizers(job: BlockJob, train: Sequence[Block]) -> None:
    _refuse_nothing(job, train)
    task, folder = job.task, Path(job.folder)

    def texts(config: Tokenizer | Frames, sides: tuple[str, ...]) -> Iterator[str]:
        learns = config.kind in ("bpe", "unigram")
        chosen = _spread(train) if learns else train
        pairs: Iterator[tuple[str, ...]] = itertools.chain.from_iterable(
            zip(*(getattr(part, side) for side in sides), strict=True)
            for part in (_cleaned(block, job) for block in chosen)
        )
        if isinstance(config, Tokenizer) and learns:
            rows = sum(block.count for block in chosen)
            pairs = itertools.islice(pairs, 0, None, -(-rows // config.training_rows))
        return itertools.chain.from_iterable(pairs)

    if task.tokenizer:
        words = texts(task.tokenizer, ("source", "target"))
        train_source(task.tokenizer, words).save(folder, "joint")
        return
    for side, config in (("source", task.source_tokenizer), ("target", task.target_tokenizer)):
        assert config is not None
        train_source(config, texts(config, (side,))).save(folder, side)


def _spread(train: Sequence[Block]) -> Sequence[Block]:
    """At most 50 blocks, evenly spread: what SentencePiece learns from costs the same always."""
    count = min(len(train), TRAINING_BLOCKS)
    return [train[i * len(train) // count] for i in range(count)]


def _refuse_nothing(job: BlockJob, train: Sequence[Block]) -> None:
    """Says why no row of train is left before a tokenizer says that it has no text."""
    total = Account()
    for block in train:
        account = Account()
        pairs, found = clean(block.load(account), "train", job.task, account)
        sieve = Sieve(Path(job.scratch), job.is_parallel)
        if len(sieve.sift(pairs, ("train", block.number), job.task, account, found)):
            return
        total.add(account.to_json())
    refuse_empty(job.task, "train", total)


def _references(job: BlockJob, corpus: Corpus, blocks: dict[str, list[Block]]) -> dict[str, str]:
    """Split -> SHA-256 in hex of the targets of dev and test, a line feed behind each."""
    digests = {}
    for split in corpus.splits[1:]:
        digest = hashlib.sha256()
        for block in blocks[split]:
            pairs, _ = clean(block.load(Account()), split, job.task, Account())
            for target in pairs.target:
                digest.update(target.encode() + b"\n")
        digests[split] = digest.hexdigest()
    return digests


def _names_and_digests(job: BlockJob) -> dict[str, dict[str, Any]]:
    found = {}
    for side, name in (("source", job.source_name), ("target", job.target_name)):
        encoder = load_source(Path(job.folder), name)
        found[side] = {
            "name": name,
            "digest": encoder.digest,
            "size": encoder.size,
            "features": encoder.features,
        }
    return found
