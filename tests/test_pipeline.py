"""The real command in processes, against a real S3 endpoint and a real MLflow server."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import CREDENTIALS, environment_with, picture, run_pipeline
from support.pipeline import LABELS, STEPS, client_of, folders, redone, times_of

from dgmd_pipeline.settings import Settings, variable
from dgmd_pipeline.training import feature_store, networks


def test_a_bucket_becomes_a_registered_model(finished):
    data_dir, variables, result = finished
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in data_dir.iterdir() if path.name[0] != ".") == sorted([*STEPS, "status.json"])
    assert not [path for path in data_dir.iterdir() if path.name.startswith((".draft", ".old"))]
    version = client_of(variables).get_model_version_by_alias("finished", "candidate")
    assert int(version.version) == 1
    assert version.tags["environment"] == "non-production"
    assert version.current_stage == "None"


def test_the_run_says_what_it_will_do_and_what_each_step_came_to(finished):
    lines = finished[2].stdout.splitlines()
    for step in STEPS:
        assert any(re.search(rf"  {step} +run .* folder is missing$", line) for line in lines), step
        assert any(f" {step:20} " in line and line.rstrip().endswith(" s)") for line in lines), step
    text = finished[2].stdout
    assert "labels with fewer than 2 usable images, left out: nutmeg" in text
    assert "24 training, 6 validation" in text
    assert "luigi" not in text.lower()
    assert finished[2].stderr == ""  # nothing of TensorFlow and absl either


def test_the_run_ends_with_a_table_of_where_the_time_went(finished):
    data_dir, _, result = finished
    text, _, ending = result.stdout.partition("Where the time went\n")[2].partition(" Slowest: ")
    head, *table, _ = text.splitlines()
    slowest = f" Slowest: {ending.splitlines()[0]}"
    assert head.endswith("  step                  seconds   img/s     MB/s share")
    times = times_of(table)
    assert sorted(times) == sorted([*STEPS, "the rest"])  # in the order in which they ran
    assert len(times) == len(table)
    assert sum(share for _, share in times.values()) == 100
    records = {step: json.loads((data_dir / step / "_SUCCESS").read_text()) for step in STEPS}
    assert all(times[step][0] == pytest.approx(records[step]["seconds"], abs=0.051) for step in STEPS)
    longest = max(records.values(), key=lambda record: record["seconds"])["step"]
    assert re.search(rf" Slowest: {longest}, [\d.]+ s of [\d.]+ s \(\d+ %\)", slowest)
    assert max(map(len, table)) <= 80


def test_a_record_says_how_many_images_and_bytes_went_through_the_step(finished):
    data_dir, _, _ = finished
    records = {step: json.loads((data_dir / step / "_SUCCESS").read_text()) for step in STEPS}
    pictures = sum(path.stat().st_size for path in (data_dir / "raw").glob("*/*"))
    shards = {step: sum(path.stat().st_size for path in (data_dir / step).glob("*.tfrecord")) for step in STEPS}
    assert {step: (record["worked"], record["volume"]) for step, record in records.items()} == {
        "raw": (33, pictures),
        "inspected": (33, pictures),
        "label_map": (31, None),
        "balanced": (30, None),
        "split": (30, None),
        "tfrecord_training": (24, shards["tfrecord_training"]),
        "tfrecord_validation": (6, shards["tfrecord_validation"]),
        "trained_model": (24 * records["trained_model"]["counts"]["epochs"], None),
        "evaluation": (6, None),
        "registered_model": (None, None),
    }


def test_bad_input_is_reported_and_stays_out(finished):
    data_dir, _, result = finished
    rejected = (data_dir / "inspected" / "rejected.csv").read_text()
    for name in ("cloves/broken.jpeg", "cloves/copy of 1.png", "cloves/../../outside.png", "readme.txt"):
        assert name in rejected
    assert not (data_dir.parent / "outside.png").exists()
    assert "1 unsafe name" in result.stdout
    for step, what in (("raw", "objects"), ("inspected", "files")):  # the warning says it, the summary does not
        assert f"{what} left out: " in result.stdout
        (summary,) = re.findall(rf" {step} +\S.* s\)$", result.stdout, re.MULTILINE)
        assert "left out" not in summary
    assert "anise" not in rejected


def test_the_mlflow_run_tells_everything(finished):
    data_dir, variables, _ = finished
    client = client_of(variables)
    version = client.get_model_version("finished", "1")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["EPOCHS"] == "2"
    assert run.data.params["SEED"] == "1"
    assert run.data.params["AWS_DATA_PATH"] == "train/images"
    of_a_deployment = {"DATA_DIR", "KERAS_HOME", "GIT_REVISION", "REFRESH", "SCHEDULE", "TZ", "NOTIFY_URL"}
    of_a_deployment |= {"LUIGI_SCHEDULER_URL", "LUIGI_CONFIG_PATH", "HEALTH_MAX_AGE", "NOTIFY_ON"}
    of_a_deployment |= {"DASK_SCHEDULER_ADDRESS"}
    of_a_promotion = {"MAX_CLASS_DROP", "MAX_LATENCY_RATIO", "ALLOW_LOST_LABELS", "PROMOTE_IF_BETTER"}
    of_a_frozen_network = {"HEAD", "FINE_TUNE", "FINE_TUNE_EPOCHS", "FINE_TUNE_LEARNING_RATE"}
    expected = set(map(variable, Settings.model_fields)) - of_a_deployment - of_a_promotion - of_a_frozen_network
    recorded = [json.loads((data_dir / step / "_SUCCESS").read_text())["settings"] for step in STEPS]
    unset = {variable(name) for each in recorded for name, value in each.items() if value is None}
    assert "BALANCE_LIMIT" in unset
    assert set(run.data.params) == expected - unset
    assert run.info.run_name.startswith("finished 20")
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    assert client.get_registered_model("finished").description
    assert run.data.tags["dgmd.version"] == version.tags["dgmd.version"]
    training = json.loads((data_dir / "trained_model" / "training.json").read_text())
    assert version.tags["dgmd.training_id"] == run.data.tags["dgmd.training_id"] == training["id"]
    assert run.inputs.dataset_inputs[0].dataset.name == "s3://finished/train/images"
    for metric in ("accuracy", "loss", "val_accuracy", "val_loss"):
        history = sorted(client.get_metric_history(version.run_id, metric), key=lambda point: point.step)
        assert len(history) >= 2
        assert history[-1].value == pytest.approx(training["metrics"][metric])
    measured = json.loads((data_dir / "evaluation" / "metrics.json").read_text())
    assert run.data.metrics["validation_accuracy"] == measured["accuracy"]
    assert run.data.metrics["validation_served_images"] == measured["images"]
    assert run.data.metrics["validation_served_other_labels"] == 0
    assert run.data.metrics["validation_served_largest_difference"] < 0.01
    assert run.data.metrics["system/data/images_training"] == 24
    charts = sorted(name for name in run.data.metrics if not name.startswith("system/"))
    assert charts[:5] == ["accuracy", "learning_rate", "loss", "val_accuracy", "val_loss"]
    assert all(name.startswith("validation_") for name in charts[5:])
    assert not [value for value in run.data.params.values() if value == "None"]
    assert {*version.tags} == {"accuracy", "verdict", "environment", *(f"dgmd.{name}" for name in (
        "measured", "version", "git_revision", "training_id"))}  # fmt: skip
    records = {step: json.loads((data_dir / step / "_SUCCESS").read_text()) for step in STEPS[:-1]}
    for step, record in records.items():
        assert run.data.metrics[f"system/step_seconds/{step}"] == record["seconds"]
    speed = records["tfrecord_training"]["worked"] / records["tfrecord_training"]["seconds"]
    assert run.data.metrics["system/step_images_per_second/tfrecord_training"] == pytest.approx(speed)
    assert run.data.metrics["system/step_megabytes_per_second/raw"] > 0
    shares = [value for name, value in run.data.metrics.items() if name.startswith("system/step_share/")]
    assert len(shares) == len(records)
    assert sum(shares) == pytest.approx(1)
    assert run.data.metrics["system/step_seconds/registered_model"] > 0
    artifacts = {item.path for item in client.list_artifacts(version.run_id)}
    assert {"mapping.json", "evaluation", "split", "inspected"} <= artifacts


def test_no_secret_in_output_records_or_mlflow(finished):
    data_dir, variables, result = finished
    secrets = ("pa55word", CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
    client = client_of(variables)
    run = client.get_run(client.get_model_version("finished", "1").run_id)
    texts = [result.stdout, result.stderr, str(run.to_dictionary()), str(client.get_model_version("finished", "1"))]
    texts += [path.read_text() for path in data_dir.rglob("_SUCCESS")]
    assert not [text for text in texts for secret in secrets if secret in text]


def test_the_registered_model_is_all_that_a_consumer_needs(finished, tmp_path):
    _, variables, _ = finished
    pictures = [picture(label, 100 + number, side) for label in LABELS for number, side in ((1, 24), (2, 37))]
    for number, content in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(content)
    code = """
