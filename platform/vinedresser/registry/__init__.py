"""Registry: MLflow registry, champion gate, pyfunc model."""
