"""The main job: CMUdict -> sweep -> finalist -> pruned, certified, registered model.

`make demo` runs it; about four minutes on two cores.
"""

from optuna.distributions import FloatDistribution

from search_spaces.demo import STUDY
from vinedresser.pipeline import Pipeline
from vinedresser.pruning.search import Pruning

PIPELINE = Pipeline(
    name="demo",
    study=STUDY,
    # From the best trial's weights, for longer, evaluated on all dev words. A second thread gains
    # nothing at this width, and loses much where another process uses the core.
    finalist={
        "steps": 2000,
        "optim.warmup_steps": 50,
        "optim.lr": 1.5e-3,
        "optim.anneal": 0.5,
        "evaluation.sentences": 0,
    },
    pruning=Pruning(
        overrides={
            "steps": 700,
            "optim.warmup_steps": 20,
            "optim.lr": 1e-3,
            "evaluation.num_evaluations": 2,
        },
        # At 0.1 a few of this model's 24 heads close, at 1 more than half of them.
        space={"objective.head_penalty.weight": FloatDistribution(0.1, 1.0, log=True)},
        num_trials=4,
        max_regression=1.0,
    ),
    model_name="g2p-demo",
)