import json, sys
import mlflow, numpy as np
from PIL import Image
model = mlflow.pyfunc.load_model("models:/finished@candidate")
version = mlflow.MlflowClient().get_model_version_by_alias("finished", "candidate")
run_mapping = json.load(open(mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path="mapping.json")))
own_mapping = json.load(open(mlflow.artifacts.download_artifacts("models:/finished/1/mapping.json")))
assert run_mapping == own_mapping
assert model.metadata.metadata["labels"] == list(run_mapping.values())
sums, shapes = [], []
for number in range(6):
    p = model.predict(np.asarray(Image.open(f"{number}.png"))[np.newaxis])
    sums.append(float(p.sum())), shapes.append(p.shape)
try:
    model.predict(np.zeros((1, 24, 24, 3), np.float32))
    refused = False
except mlflow.exceptions.MlflowException:
    refused = True
assert "dgmd_pipeline" not in sys.modules
json.dump({"mapping": run_mapping, "sums": sums, "shapes": shapes, "refused": refused}, open("said.json", "w"))
"""
    uri = {"MLFLOW_TRACKING_URI": variables["MLFLOW_TRACKING_URI"].replace("me:pa55word@", "")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **uri}, check=True, timeout=120)
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["mapping"] == {str(index): label for index, label in enumerate(LABELS)}
    assert said["sums"] == pytest.approx([1.0] * 6, abs=1e-5)
    assert said["shapes"] == [[1, 3]] * 6
    assert said["refused"]


def test_a_second_run_does_nothing_and_imports_nothing_heavy(data, tmp_path):
    data_dir, variables = data
    before = folders(data_dir)
    code = """
