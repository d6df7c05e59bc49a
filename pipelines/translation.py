"""The chain for plain text: `vinedresser retrain pipelines.translation task=FILE`."""

from optuna.distributions import FloatDistribution

from search_spaces.translation import STUDY
from vinedresser.pipeline import Pipeline
from vinedresser.pruning.search import Pruning

PIPELINE = Pipeline(
    name="translation",
    study=STUDY,
    finalist={
        "steps": 900,
        "optim.warmup_steps": 50,
        "optim.lr": 1e-3,
        "optim.anneal": 0.5,
        "compute.threads": 2,
        "evaluation.sentences": 0,
    },
    pruning=Pruning(
        overrides={
            "steps": 400,
            "optim.warmup_steps": 20,
            "optim.lr": 8e-4,
            "compute.threads": 1,
            "evaluation.num_evaluations": 2,
        },
        space={"objective.head_penalty.weight": FloatDistribution(0.1, 1.0, log=True)},
        num_trials=4,
        max_regression=1.0,
    ),
    model_name="translation",
)
