"""Export: bundles into the registry, through a gate; importing it imports no mlflow."""

from vinedresser.export.gate import Gate, Scores, Verdict, judge
from vinedresser.export.registry import Registered, fetch, read_scores, register

__all__ = [
    "Gate",
    "Registered",
    "Scores",
    "Verdict",
    "fetch",
    "judge",
    "read_scores",
    "register",
]
