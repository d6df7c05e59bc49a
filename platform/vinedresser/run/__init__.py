"""One experiment from shards to a bundle: resumable, recognised when done."""

from vinedresser.run.outcome import (
    Outcome,
    clear,
    finished,
    run_folder,
    run_key,
    tell_changes,
)
from vinedresser.run.run import Report, RolledBackError, Run

__all__ = [
    "Outcome",
    "Report",
    "RolledBackError",
    "Run",
    "clear",
    "finished",
    "run_folder",
    "run_key",
    "tell_changes",
]
