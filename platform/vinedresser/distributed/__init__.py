"""Distributed training: one experiment on N Ray Train workers; N = 1 runs in place."""
