"""What is minimised. Sums travel, means do not."""

from vinedresser.objectives.likelihood import Loss, likelihood
from vinedresser.objectives.sampling import gold_share, mixed_inputs

__all__ = ["Loss", "gold_share", "likelihood", "mixed_inputs"]
