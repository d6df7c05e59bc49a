"""Corpora: rows of text, tables, lexicons and recordings."""
