"""Data: corpora -> tokenizers -> prepare -> shards -> batching."""
