"""MLflow model of a bundle: models-from-code, so that no pickle is written or read.

`register` gives this file's path to MLflow, which copies it next to the bundle and executes it in
the serving process. `vinedresser` and the bundle's trainable must be installed there.
"""

from typing import Any

import mlflow.models
from mlflow.pyfunc.model import PythonModel


class BundleModel(PythonModel):
    """A verified bundle behind MLflow's predict: source texts in, target texts out."""

    def load_context(self, context: Any) -> None:
        """Load the bundle that was registered with this file."""
        from pathlib import Path

        from vinedresser.bundle import load_bundle

        self._bundle = load_bundle(Path(context.artifacts["bundle"]))

    # MLflow takes the signature from these hints, and lets `context` be left out.
    def predict(self, model_input: list[str]) -> list[str]:  # type: ignore[override]
        """Return one target text for each source text, in order."""
        return list(self._bundle.translate(list(model_input)))


mlflow.models.set_model(BundleModel())
