"""Model registries for tests, an embedded store and a real MLflow server, and what is registered there."""

import json

import pytest

from dgmd_pipeline.registry import logged_run
from dgmd_pipeline.registry import store as registry_store


@pytest.fixture(scope="session")
def embedded_store(tmp_path_factory):
    """One store for all tests, which use different names: MLflow takes some 2 s to create its tables."""
    folder = tmp_path_factory.mktemp("embedded")
    registry_store.create(folder)
    return registry_store.embedded(folder)


@pytest.fixture(params=["embedded", "server"])
def store(request):
    if request.param == "embedded":
        return request.getfixturevalue("embedded_store")
    return registry_store.Store(request.getfixturevalue("mlflow_server"), None)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    import keras

    images = keras.Input((None, None, 3), dtype="uint8")
    resized = keras.layers.Resizing(8, 8, name="resizing")(keras.layers.Rescaling(1 / 255)(images))
    pooled = keras.layers.GlobalAveragePooling2D()(resized)
    path = tmp_path_factory.mktemp("model") / "model.keras"
    keras.Model(images, keras.layers.Dense(2, activation="softmax")(pooled)).save(path)
    return path


def candidate(folder, model, training_id="one", **changes):
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "metrics.json").write_text("{}")
    (folder / "mapping.json").write_text(json.dumps({"0": "anise", "1": "mint"}))
    history = [
        {"accuracy": 0.5, "loss": 1.0, "val_accuracy": 0.6, "val_loss": 0.9},
        {"accuracy": 0.7, "loss": 0.8, "val_accuracy": 0.8, "val_loss": 0.7},
        {"accuracy": 0.9, "loss": 0.6, "val_accuracy": 0.7, "val_loss": 0.8},
    ]
    values = {
        "training_id": training_id,
        "run_name": "jars 2026-11-26 03:00",
        "describe": lambda version, report: f"Version {version}. {report}",
        "model": lambda: model,
        "labels": ["anise", "mint"],
        "params": {"EPOCHS": 3, "BACKBONE_WEIGHTS": None},
        "history": history,
        "metrics": {"validation_accuracy": 0.8},
        "of_run": {"system/step_seconds/raw": 12.5, "system/step_share/raw": 1.0},
        "tags": {"dgmd.version": "0.1.0"},
        "source": "s3://bucket/train/images",
        "attempt": "",
        "source_digest": "a" * 64,
        "files": {folder / "mapping.json": "", folder / "evaluation": "evaluation"},
    }
    return logged_run.Candidate(**{**values, **changes})
