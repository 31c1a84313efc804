"""The table: a setting changed, a folder deleted or a format raised -> exactly these steps run."""

import csv
import json
import os
import shutil
from pathlib import Path

import boto3
import numpy as np
import pytest
from conftest import CREDENTIALS, picture

from dgmd_pipeline import cli
from dgmd_pipeline.settings import Settings, variable
from dgmd_pipeline.tasks import data, model, training_inputs

pytestmark = [pytest.mark.usefixtures("_own_process"), pytest.mark.slow]

DATA = ["raw", "inspected", "label_map", "balanced", "split"]
RECORDS = ["tfrecord_training", "tfrecord_validation"]
FEATURES = ["features_training", "features_validation"]
LEARNED = ["trained_model", "evaluation", "registered_model"]
SMALL = {"IMAGE_WIDTH": 32, "IMAGE_HEIGHT": 32, "NUM_SHARDS": 2, "EPOCHS": 1, "SEED": 1, "BACKBONE_WEIGHTS": "none"}


@pytest.fixture(scope="module")
def place(s3_endpoint, mlflow_server):
    """Where the pictures are, the same ones in two buckets and under two prefixes, and where models go."""
    client = boto3.client("s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    for bucket, prefix in (("here", "p"), ("here", "q"), ("there", "p")):
        if prefix == "p":
            client.create_bucket(Bucket=bucket)
        for label in ("anise", "cumin", "thyme"):
            for number in range(8):
                key = f"{prefix}/{label}/{number}.png"
                client.put_object(Bucket=bucket, Key=key, Body=picture(label, number, 32))
    return {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DATA_BUCKET": "here",
        "AWS_DATA_PATH": "p",
        "MLFLOW_TRACKING_URI": mlflow_server,
        "MODEL_NAME": "rerun",
    }


def run(variables, data_dir, *arguments):
    """Run the pipeline in this process and return the steps that made their folder anew."""
    before = _folders(data_dir)
    os.environ.update({name: str(value) for name, value in variables.items()}, DATA_DIR=str(data_dir))
    assert cli.main(arguments) == 0
    after = _folders(data_dir)
    return [name for name in DATA + RECORDS + FEATURES + LEARNED if before.get(name) != after.get(name)]


def _folders(data_dir):
    return {path.parent.name: path.stat().st_mtime_ns for path in data_dir.glob("*/_SUCCESS")}


def finished(backbone, place, tmp_path_factory):
    """Make a finished run, not to be changed; return its variables and folder."""
    variables = place | SMALL | {"BACKBONE": backbone}
    data_dir = tmp_path_factory.mktemp(backbone) / "data"
    features = [] if backbone == "cnn" else FEATURES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        assert run(variables, data_dir) == [*DATA, *RECORDS, *features, *LEARNED]
    return variables, data_dir


@pytest.fixture(scope="module")
def finished_cnn(place, tmp_path_factory):
    return finished("cnn", place, tmp_path_factory)


@pytest.fixture(scope="module")
def finished_frozen(place, tmp_path_factory):
    return finished("MobileNetV3-Small", place, tmp_path_factory)


@pytest.fixture
def cnn(finished_cnn, tmp_path):
    shutil.copytree(finished_cnn[1], tmp_path / "data")
    return finished_cnn[0], tmp_path / "data"


@pytest.fixture
def frozen(finished_frozen, tmp_path):
    shutil.copytree(finished_frozen[1], tmp_path / "data")
    return finished_frozen[0], tmp_path / "data"


def version(data_dir):
    return json.loads((data_dir / "registered_model" / "version.json").read_text())["version"]


CHANGED = {  # setting -> its new value and the steps that then run, without stored features
    "AWS_DATA_BUCKET": ("there", ["raw", "label_map"]),  # the same pictures: other numbers could stand for the labels
    "AWS_DATA_PATH": ("q", ["raw", "label_map"]),
    "REFRESH": ("true", []),
    "MAX_REJECTED_PCNT": (0.4, ["label_map"]),
    "MAX_CLASS_DROP": (0.3, []),  # a promotion's
    "MAX_LATENCY_RATIO": (2, []),
    "ALLOW_LOST_LABELS": ("true", []),
    "PROMOTE_IF_BETTER": ("true", []),
    "MIN_IMAGES_PER_LABEL": (3, ["label_map"]),
    "BALANCE_LIMIT": (1.5, ["balanced", "split", *RECORDS, *LEARNED]),
    "VALIDATION_PCNT": (0.4, ["split", *RECORDS, *LEARNED]),
    "NUM_SHARDS": (3, [*RECORDS, *LEARNED]),
    "IMAGE_WIDTH": (40, [*RECORDS, *LEARNED]),
    "IMAGE_HEIGHT": (40, [*RECORDS, *LEARNED]),
    "IMAGE_FIT": ("crop", [*RECORDS, *LEARNED]),
    "BACKBONE": ("MobileNetV3-Small", [*FEATURES, *LEARNED]),
    "BACKBONE_WEIGHTS": ("imagenet", []),  # `cnn` has none
    "HEAD": ("linear", []),  # `cnn` has one head
    "BATCH_SIZE": (64, LEARNED),
    "EPOCHS": (2, LEARNED),
    "LEARNING_RATE": (0.02, LEARNED),
    "DECAY_RATE": (0.1, LEARNED),
    "PATIENCE": (2, LEARNED),
    "OPTIMIZER": ("sgd", LEARNED),
    "DROPOUT": (0.2, LEARNED),
    "WEIGHT_DECAY": (0.1, LEARNED),
    "AUGMENTATION": ("flip", LEARNED),
    "FINE_TUNE": ("top", []),  # `cnn` is trained as a whole
    "FINE_TUNE_EPOCHS": (2, []),
    "FINE_TUNE_LEARNING_RATE": (0.001, []),
    "CLASS_WEIGHTS": ("false", LEARNED),
    "SEED": (2, LEARNED),
    "MODEL_NAME": ("another", ["evaluation", "registered_model"]),
    "MLFLOW_EXPERIMENT_NAME": ("another", ["registered_model"]),
    "MLFLOW_TRACKING_URI": ("sqlite:///another.db", ["evaluation", "registered_model"]),
    "TZ": ("Europe/Berlin", []),
    "LUIGI_SCHEDULER_URL": ("http://127.0.0.1:9", []),
    "LUIGI_CONFIG_PATH": ("luigi.cfg", []),
    "NOTIFY_URL": ("http://127.0.0.1:9/", []),
    "NOTIFY_ON": ("problem", []),
    "HEALTH_MAX_AGE": (26, []),
    "DASK_SCHEDULER_ADDRESS": ("tcp://127.0.0.1:9", []),
    "KERAS_HOME": ("elsewhere", []),
    "GIT_REVISION": ("0123abc", []),
}


def test_the_table_has_every_setting():
    assert set(CHANGED) == set(map(variable, Settings.model_fields)) - {"DATA_DIR", "SCHEDULE"}


@pytest.mark.parametrize("setting", CHANGED)
def test_a_setting_redoes_the_steps_that_use_it_and_what_follows(setting, cnn):
    variables, data_dir = cnn
    value, steps = CHANGED[setting]
    Path("luigi.cfg").touch()  # what LUIGI_CONFIG_PATH names
    variables = variables | {setting: value}
    assert run(variables, data_dir, *up_to_training(steps)) == before_evaluation(steps)
    assert run(variables, data_dir, *up_to_training(steps)) == []


def up_to_training(steps):
    """Options for a run: what follows a training is the same for all, and is shown where it is deleted."""
    return ["--until", "train"] if "trained_model" in steps else []


def before_evaluation(steps):
    return steps[: steps.index("trained_model") + 1] if "trained_model" in steps else steps


def test_corrections_redo_the_inspection_and_what_follows(cnn):
    variables, data_dir = cnn
    (data_dir / "corrections.csv").write_text("key,label\nanise/0.png,exclude\n")
    until = ["--until", "train"]
    assert run(variables, data_dir, *until) == [*DATA[1:], *RECORDS, "trained_model"]
    assert run(variables, data_dir, *until) == []
    (data_dir / "corrections.csv").unlink()
    assert run(variables, data_dir, "--until", "split") == DATA[1:]


def test_only_stored_features_give_likely_wrong_labels(finished_cnn, finished_frozen):
    assert not (finished_cnn[1] / "evaluation" / "label_suspects.csv").exists()
    data_dir = finished_frozen[1]
    keys = {row["key"] for row in csv.DictReader((data_dir / "evaluation" / "label_suspects.csv").open())}
    assert keys <= {path.relative_to(data_dir / "raw").as_posix() for path in (data_dir / "raw").glob("*/*")}


def test_with_stored_features_training_parameters_redo_neither_them_nor_the_records(frozen, tmp_path):
    variables, data_dir = frozen
    until = ["--until", "train"]
    assert run(variables | {"LEARNING_RATE": 0.02}, data_dir, *until) == ["trained_model"]
    assert run(variables | {"LEARNING_RATE": 0.02, "NUM_SHARDS": 3}, data_dir, *until) == [
        *RECORDS,
        *FEATURES,
        "trained_model",
    ]


def test_stored_features_are_not_augmented_and_a_training_on_them_does_not_run_again(frozen):
    variables, data_dir = frozen
    assert run(variables | {"AUGMENTATION": "strong"}, data_dir) == []


def test_fine_tuning_trains_again_and_is_evaluated_on_the_records(frozen, monkeypatch):
    from dgmd_pipeline.evaluation import predictions
    from dgmd_pipeline.training import dataset, fine_tuning, networks

    monkeypatch.setattr(fine_tuning, "MIN_HELD_OUT", 1)  # there are 19 training images
    variables, data_dir = frozen
    tuned = variables | {"FINE_TUNE": "top", "FINE_TUNE_EPOCHS": 2, "FINE_TUNE_LEARNING_RATE": 0.001}
    assert run(tuned, data_dir, "--until", "evaluate") == ["trained_model", "evaluation"]
    assert run(tuned, data_dir, "--until", "evaluate") == []
    about = json.loads((data_dir / "trained_model" / "training.json").read_text())
    assert about["fine_tuned"] == about["fine_tuning"]["kept"] is True
    whole = networks.load(data_dir / "trained_model" / "model.keras")
    expected = np.concatenate([*predictions.predict(whole, dataset.read(data_dir / "tfrecord_validation"))])
    with np.load(data_dir / "evaluation" / predictions.PREDICTIONS) as found:
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
    assert "Fine-tuning was kept" in (data_dir / "evaluation" / "report.html").read_text()


def test_other_weights_of_the_backbone_redo_the_features_wherever_their_file_lies(frozen, tmp_path):
    from dgmd_pipeline.training import networks

    variables, data_dir = frozen
    weights = tmp_path / "one.weights.h5"
    networks.build_backbone("MobileNetV3-Small", "none", 32, 32, tmp_path).save_weights(weights)
    until = ["--until", "train"]
    assert run(variables | {"BACKBONE_WEIGHTS": weights}, data_dir, *until) == [*FEATURES, "trained_model"]
    elsewhere = weights.rename(tmp_path / "other.weights.h5")
    assert run(variables | {"BACKBONE_WEIGHTS": elsewhere}, data_dir, *until) == []


@pytest.mark.parametrize("folder", [*DATA, *RECORDS, *FEATURES])
def test_a_deleted_folder_is_rebuilt_and_what_comes_out_the_same_trains_nothing(folder, frozen):
    variables, data_dir = frozen
    shutil.rmtree(data_dir / folder)
    assert run(variables, data_dir) == [folder]


def test_all_data_folders_deleted_are_rebuilt_and_train_nothing(frozen):
    variables, data_dir = frozen
    for folder in [*DATA, *RECORDS, *FEATURES]:
        shutil.rmtree(data_dir / folder)
    assert run(variables, data_dir) == [*DATA, *RECORDS, *FEATURES]


@pytest.mark.parametrize(
    ("folder", "steps", "newer"),
    [("trained_model", LEARNED, True), ("evaluation", ["evaluation"], False),
     ("registered_model", ["registered_model"], False)],
)  # fmt: skip
def test_a_deleted_model_is_trained_and_registered_anew_its_evaluation_and_its_note_are_only_made_again(
    folder, steps, newer, cnn
):
    variables, data_dir = cnn
    before = version(data_dir)
    shutil.rmtree(data_dir / folder)
    assert run(variables, data_dir) == steps
    assert (version(data_dir) > before) == newer
    assert (version(data_dir) == before) != newer


def test_going_back_to_earlier_settings_is_a_rerun(cnn):
    variables, data_dir = cnn
    before = version(data_dir)
    assert run(variables | {"LEARNING_RATE": 0.03}, data_dir, "--until", "train") == ["trained_model"]
    assert run(variables | {"LEARNING_RATE": 0.01}, data_dir) == LEARNED
    assert version(data_dir) > before


def test_going_back_to_an_earlier_name_notes_the_version_that_is_there(cnn):
    variables, data_dir = cnn
    assert run(variables | {"MODEL_NAME": "renamed"}, data_dir) == ["evaluation", "registered_model"]
    before = version(data_dir)
    assert run(variables, data_dir) == ["evaluation", "registered_model"]
    assert (before, version(data_dir)) == (1, 1)


@pytest.mark.parametrize(
    ("task", "steps"),
    [
        (data.DownloadImages, ["raw"]),  # the same pictures come
        (data.InspectImages, [*DATA[1:], *RECORDS, *LEARNED]),
        (data.MapLabels, ["label_map"]),
        (data.BalanceClasses, ["balanced", "split", *RECORDS, *LEARNED]),
        (data.SplitImages, ["split", *RECORDS, *LEARNED]),
        (data.WriteTFRecords, [*RECORDS, *LEARNED]),
        (model.TrainModel, LEARNED),
        (model.EvaluateModel, ["evaluation", "registered_model"]),
        (model.RegisterModel, ["registered_model"]),
    ],
)
def test_a_raised_format_redoes_its_step(task, steps, cnn, monkeypatch):
    variables, data_dir = cnn
    monkeypatch.setattr(task, "format_version", task.format_version + 1)
    assert run(variables, data_dir, *up_to_training(steps)) == before_evaluation(steps)


def test_a_raised_format_of_the_features_redoes_them_and_what_follows(frozen, monkeypatch):
    variables, data_dir = frozen
    task = training_inputs.ExtractFeatures
    monkeypatch.setattr(task, "format_version", task.format_version + 1)
    assert run(variables, data_dir, "--until", "train") == [*FEATURES, "trained_model"]
