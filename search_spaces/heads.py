"""Default pruning of a finished Transformer."""

from optuna.distributions import FloatDistribution

from vinedresser.pruning.search import Pruning

HEADS = Pruning(
    overrides={"optim.warmup_steps": 20, "optim.lr": 1e-3, "evaluation.num_evaluations": 2},
    # Nats per token for closing every head, in the normalised convention.
    space={"objective.head_penalty.weight": FloatDistribution(0.05, 2.0, log=True)},
    num_trials=6,
    max_regression=1.0,
)
