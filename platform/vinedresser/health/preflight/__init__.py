"""Preflight checks: a few minutes before a run that find what would ruin it."""
