"""Batching: plan, read, collate and prefetch batches."""
