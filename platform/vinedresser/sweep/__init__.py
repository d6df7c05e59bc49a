"""Study -> ranked trials: Ray Tune runs them, Optuna proposes, the inferred metric decides.

The record of a sweep is Optuna's journal in the sweep's folder, written by one process. A sweep
whose driver was killed goes on from it: finished trials are never run again, unfinished ones are
proposed first and resume from their own checkpoints. Tune's snapshots, which are pickles, are not
read.
"""

from vinedresser.sweep.journal import mend_journal
from vinedresser.sweep.outcome import SweepOutcome, TrialRow, rank, short_params
from vinedresser.sweep.search import sweep
from vinedresser.sweep.searcher import Searcher

__all__ = [
    "Searcher",
    "SweepOutcome",
    "TrialRow",
    "mend_journal",
    "rank",
    "short_params",
    "sweep",
]
