"""The champion against fresh data: its decoded score, and by how much it became worse.

`vinedresser retrain pipelines.evaluate task=FILE`; `model_name=` names another registered model.
"""

from pipelines import translation

PIPELINE = translation.PIPELINE.override({"name": "evaluate", "steps": ["prepare", "evaluate"]})
