"""What is wrong with the data, as far as counts tell."""

from collections.abc import Sequence
from typing import cast

from vinedresser.data.prepare.report import MIN_CORRELATION, MIN_ROWS
from vinedresser.data.shards import ShardSet
from vinedresser.data.tokenizers.tokenizer import SourceEncoder, TextTokenizer
from vinedresser.figures.corpus import coverage
from vinedresser.health.sentences import Sentence
from vinedresser.health.verdict import Check

# Unknown tokens are holes in inputs, and outputs that say nothing.
MAX_UNKNOWN = 0.01
# Copies teach to copy: 10 % of them cost a German-English Transformer 10 BLEU and more
# (Khayrallah and Koehn 2018). Where outputs are judged by edits, copying may be the task.
MAX_IDENTICAL, MAX_IDENTICAL_BY_EDITS = 0.05, 0.5
MAX_REPEATS, MAX_LEAKED = 0.2, 0.01
_BY_EDITS = frozenset({"per", "wer", "cer"})


def data(
    shards: ShardSet, sentences: Sequence[Sentence], encoders: Sequence[SourceEncoder]
) -> Check:
    """Unknown tokens, copies, repeats, rows of dev in train, sides that seem shifted.

    All but the copies are counts of the whole corpus, which `prepare` made (methods.md 109).

    Args:
        shards: with their account.
        sentences: a sample of train, for the copies.
        encoders: source's and target's tokenizers.
    """
    known = coverage(shards)["train"]
    unknown, side = max((1 - share / 100, side) for side, share in known.items())
    copies = _identical(sentences, encoders)
    limit = MAX_IDENTICAL_BY_EDITS if shards.task.metric in _BY_EDITS else MAX_IDENTICAL
    overlap, rows = shards.meta["overlap"], shards.counts["train"]
    repeats = overlap.get("train_repeats", 0) / rows
    leaked = max(
        overlap[split]["pairs"] / shards.counts[split] if split in overlap else 0.0
        for split in ("dev", "test")
    )
    correlation = shards.meta["lengths"]["train"]["correlation"]
    pointers = []
    if unknown > MAX_UNKNOWN:
        pointers.append(
            f"{unknown:.1%} of {side} tokens are unknown to their tokenizer: text in another "
            "encoding or script, or a larger vocab_size, or byte_fallback=true is needed"
        )
    if copies > limit:
        pointers.append(
            f"{copies:.0%} of train targets are their own source: untranslated lines, or one file "
            "given for both sides"
        )
    if repeats > MAX_REPEATS:
        pointers.append(
            f"{repeats:.0%} of train repeat an earlier pair; task.cleaning.dedup=true drops them"
        )
    if leaked > MAX_LEAKED:
        pointers.append(
            f"train rows that stand in dev or test are {leaked:.1%} of it, and scores flatter; "
            "task.cleaning.leakage=drop leaves them out"
        )
    if rows >= MIN_ROWS and correlation < MIN_CORRELATION:
        pointers.append(
            f"lengths of the two sides correlate at {correlation:.2f}: rows may be shifted or "
            "shuffled on one side"
        )
    return Check(
        "data", not pointers,
        f"{unknown:.2%} unknown, {copies:.1%} copies, {repeats:.1%} repeats, {leaked:.1%} leaked",
        f"≤ {MAX_UNKNOWN:.0%}, ≤ {limit:.0%}, ≤ {MAX_REPEATS:.0%}, ≤ {MAX_LEAKED:.0%}",
        "; ".join(pointers),
        {"unknown_share": unknown, "identical_share": copies, "repeated_share": repeats,
         "leaked_share": leaked, "length_correlation": float(correlation)},
    )  # fmt: skip


def _identical(sentences: Sequence[Sentence], encoders: Sequence[SourceEncoder]) -> float:
    """Share of pairs whose sides say the same; 0 for frames."""
    if encoders[0].features:
        return 0.0
    source, target = (cast(TextTokenizer, encoder) for encoder in encoders)
    same = sum(
        source.decode(s.source_S.tolist()) == target.decode(s.target_T.tolist()) for s in sentences
    )
    return same / len(sentences)
