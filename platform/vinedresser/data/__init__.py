"""Data: corpora -> rows -> tokens -> Parquet shards -> batches.

Whatever needs torch (`Batches`, `stream`, ...) is imported at its first use, so that a Ray worker
that only tokenises does not pay 2 s and 200 MB for it. `shards.tokenizers` is not re-exported: the
module `tokenizers` has that name here.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vinedresser.data.corpus.corpus import open_corpus, read, source_digests, splits
from vinedresser.data.corpus.row import Account, Row
from vinedresser.data.order import Padding, padding, plan
from vinedresser.data.shards.shard_set import ShardSet, open_shards, prepare
from vinedresser.data.tokenizers.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from vinedresser.data.batches.stream import Batches, Split, in_order, load_split, stream

__all__ = [
    "Account",
    "Batches",
    "Padding",
    "Row",
    "ShardSet",
    "Split",
    "TextTokenizer",
    "in_order",
    "load_split",
    "load_tokenizer",
    "open_corpus",
    "open_shards",
    "padding",
    "plan",
    "prepare",
    "read",
    "source_digests",
    "splits",
    "stream",
    "train_tokenizer",
]

_NEED_TORCH = frozenset({"Batches", "Split", "in_order", "load_split", "stream"})


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(importlib.import_module("vinedresser.data.batches.stream"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
