"""Pipelines: named steps from a corpus to a champion, run in order; idempotent."""

from vinedresser.pipeline.definition import Pipeline
from vinedresser.pipeline.run import explain, retrain

__all__ = ["Pipeline", "explain", "retrain"]
