"""The command `predict` against a real MLflow server."""

import csv
import io

import keras
import numpy as np
import pytest
from conftest import picture
from PIL import Image
from support.pipeline import LABELS, TINY

pytest_plugins = ["support.trained_versions"]


def test_images_are_predicted_from_the_registry_alone(trained, tmp_path, command, json_of):
    (tmp_path / "in/below").mkdir(parents=True)
    for label in LABELS:
        (tmp_path / f"in/below/{label}.png").write_bytes(picture(label, 3, TINY["IMAGE_WIDTH"]))
    variables = {**trained.variables, "DATA_DIR": tmp_path / "nothing"}
    rows = json_of(tmp_path, "predict", "in", "--version", "1", **variables)
    assert [row["file"] for row in rows] == [f"in/below/{label}.png" for label in LABELS]
    network = keras.models.load_model(trained.folder / "data/trained_model/model.keras", compile=False)  # version 2
    second = json_of(tmp_path, "predict", "in", "--version", "2", **variables)
    for row in second:
        pixels = np.asarray(Image.open(tmp_path / row["file"]).convert("RGB"))[np.newaxis]
        probabilities = network.predict(pixels, verbose=0)[0]
        assert row["label"] == LABELS[probabilities.argmax()]
        assert row["probability"] == pytest.approx(probabilities.max(), abs=1e-5)
    assert not (tmp_path / "nothing").exists()

    (tmp_path / "in/notes.txt").write_text("no image")
    result = command(tmp_path, "predict", "in", "--csv", **variables)  # production
    assert result.returncode == 20
    assert [row["file"] for row in csv.DictReader(io.StringIO(result.stdout))] == [row["file"] for row in rows]
    assert "1 of 4 files could not be read; the first one is in/notes.txt" in result.stderr


def test_a_file_that_does_not_exist_is_reported(trained, command):
    result = command(trained.folder, "predict", "nowhere.png", **trained.variables)
    assert result.returncode == 20
    assert "There is no file or folder nowhere.png." in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
