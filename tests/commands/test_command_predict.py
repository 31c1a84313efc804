"""The command `predict` against a real MLflow server."""

import csv
import io
import json
import os

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
    (tmp_path / "in/huge.png").touch()
    os.truncate(tmp_path / "in/huge.png", 500_000_001)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "in/z.png").write_bytes(picture(LABELS[0], 3, TINY["IMAGE_WIDTH"]))  # after those that cannot be read
    names = [*(row["file"] for row in rows), "in/z.png"]
    for words, read in (
        (["--csv"], csv.DictReader),
        (["--json"], lambda text: json.loads(text.read())),
        ([], table_rows),
    ):
        result = command(tmp_path, "predict", "nowhere.png", "in", "pipe", *words, **variables)  # production
        assert result.returncode == 20
        assert [row["file"] for row in read(io.StringIO(result.stdout))] == names, words
        for problem in (
            "warning: nowhere.png cannot be read: No such file or directory\n",
            "warning: pipe cannot be read: neither a file nor a folder\n",
            "warning: in/notes.txt cannot be read: ",
            "warning: in/huge.png cannot be read: 500,000,001 bytes, expected at most 500,000,000\n",
            "error: 4 of 8 files could not be read: the warnings give the reasons.\n",
        ):
            assert problem in result.stderr, words


def table_rows(text):
    return [{"file": line.split(maxsplit=2)[2].strip()} for line in text][1:]


def test_without_a_file_that_can_be_read_nothing_is_loaded(trained, command):
    variables = {**trained.variables, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    result = command(trained.folder, "predict", "nowhere.png", **variables)
    assert (result.returncode, result.stdout) == (20, "")
    assert "nowhere.png cannot be read: No such file or directory" in result.stderr
