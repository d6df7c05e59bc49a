"""Comparison: two bundles decode the same split, each as it translates, and are scored in pairs."""

import numpy as np

from vinedresser.bundle import Bundle
from vinedresser.data.batching.reader import Split, in_order, load_split
from vinedresser.data.batching.side import Side
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.decode import decode
from vinedresser.errors import DataError
from vinedresser.significance import PairedBootstrap, paired_bootstrap


def compare_models(
    challenger: Bundle, champion: Bundle, shards: ShardSet, split_name: str
) -> PairedBootstrap:
    """Return the scores of both bundles on a split of a shard set, by the metric of its task.

    Raises:
        DataError: a bundle reads frames of another kind than the shard set holds, or no frames.
    """
    split = load_split(shards, split_name)
    return paired_bootstrap(
        shards.task.metric,
        ([hypotheses(challenger, shards, split)], [hypotheses(champion, shards, split)]),
        split.references,
        folds_case=challenger.target_tokenizer.folds_case or champion.target_tokenizer.folds_case,
    )


def hypotheses(bundle: Bundle, shards: ShardSet, split: Split) -> list[str]:
    """Return what a bundle decodes for each source of a split, in order.

    The shards may have been prepared for other tokenizers than the bundle's. A source that is
    longer than the bundle reads gives an empty text.

    Raises:
        DataError: as `compare`.
    """
    tokenizer, task = bundle.source_tokenizer, bundle.experiment.task
    if tokenizer.digest == tokenizers(shards)[0].digest:
        source = split.source
    elif tokenizer.features or shards.features:
        raise DataError(
            f"{bundle.folder}: reads other frames than {shards.folder} holds; prepare the task "
            "with the frames of the bundle"
        )
    else:
        source = Side.of(split.sources, tokenizer)
    rows = np.flatnonzero(source.lengths <= task.max_source_length)
    read = Split(split.name, source.take(rows), split.target.take(rows), [], [])
    decoding, texts = bundle.experiment.decoding, [""] * len(split)
    for batch in in_order(read, tokens=decoding.max_padded_tokens) if len(rows) else ():
        found = decode(
            bundle.model,
            batch.source_BS,
            batch.source_lengths_B,
            decoding,
            cap=task.max_target_length,
        )
        for row, ids in zip(batch.rows_B.tolist(), found.ids, strict=True):
            texts[rows[row]] = bundle.target_tokenizer.decode(ids)
    return texts