import sys
from dgmd_pipeline.cli import main
assert main([]) == 0
heavy = {"tensorflow", "keras", "mlflow", "sklearn", "boto3", "PIL", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = environment_with(variables)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Nothing to do: finished version 1 is registered." in result.stdout.splitlines()[-1]
    assert "Where the time went" not in result.stdout
    assert redone(before, data_dir) == set()


@pytest.mark.slow
def test_deleting_the_trained_model_registers_a_new_version_from_the_converted_files(data, tmp_path):
    data_dir, variables = data
    before = folders(data_dir)
    shutil.rmtree(data_dir / "trained_model")
    variables |= {"MODEL_NAME": "finished", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # no S3 any more
    result = run_pipeline(tmp_path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert redone(before, data_dir) == {"trained_model", "evaluation", "registered_model"}
    assert json.loads((data_dir / "registered_model" / "_SUCCESS").read_text())["counts"]["version"] == 2
    client = client_of(variables)
    assert int(client.get_model_version_by_alias("finished", "candidate").version) == 2
    assert client.get_model_version("finished", "1").aliases == []


@pytest.mark.slow
def test_a_frozen_backbone_goes_through_stored_features(data, tmp_path):
    data_dir, variables = data
    weights = tmp_path / "mobile.weights.h5"
    networks.build_backbone("MobileNetV3-Small", "none", 32, 32, tmp_path).save_weights(weights)
    variables |= {"BACKBONE": "MobileNetV3-Small", "IMAGE_WIDTH": 32, "IMAGE_HEIGHT": 32, "MODEL_NAME": "frozen"}
    variables["BACKBONE_WEIGHTS"] = weights
    result = run_pipeline(tmp_path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert feature_store.load(data_dir / "features_training").vectors.shape == (24, 576)
    measured = json.loads((data_dir / "evaluation" / "metrics.json").read_text())
    rows = (data_dir / "evaluation" / "leaks.csv").read_text().splitlines()[1:]
    assert measured["leaks"] == len(rows) < measured["images"]
    assert 0 <= measured["accuracy_without_leaks"] <= 1
