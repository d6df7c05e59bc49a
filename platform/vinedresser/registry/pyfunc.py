"""What MLflow runs to serve a bundle: models-from-code, so no pickle is written or read.

`export.register` hands this file's path to MLflow, which copies it beside the bundle and executes
it in the serving process. There `vinedresser` and the bundle's trainable must be installed.
"""

from typing import Any

import mlflow.models
from mlflow.pyfunc.model import PythonModel


class ServedBundle(PythonModel):
    """A verified bundle behind MLflow's predict: source texts in, target texts out."""

    def load_context(self, context: Any) -> None:
        """Opens the bundle that was registered with this file."""
        from pathlib import Path

        from vinedresser.bundle import load_bundle

        self._translator = load_bundle(Path(context.artifacts["bundle"]))

    # MLflow takes the signature from these hints, and lets `context` be left out.
    def predict(self, model_input: list[str]) -> list[str]:  # type: ignore[override]
        """One target text for each source text, in order."""
        return list(self._translator.translate(list(model_input)))


mlflow.models.set_model(ServedBundle())
