"""Batches: shards -> windows -> padded tensors; the one part of `data` that needs torch."""
