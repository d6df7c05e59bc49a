"""Tracking: metrics, tags and artifacts of runs in MLflow.

Importing does nothing and imports no mlflow; every Ray worker does it. Metrics that a dead server
refuses wait in memory, bounded; a durable spool that survives the process is not built yet.
"""

from vinedresser.tracking.leaderboard import RunRow, experiments, leaderboard, tagged_folder
from vinedresser.tracking.runs import end_children, open_run, reap
from vinedresser.tracking.store import Store, initialise, store_for
from vinedresser.tracking.tracker import NullTracker, Tracker, ending
from vinedresser.tracking.ui import serve_ui

__all__ = [
    "NullTracker",
    "RunRow",
    "Store",
    "Tracker",
    "end_children",
    "ending",
    "experiments",
    "initialise",
    "leaderboard",
    "open_run",
    "reap",
    "serve_ui",
    "store_for",
    "tagged_folder",
]
