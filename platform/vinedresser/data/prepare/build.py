"""Preparation of a shard set, in one direction: clean, find repeats, learn tokenizers, encode."""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vinedresser.config.task import Frames, Task, Tokenizer
from vinedresser.data.corpora.corpus import Corpus
from vinedresser.data.corpora.row import Block
from vinedresser.data.prepare.clean import (
    HELD_OUT_FILE,
    CleanedBlock,
    HeldOut,
    PrepareJob,
    clean_block,
    hashes_file,
    read_cleaned,
    repeats_file,
)
from vinedresser.data.prepare.encode import LENGTHS_FILE, encode_block, shard_name
from vinedresser.data.prepare.execute import (
    BlockRunner,
    Connect,
    Executor,
    block_runner,
    in_process,
)
from vinedresser.data.prepare.hashing import find_repeats
from vinedresser.data.prepare.report import PreparationReport
from vinedresser.data.tokenizers.tokenizer import load_source, train_source
from vinedresser.errors import DamagedError
from vinedresser.workspace.commit import Staging, file_digest

# Blocks that SentencePiece learns from, at most: a million rows are read to choose from.
TRAINING_BLOCKS = 50


def build_shards(
    task: Task, corpus: Corpus, staging: Staging, executor: Executor, connect: Connect | None
) -> None:
    """Fill a staging folder with a shard set, and its `meta` with the report.

    Raises:
        DataError: nothing or too little of a split is left, test rows in train, sides shifted.
        MachineError: disk full, no permission, or Ray failed.
    """
    folder = staging.path
    # Inside the staging folder: removed with it if the job is killed.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as name:
        scratch = Path(name)
        corpus.unpack(scratch)
        blocks = {split: list(corpus.blocks(split)) for split in corpus.splits}
        every = [block for split in corpus.splits for block in blocks[split]]
        job = PrepareJob(
            task,
            folder=str(folder),
            out=str(folder),
            scratch=str(scratch),
            is_parallel=corpus.is_parallel,
        )
        with block_runner(executor, sum(block.count for block in every), connect) as run:
            report = PreparationReport(task, corpus, _clean(every, job, run))
            report.refuse_empty()
            report.refuse_leakage()
            _learn_tokenizers(blocks["train"], job)
            report.encoded += run(encode_block, every, job)
        corpus.refuse_changed()
        # Remove parts of shards of workers that died.
        for partial in folder.glob(".*.parquet.*"):
            partial.unlink()
        for encoded in report.encoded:
            if encoded.shard and not (folder / encoded.shard).is_file():
                raise DamagedError(
                    f"{folder / encoded.shard}: written by a worker but not here. Fix: name a "
                    'workspace that every node sees, or prepare with executor="in_process"'
                )
        staging.meta |= report.describe(scratch)
        digests = staging.meta["reference_digests"] = dict[str, str]()
        for split in corpus.splits[1:]:
            digest = hashlib.sha256()
            for block in blocks[split]:
                for target in read_cleaned(block, job).target:
                    digest.update(target.encode() + b"\n")
            digests[split] = digest.hexdigest()
        sides = staging.meta["tokenizers"] = dict[str, Any]()
        for side, name in zip(("source", "target"), job.names, strict=True):
            encoder = load_source(folder, name)
            sides[side] = {
                "name": name,
                "digest": encoder.digest,
                "size": encoder.size,
                "features": encoder.features,
            }
        lengths = folder / LENGTHS_FILE
        pq.write_table(
            report.lengths_table(), lengths, compression="zstd", write_page_checksum=True
        )


def rebuild_shards(
    task: Task, corpus: Corpus, folder: Path, out: Path, names: Sequence[str]
) -> dict[str, str]:
    """Write some shards of a complete set again.

    Reads the rows that these shards depend on: their own, for train the held-out splits, and all of
    train where repeats are dropped. The corpus has the files of the time when the set was made; the
    tokenizers in `folder`, the set, are whole; `out` receives the shards.

    Returns:
        Name -> SHA-256 in hex of the shard.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".scratch-") as name:
        scratch = Path(name)
        corpus.unpack(scratch)
        job = PrepareJob(task, str(folder), str(out), str(scratch), corpus.is_parallel)
        every = [block for split in corpus.splits for block in corpus.blocks(split)]
        wanted = [block for block in every if shard_name(block.split, block.number) in names]
        needed = wanted
        if corpus.is_parallel and any(block.split == "train" for block in wanted):
            needed = [
                block
                for block in every
                if block.split != "train" or task.cleaning.dedup or block in wanted
            ]
        _clean(needed, job, in_process)
        shards = [encode_block(block, job).shard for block in wanted]
        corpus.refuse_changed()
    return {shard: file_digest(out / shard) for shard in shards if shard}


def _clean(blocks: Sequence[Block], job: PrepareJob, run: BlockRunner) -> list[CleanedBlock]:
    """Clean blocks of all splits, then find the repeats of train if they are dropped.

    The held-out splits come first: train is compared with them while it is cleaned.
    """
    held_out = [block for block in blocks if block.split != "train"]
    train = [block for block in blocks if block.split == "train"]
    scratch = Path(job.scratch)
    cleaned = [*run(clean_block, held_out, job)]
    if job.is_parallel:
        targets = json.dumps(HeldOut.of(held_out, job).targets)
        (scratch / HELD_OUT_FILE).write_text(targets, encoding="utf-8")
    cleaned += run(clean_block, train, job)
    if job.is_parallel and job.task.cleaning.dedup:
        files = [scratch / hashes_file(block.number) for block in train]
        for index, lines in find_repeats(files):
            with (scratch / repeats_file(train[index].number)).open("ab") as stream:
                stream.write(lines.astype("<i8").tobytes())
    return cleaned


def _learn_tokenizers(train: Sequence[Block], job: PrepareJob) -> None:
    """Learn the tokenizers from cleaned blocks of train, or take a model's, and save them.

    SentencePiece gets `training_rows` rows, evenly spread over at most 50 blocks that are evenly
    spread over train, so that learning costs the same whatever the corpus; others get all rows.
    """

    def texts(config: Tokenizer | Frames, sides: tuple[str, ...]) -> Iterator[str]:
        chosen, stride = train, 1
        if isinstance(config, Tokenizer) and config.kind in ("bpe", "unigram"):
            count = min(len(train), TRAINING_BLOCKS)
            chosen = [train[i * len(train) // count] for i in range(count)]
            stride = -(-sum(block.count for block in chosen) // config.training_rows)
        rows = itertools.chain.from_iterable(
            zip(*(getattr(pairs, side) for side in sides), strict=True)
            for pairs in (read_cleaned(block, job) for block in chosen)
        )
        return itertools.chain.from_iterable(itertools.islice(rows, 0, None, stride))

    task, folder = job.task, Path(job.folder)
    sides: dict[str, tuple[Tokenizer | Frames, tuple[str, ...]]]
    if task.tokenizer:
        sides = {"joint": (task.tokenizer, ("source", "target"))}
    else:
        assert task.source_tokenizer is not None
        assert task.target_tokenizer is not None
        sides = {
            "source": (task.source_tokenizer, ("source",)),
            "target": (task.target_tokenizer, ("target",)),
        }
    for name, (config, columns) in sides.items():
        if task.tokenizers_of is None:
            encoder = train_source(config, texts(config, columns))
        else:  # a bundle names both sides, also of a joint vocabulary
            side = "source" if name == "joint" else name
            encoder = load_source(Path(task.tokenizers_of), side)
        encoder.save(folder, name)
