"""Study -> ranked trials: Ray Tune runs them, Optuna proposes, the inferred metric ranks.

The record of a sweep is Optuna's journal in the sweep's folder, written by one process. After the
driver was killed, the same command resumes: finished trials are not run again, unfinished ones are
proposed first and resume from their own checkpoints. Tune's snapshots, which are pickles, are not
read.
"""

from vinedresser.sweep.outcome import SweepOutcome, TrialRow, short_params
from vinedresser.sweep.search import sweep

__all__ = ["SweepOutcome", "TrialRow", "short_params", "sweep"]
