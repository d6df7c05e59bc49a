"""Tracking: metrics, tags and artifacts of runs in MLflow.

Importing does nothing and imports no mlflow; every Ray worker does it. What a run has to deliver
waits in a spool in its folder until the store took it.
"""

from vinedresser.tracking.delivery import deliver_spools, spools_of
from vinedresser.tracking.leaderboard import RunRow, experiments, leaderboard, tagged_folder
from vinedresser.tracking.outbox import open_run, undelivered
from vinedresser.tracking.runs import end_children, prepare_store, reap
from vinedresser.tracking.store import Store, initialise, store_for
from vinedresser.tracking.tracker import NullTracker, Tracker, ending
from vinedresser.tracking.ui import serve_ui

__all__ = [
    "NullTracker",
    "RunRow",
    "Store",
    "Tracker",
    "deliver_spools",
    "end_children",
    "ending",
    "experiments",
    "initialise",
    "leaderboard",
    "open_run",
    "prepare_store",
    "reap",
    "serve_ui",
    "spools_of",
    "store_for",
    "tagged_folder",
    "undelivered",
]
