"""Shards: blocks of rows -> cleaned, tokenised, written once, with an account of every row."""
