"""Tracking: what a run says while it lives, where it is kept, and who looks after the orphans.

Importing does nothing and imports no mlflow; every Ray worker does it. Metrics that a dead server
refuses wait in memory, bounded; a durable spool that survives the process is not built yet.
"""

from vinedresser.tracking.later import LaterTracker
from vinedresser.tracking.leaderboard import (
    LOWER_IS_BETTER,
    RunRow,
    experiments,
    leaderboard,
    run_folder,
)
from vinedresser.tracking.remote import MlflowTracker
from vinedresser.tracking.runs import end_children, open_run, reap
from vinedresser.tracking.store import Store, initialise, store_for
from vinedresser.tracking.tracker import MemoryTracker, NullTracker, State, Tracker, ending
from vinedresser.tracking.ui import serve_ui

__all__ = [
    "LOWER_IS_BETTER",
    "LaterTracker",
    "MemoryTracker",
    "MlflowTracker",
    "NullTracker",
    "RunRow",
    "State",
    "Store",
    "Tracker",
    "end_children",
    "ending",
    "experiments",
    "initialise",
    "leaderboard",
    "open_run",
    "reap",
    "run_folder",
    "serve_ui",
    "store_for",
]
