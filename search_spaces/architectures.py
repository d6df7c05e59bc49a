"""Choice of an architecture: one study across the zoo on the demo's task, by the decoded PER.

Every trial has the same updates of the same tokens; dropout and learning rate vary with the model,
because each architecture has its own optimum. A key below `model` is checked under every model.
"""

from optuna.distributions import CategoricalDistribution, FloatDistribution

from search_spaces.demo import EXPERIMENT
from vinedresser.config.study import Stopping, Study

STUDY = Study(
    name="g2p-architectures",
    base=EXPERIMENT.override(
        {"name": "architectures", "objective.likelihood.sampling.probability": 0.0}
    ),
    space={
        "model": CategoricalDistribution(["rnn", "rnn-small", "conv-small", "transformer-tiny"]),
        "model.dropout": FloatDistribution(0.0, 0.2),
        "optim.lr": FloatDistribution(5e-4, 4e-3, log=True),
    },
    num_trials=12,
    stopping=Stopping(grace=1, factor=3),
)
