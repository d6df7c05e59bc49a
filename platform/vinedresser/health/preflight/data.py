"""Checks of the data by counts: unknown tokens, copies, repeats, leakage, lengths."""

import statistics
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from vinedresser.config import Experiment
from vinedresser.data.batching.plan import plan_cells
from vinedresser.data.batching.reader import Split
from vinedresser.data.prepare.report import MIN_CORRELATION, MIN_ROWS
from vinedresser.data.shards import ShardSet
from vinedresser.data.tokenizers.tokenizer import SourceEncoder, TextTokenizer
from vinedresser.decode import length_limits
from vinedresser.figures.corpus import coverage, histogram_of
from vinedresser.health.preflight.check import CheckResult
from vinedresser.health.preflight.sentences import Sentence

# Unknown tokens lose content on both sides.
MAX_UNKNOWN = 0.01
# Copies teach to copy: 10 % of them cost a German-English Transformer 10 BLEU and more
# (Khayrallah and Koehn 2018). Where outputs are judged by edits, copying may be the task.
MAX_IDENTICAL, MAX_IDENTICAL_BY_EDITS = 0.05, 0.5
MAX_REPEATS, MAX_LEAKED = 0.2, 0.01
# Dropped rows are training data lost, references that no output can reach are points lost in every
# score.
MAX_DROPPED, MAX_OUT_OF_REACH, MIN_REAL = 0.05, 0.01, 0.5
# A batch should hold several of the longest rows, or its updates follow single sentences.
MIN_LONGEST_ROWS = 2
_BY_EDITS = frozenset({"per", "wer", "cer"})


def check_content(
    shards: ShardSet, sentences: Sequence[Sentence], encoders: Sequence[SourceEncoder]
) -> CheckResult:
    """Check unknown tokens, copies, repeats, rows of dev in train, and the alignment of both sides.

    All but the copies are counts of the whole corpus, made by `prepare` (methods.md 109). The
    sentences are a sample of train, for the copies.
    """
    known = coverage(shards)["train"]
    unknown, side = max((1 - share / 100, side) for side, share in known.items())
    copies = 0.0
    if not encoders[0].features:
        source, target = (cast(TextTokenizer, encoder) for encoder in encoders)
        copies = statistics.fmean(
            source.decode(s.source_S.tolist()) == target.decode(s.target_T.tolist())
            for s in sentences
        )
    limit = MAX_IDENTICAL_BY_EDITS if shards.task.metric in _BY_EDITS else MAX_IDENTICAL
    overlap, rows = shards.meta["overlap"], shards.counts["train"]
    repeats = overlap.get("train_repeats", 0) / rows
    leaked = max(
        overlap[split]["pairs"] / shards.counts[split] if split in overlap else 0.0
        for split in ("dev", "test")
    )
    correlation = shards.meta["lengths"]["train"]["correlation"]
    pointers = {
        f"{unknown:.1%} of {side} tokens are unknown to their tokenizer: text in another "
        "encoding or script, or a larger vocab_size, or byte_fallback=true is needed":
            unknown > MAX_UNKNOWN,
        f"{copies:.0%} of train targets are their own source: untranslated lines, or one file "
        "given for both sides": copies > limit,
        f"{repeats:.0%} of train rows are repeats; task.cleaning.dedup=true drops them":
            repeats > MAX_REPEATS,
        f"{leaked:.1%} of dev or test also occur in train, which inflates scores; "
        "task.cleaning.leakage=drop leaves them out": leaked > MAX_LEAKED,
        f"lengths of the two sides correlate at {correlation:.2f}: rows may be shifted or "
        "shuffled on one side": rows >= MIN_ROWS and correlation < MIN_CORRELATION,
    }  # fmt: skip
    return CheckResult(
        "data", not any(pointers.values()),
        f"{unknown:.2%} unknown, {copies:.1%} copies, {repeats:.1%} repeats, {leaked:.1%} leaked",
        f"≤ {MAX_UNKNOWN:.0%}, ≤ {limit:.0%}, ≤ {MAX_REPEATS:.0%}, ≤ {MAX_LEAKED:.0%}",
        "; ".join(text for text, is_true in pointers.items() if is_true),
        {"unknown_share": unknown, "identical_share": copies, "repeated_share": repeats,
         "leaked_share": leaked, "length_correlation": float(correlation)},
    )  # fmt: skip


def check_lengths(shards: ShardSet, experiment: Experiment, dev: Split) -> CheckResult:
    """Check rows dropped by length, the longest row, padding, and references that are too long."""
    account, tokens = shards.meta["account"]["train"], experiment.batch.max_padded_tokens
    dropped = sum(n for why, n in account["dropped"].items() if "long" in why)
    share = dropped / max(1, account["rows_in"])
    cells = histogram_of(shards, "train")
    longest = int(cells.longest[cells.counts > 0].max())
    real = (
        plan_cells(cells, tokens=tokens, order=experiment.batch.order)
        .padding_efficiency(cells)
        .both
    )
    cap = experiment.task.max_target_length
    limits = length_limits(torch.from_numpy(dev.source_lengths), cap).numpy()
    beyond = float(np.mean(dev.target_lengths > limits))
    pointers = {
        f"{dropped:,} train rows are too long and were dropped; raise task.max_source_length, "
        "task.max_target_length": share > MAX_DROPPED,
        f"the longest row has {longest} tokens and fills a batch of {tokens} alone; raise "
        "batch.max_padded_tokens or lower task.max_source_length, task.max_target_length":
            longest * MIN_LONGEST_ROWS > tokens,
        f"{beyond:.1%} of dev's references are longer than any output may be, "
        "min(task.max_target_length, 2 x source + 10); raise it or take shorter targets":
            beyond > MAX_OUT_OF_REACH,
        "more than half of a batch is padding; set batch.order=alternating_max, or a larger "
        "batch.max_padded_tokens": real < MIN_REAL,
    }  # fmt: skip
    return CheckResult(
        "lengths", not any(pointers.values()),
        f"{share:.1%} dropped, longest {longest} of {tokens}, {real:.0%} real tokens",
        f"≤ {MAX_DROPPED:.0%}, ≤ {tokens // MIN_LONGEST_ROWS}, ≥ {MIN_REAL:.0%}",
        "; ".join(text for text, is_true in pointers.items() if is_true),
        {"dropped_share": share, "longest": float(longest), "real_share": real,
         "out_of_reach_share": beyond},
    )  # fmt: skip
