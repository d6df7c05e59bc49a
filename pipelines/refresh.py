"""The champion, trained on from its weights on the present corpus, pruned and judged by the gate.

`vinedresser retrain pipelines.refresh task=FILE`; `model_name=` names another registered model.
"""

from pipelines import translation

PIPELINE = translation.PIPELINE.override(
    {
        "name": "refresh",
        "steps": ["prepare", "finetune", "prune", "register"],
        # A third of the first training: the weights are those of a finished model.
        "finalist.steps": 300,
        "finalist.optim.lr": 5e-4,
    }
)
