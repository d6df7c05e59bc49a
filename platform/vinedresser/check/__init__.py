"""What a user runs before spending a cluster: one experiment's data, model and cost, checked.

Nothing is written: no run, no checkpoint, no tracking store.
"""

from vinedresser.check.checks import checks
from vinedresser.check.verdict import Check

__all__ = ["Check", "checks"]
