"""Pruning: close, fold and remove attention heads; prove parity; search."""
