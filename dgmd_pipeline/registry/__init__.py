"""The model registry; the only users of MLflow."""
