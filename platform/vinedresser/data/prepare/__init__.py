"""Prepare: clean, learn tokenizers, encode into shards."""
