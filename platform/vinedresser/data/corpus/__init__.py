"""Corpora: what a task names -> files checked whole -> blocks of rows. No torch, no Ray."""
