"""The real command in processes, against a real S3 endpoint and a real MLflow server."""

import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import COMMAND, CREDENTIALS, environment_with, picture, run_in_own_mounts, run_pipeline
from PIL import Image
from support.pipeline import LABELS, TINY, client_of, fill, on_a_terminal

from dgmd_pipeline.settings import Settings, variable

STEPS = [
    "raw", "inspected", "label_map", "balanced", "split", "tfrecord_training", "tfrecord_validation",
    "trained_model", "evaluation", "registered_model",
]  # fmt: skip


def folders(data_dir):
    """What tells whether a step was done again."""
    return {step: (data_dir / step / "_SUCCESS").stat().st_mtime_ns for step in STEPS}


def redone(before, data_dir):
    return {step for step, inode in folders(data_dir).items() if before[step] != inode}


@pytest.fixture(scope="module")
def finished(s3_endpoint, mlflow_server, tmp_path_factory):
    """A finished run, not to be changed: its folder, variables and result."""
    import boto3

    folder = tmp_path_factory.mktemp("finished")
    variables = {
        **TINY,
        **CREDENTIALS,
        "DATA_DIR": folder / "data",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DATA_BUCKET": "finished",
        "AWS_DATA_PATH": "train/images",
        "MODEL_NAME": "finished",
        "MLFLOW_TRACKING_URI": mlflow_server.replace("//", "//me:pa55word@"),
    }
    client = boto3.client("s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    client.create_bucket(Bucket="finished")
    fill(client, "finished")
    put = {
        "cloves/broken.jpeg": picture("cloves", 0)[:100],
        "cloves/copy of 1.png": picture("cloves", 1),
        "cloves/../../outside.png": picture("cloves", 99),
        "readme.txt": b"no label",
        "nutmeg/lonely.png": picture("nutmeg", 1),
    }
    for name, content in put.items():
        client.put_object(Bucket="finished", Key=f"train/images/{name}", Body=content)
    client.put_object(Bucket="finished", Key="train/images-old/anise/old.png", Body=picture("anise", 1))
    return folder / "data", variables, run_pipeline(folder, **variables)


@pytest.fixture
def data(finished, tmp_path):
    """A copy of the finished run's folder, to be changed."""
    original, variables, _ = finished
    shutil.copytree(original, tmp_path / "data")
    return tmp_path / "data", {**variables, "DATA_DIR": tmp_path / "data"}


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
    assert "luigi" not in (text + finished[2].stderr).lower()


TIMES = re.compile(r"  (\w+|the rest) +([\d,.]+) +(?:([\d,.]+) +)?(?:([\d,.]+) +)?(\d+) %$")


def times_of(lines):
    """The rows of the table of times as `{name: (seconds, share)}`."""
    found = [match.groups() for line in lines if (match := TIMES.search(line))]
    return {name: (float(seconds.replace(",", "")), int(share)) for name, seconds, _, _, share in found}


def test_the_run_ends_with_a_table_of_where_the_time_went(finished):
    data_dir, _, result = finished
    head, *table, slowest = result.stdout.partition("Where the time went\n")[2].splitlines()
    assert head.endswith("  step                  seconds   images/s     MB/s  share")
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
    of_a_promotion = {"MAX_CLASS_DROP", "MAX_LATENCY_RATIO"}
    of_a_frozen_network = {"HEAD", "FINE_TUNE", "FINE_TUNE_EPOCHS", "FINE_TUNE_LEARNING_RATE"}
    expected = set(map(variable, Settings.model_fields)) - of_a_deployment - of_a_promotion - of_a_frozen_network
    assert set(run.data.params) == expected
    assert run.data.tags["dgmd.version"] == version.tags["dgmd.version"]
    training = json.loads((data_dir / "trained_model" / "training.json").read_text())
    assert version.tags["dgmd.training_id"] == run.data.tags["dgmd.training_id"] == training["id"]
    assert run.inputs.dataset_inputs[0].dataset.name == "s3://finished/train/images"
    for metric in ("accuracy", "loss", "val_accuracy", "val_loss"):
        history = sorted(client.get_metric_history(version.run_id, metric), key=lambda point: point.step)
        assert len(history) >= 2
        assert history[-1].value == pytest.approx(training["metrics"][metric])
    measured = json.loads((data_dir / "evaluation" / "metrics.json").read_text())
    assert run.data.metrics["evaluation_accuracy"] == measured["accuracy"]
    assert run.data.metrics["evaluation_served_images"] == measured["images"]
    assert run.data.metrics["evaluation_served_other_labels"] == 0
    assert run.data.metrics["evaluation_served_largest_difference"] < 0.01
    records = {step: json.loads((data_dir / step / "_SUCCESS").read_text()) for step in STEPS[:-1]}
    for step, record in records.items():
        assert run.data.metrics[f"step_seconds/{step}"] == record["seconds"]
    speed = records["tfrecord_training"]["worked"] / records["tfrecord_training"]["seconds"]
    assert run.data.metrics["step_images_per_second/tfrecord_training"] == pytest.approx(speed)
    assert run.data.metrics["step_megabytes_per_second/raw"] > 0
    shares = [value for name, value in run.data.metrics.items() if name.startswith("step_share/")]
    assert len(shares) == len(records)
    assert sum(shares) == pytest.approx(1)
    assert run.data.metrics["step_seconds/registered_model"] > 0
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
def test_without_mlflow_the_training_is_kept_and_the_next_run_only_registers(data, tmp_path):
    data_dir, variables = data
    before = folders(data_dir)
    shutil.rmtree(data_dir / "trained_model")
    away = {"MLFLOW_TRACKING_URI": "http://me:pa55word@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1}
    result = run_pipeline(tmp_path, **{**variables, **away})
    assert result.returncode == 30, result.stdout + result.stderr
    assert "warning: The MLflow server at http://127.0.0.1:9 cannot be reached" in result.stdout
    assert "The training is kept; the next run only registers the model." in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert "pa55word" not in result.stdout + result.stderr
    trained = (data_dir / "trained_model").stat().st_ino
    variables["MODEL_NAME"] = "later"
    assert run_pipeline(tmp_path, **variables).returncode == 0
    assert redone(before, data_dir) == {"trained_model", "evaluation", "registered_model"}
    assert (data_dir / "trained_model").stat().st_ino == trained


@pytest.mark.slow
def test_a_frozen_backbone_goes_through_stored_features(data, tmp_path):
    data_dir, variables = data
    code = """
import pathlib, sys
from dgmd_pipeline import model
model.build_backbone("MobileNetV3-Small", "none", 32, 32, pathlib.Path()).save_weights(sys.argv[1])
"""
    weights = tmp_path / "mobile.weights.h5"
    subprocess.run([sys.executable, "-c", code, weights], check=True, capture_output=True)
    variables |= {"BACKBONE": "MobileNetV3-Small", "IMAGE_WIDTH": 32, "IMAGE_HEIGHT": 32, "MODEL_NAME": "frozen"}
    variables["BACKBONE_WEIGHTS"] = weights
    result = run_pipeline(tmp_path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert np.load(data_dir / "features_training" / "features.npy").shape == (24, 576)
    measured = json.loads((data_dir / "evaluation" / "metrics.json").read_text())
    rows = (data_dir / "evaluation" / "leaks.csv").read_text().splitlines()[1:]
    assert measured["leaks"] == len(rows) < measured["images"]
    assert 0 <= measured["accuracy_without_leaks"] <= 1
    before = folders(data_dir)
    result = run_pipeline(tmp_path, "--until", "train", **{**variables, "EPOCHS": 1})
    assert result.returncode == 0, result.stdout + result.stderr
    assert redone(before, data_dir) == {"trained_model"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"AWS_DATA_BUCKET": "no-such-bucket"}, "no-such-bucket"),
        ({"AWS_DATA_PATH": "train/nothing-here"}, "train/nothing-here"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "/nowhere/credentials", "AWS_ACCESS_KEY_ID": ""}, "/nowhere/credentials"),
        ({"AWS_DATA_PATH": "train/images/allspice"}, "train/images/allspice"),
    ],
)
def test_no_usable_input_has_its_own_sentence_and_exit_code(finished, tmp_path, variables, sentence):
    variables = {**finished[1], "DATA_DIR": tmp_path / "data", **variables}
    if variables["AWS_ACCESS_KEY_ID"] == "":
        del variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]
    result = run_pipeline(tmp_path, **variables)
    assert result.returncode == 20, result.stdout + result.stderr
    assert sentence in result.stdout.splitlines()[-1]
    assert "Traceback" not in result.stdout + result.stderr
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".lock", "status.json"}


def test_one_label_is_no_usable_input(bucket, s3_endpoint, tmp_path):
    name, client = bucket
    fill(client, name, labels=["allspice"])
    variables = {**TINY, **CREDENTIALS, "AWS_ENDPOINT_URL": s3_endpoint, "AWS_DATA_BUCKET": name}
    result = run_pipeline(tmp_path, **variables, AWS_DATA_PATH="train/images")
    assert result.returncode == 20, result.stdout + result.stderr
    assert "at least two labels with 2 usable images" in result.stdout
    assert "allspice (10)" in result.stdout


def test_a_label_of_broken_files_stops_the_run_by_name(bucket, s3_endpoint, tmp_path):
    name, client = bucket
    fill(client, name)
    for number in range(12):
        client.put_object(Bucket=name, Key=f"train/images/cloves/page{number}.jpeg", Body=b"<html>%d</html>" % number)
    variables = {**TINY, **CREDENTIALS, "AWS_ENDPOINT_URL": s3_endpoint, "AWS_DATA_BUCKET": name}
    result = run_pipeline(tmp_path, **variables, AWS_DATA_PATH="train/images")
    assert result.returncode == 20, result.stdout + result.stderr
    assert "cloves (12 of 22 files)" in result.stdout
    assert (tmp_path / "data" / "inspected" / "rejected.csv").read_text().count("cloves/page") == 12


def test_wrong_settings_are_answered_at_once_and_together(tmp_path):
    code = """
import sys
from dgmd_pipeline.cli import main
assert main([]) == 2
heavy = {"tensorflow", "keras", "mlflow", "sklearn", "boto3", "PIL", "numpy", "luigi"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, "VALIDATION_PCNT": "20", "EPOCHS": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "did you mean 0.2?" in result.stdout
    assert "EPOCHS=0: expected a whole number of at least 1." in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_at_the_same_time_exits_with_its_own_code(tmp_path):
    (tmp_path / "data").mkdir()
    code = "import sys, pathlib; from dgmd_pipeline import folders\n" \
        "with folders.lock(pathlib.Path('data')): print(flush=True); sys.stdin.read()"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    result = run_pipeline(tmp_path)
    holder.communicate()
    assert result.returncode == 10
    assert f"in use by another run: process {holder.pid} on" in result.stdout


def test_an_old_mlflow_server_stops_the_run_before_the_first_step(tmp_path):
    class Old(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"2.22.1")

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    result = run_pipeline(tmp_path, MLFLOW_TRACKING_URI=uri, BACKBONE="cnn")
    server.shutdown()
    server.server_close()
    assert result.returncode == 30, result.stdout + result.stderr
    assert "is version 2.22.1" in result.stdout
    assert "upgrade the server" in result.stdout
    assert not (tmp_path / "data" / "raw").exists()


def test_weights_that_cannot_be_fetched_stop_the_run_before_the_first_step(tmp_path):
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "KERAS_HOME": tmp_path / "keras"}
    result = run_pipeline(tmp_path, **nowhere)
    assert result.returncode == 30, result.stdout + result.stderr
    assert "The ImageNet weights of EfficientNetV2-B1 are not in" in result.stdout.splitlines()[-1]
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "data" / "raw").exists()


@pytest.mark.parametrize(
    ("after", "sent"),
    [
        (" raw                  ...", signal.SIGTERM),
        (" inspected            ...", signal.SIGINT),
        (" trained_model        ...", signal.SIGTERM),
        (" epoch 1/500", signal.SIGINT),
        (" epoch 1/500", signal.SIGTERM),
    ],
)
@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_nothing_half_made_and_the_next_one_ends_well(finished, tmp_path, after, sent):
    variables = {**finished[1], "DATA_DIR": tmp_path / "data", "MODEL_NAME": "stopped"}
    process = run_pipeline(tmp_path, start=True, **{**variables, "EPOCHS": 500, "PATIENCE": 500})
    for line in process.stdout:
        if after in line:
            break
    time.sleep(0.3)
    process.send_signal(sent)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent], output
    assert "the same command goes on from there" in output
    left = [path.name for path in (tmp_path / "data").iterdir() if path.name.startswith((".draft", ".old"))]
    assert set(left) <= ({".draft-raw"} if "raw" in after else {".draft-trained_model"} if "epoch" in after else set())
    result = run_pipeline(tmp_path, "--until", "train", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted([".lock", "status.json", *STEPS[:8]])
    for step in STEPS[:7]:
        for path in (finished[0] / step).rglob("*"):
            if path.is_file() and path.name != "_SUCCESS":
                again = tmp_path / "data" / path.relative_to(finished[0])
                assert again.read_bytes() == path.read_bytes(), path


def test_pictures_put_there_by_hand_are_used_as_they_are(tmp_path):
    for label in LABELS[:2]:
        folder = tmp_path / "data" / "raw" / label / "below"
        folder.mkdir(parents=True)
        for number in range(6):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(picture(label, number))).save(buffer, "BMP")
            (folder / f"{number}.bmp").write_bytes(buffer.getvalue())
    (tmp_path / "data" / "raw" / "loose.png").write_bytes(picture("loose", 1))
    variables = {**TINY, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    result = run_pipeline(tmp_path, "--until", "label", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "put there by hand: used as it is" in result.stdout
    assert "loose.png,,no label," in (tmp_path / "data" / "inspected" / "rejected.csv").read_text()
    result = run_pipeline(tmp_path, "--until", "label", **variables)
    assert "Nothing to do" in result.stdout
    (tmp_path / "data" / "raw" / LABELS[0] / "new.png").write_bytes(picture(LABELS[0], 50))
    result = run_pipeline(tmp_path, "plan", **variables)
    assert re.search(r"  inspected +run .* raw changes$", result.stdout, re.MULTILINE)


def plan_of(folder, *arguments, **variables):
    """The plan as `{step: (state, why)}`."""
    result = run_pipeline(folder, "plan", "--json", *arguments, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return {step["step"]: (step["state"], step["reason"]) for step in json.loads(result.stdout)["steps"]}


def test_a_plan_is_json_for_machines(data, tmp_path):
    data_dir, variables = data
    (data_dir / "balanced").rename(tmp_path / "away")
    result = run_pipeline(tmp_path, "plan", "--json", **{**variables, "VALIDATION_PCNT": 0.25})
    plan = json.loads(result.stdout)
    assert plan["data_dir"] == str(data_dir)
    rows = {step["step"]: step for step in plan["steps"]}
    assert list(rows) == STEPS
    states = {name: (row["state"], row["reason"]) for name, row in rows.items()}
    assert states["inspected"] == ("done", "")
    assert states["balanced"] == ("run", "folder is missing")
    assert states["split"] == ("run", "VALIDATION_PCNT 0.2 -> 0.25")
    assert states["tfrecord_training"] == ("run", "split changes")
    images = {name: row["images"] for name, row in rows.items()}
    assert images["raw"] == 33
    assert images["inspected"] == images["balanced"] == 31
    assert (images["tfrecord_training"], images["tfrecord_validation"]) == (24, 6)
    size = sum(path.stat().st_size for path in (data_dir / "raw").rglob("*") if path.is_file())
    assert rows["raw"]["bytes"] == size - (data_dir / "raw" / "_SUCCESS").stat().st_size
    assert rows["balanced"]["bytes"] is None


def test_a_plan_fits_a_terminal(data, tmp_path):
    data_dir, variables = data
    (data_dir / "split").rename(tmp_path / "away")
    lines = on_a_terminal(tmp_path, "plan", **variables)
    assert max(map(len, lines[1:])) <= 80  # the first one names the folder, however long that is
    rows = "\n".join(lines)
    assert re.search(r"^  inspected +done +31 +\d+\.\d kB$", rows, re.MULTILINE), rows
    assert re.search(r"^  registered_model +maybe +\d+ B  only if split changes$", rows, re.MULTILINE), rows


@pytest.mark.parametrize("command", [["--force"], ["plan", "--until"], ["run", "--force"]])
def test_an_unknown_step_is_answered_with_the_known_ones(data, tmp_path, command):
    data_dir, variables = data
    before = folders(data_dir)
    result = run_pipeline(tmp_path, *command, "tain", **variables)
    assert result.returncode == 2, result.stdout
    assert "'tain' is no step of this run" in result.stdout
    for name in ("download (raw)", "convert (tfrecord_training, tfrecord_validation)", "train (trained_model)"):
        assert name in result.stdout
    assert redone(before, data_dir) == set()


def test_until_stops_early_and_force_does_a_step_and_all_after_it_again(data, tmp_path):
    data_dir, variables = data
    variables["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"  # not asked
    before = folders(data_dir)
    result = run_pipeline(tmp_path, "--force", "inspect", "--until", "split", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert redone(before, data_dir) == {"inspected", "label_map", "balanced", "split"}
    assert "MLflow" not in result.stdout
    assert [*times_of(result.stdout.splitlines())] == ["inspected", "label_map", "balanced", "split", "the rest"]
    result = run_pipeline(tmp_path, "run", "--until", "convert", **variables)
    assert "Nothing to do: tfrecord_validation is done." in result.stdout
    result = run_pipeline(tmp_path, "--force", "train", "--until", "split", **variables)
    assert result.returncode == 2
    assert "'train' is no step of this run" in result.stdout


@pytest.mark.slow
def test_forced_registration_notes_the_version_that_is_there(data, tmp_path):
    data_dir, variables = data
    before = folders(data_dir)
    result = run_pipeline(tmp_path, "--force", "register", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "finished version 1, was registered already" in result.stdout
    assert redone(before, data_dir) == {"registered_model"}


@pytest.fixture
def live(bucket, s3_endpoint, tmp_path, finished, mlflow_server):
    """A bucket of one's own with 3 x 10 pictures, and the variables for runs on it."""
    name, client = bucket
    fill(client, name)
    variables = {
        **TINY,
        **CREDENTIALS,
        "DATA_DIR": tmp_path / "data",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DATA_BUCKET": name,
        "AWS_DATA_PATH": "train/images",
        "MLFLOW_TRACKING_URI": mlflow_server,
        "MODEL_NAME": name,
    }
    return name, client, variables


def test_a_refresh_takes_over_what_is_new_changed_or_gone_and_nothing_else(live, tmp_path):
    name, client, variables = live
    raw = tmp_path / "data" / "raw"
    assert run_pipeline(tmp_path, "--until", "label", **variables).returncode == 0
    before = {path: path.stat().st_ino for path in raw.rglob("*.jpeg")}
    assert plan_of(tmp_path, "--until", "label", **variables)["raw"] == ("done", "")

    result = run_pipeline(tmp_path, "--until", "label", "--refresh", **variables)
    assert result.returncode == 0
    assert f"Nothing new in s3://{name}/train/images." in result.stdout

    prefix = "train/images"
    for number in range(12):
        client.put_object(Bucket=name, Key=f"{prefix}/anise/{number}.png", Body=picture("anise", number))
    client.put_object(Bucket=name, Key=f"{prefix}/cloves/cloves shop_3.jpeg", Body=picture("cloves", 333))
    for number in (4, 5, 6):
        client.delete_object(Bucket=name, Key=f"{prefix}/cloves/cloves shop_{number}.jpeg")
    variables["REFRESH"] = "true"
    plan = plan_of(tmp_path, **variables)
    assert plan["raw"] == ("run", "12 new, 1 changed, 3 gone")
    assert plan["inspected"] == ("run", "raw changes")
    result = run_pipeline(tmp_path, "--until", "label", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "26 of 39 objects are there already" in result.stdout
    assert json.loads((raw / "_SUCCESS").read_text())["worked"] == 13  # those that were fetched
    after = {path: path.stat().st_ino for path in raw.rglob("*.*") if path.parent != raw}
    assert len(after) == 39
    kept = {path for path in after if before.get(path) == after[path]}
    assert len(kept) == 26
    assert (raw / "cloves" / "cloves shop_3.jpeg").read_bytes() == picture("cloves", 333)
    mapping = json.loads((tmp_path / "data" / "label_map" / "mapping.json").read_text())
    assert mapping == {"0": "allspice", "1": "black pepper", "2": "cloves", "3": "anise"}  # appended, not sorted in
    assert plan_of(tmp_path, "--until", "label", **variables)["raw"] == ("done", "")


def test_an_object_that_was_left_out_is_tried_again_by_a_refresh_and_changes_nothing_if_it_still_cannot_be_had(
    live, tmp_path
):
    name, client, variables = live
    key = "train/images/cloves/frozen.jpeg"
    client.put_object(Bucket=name, Key=key, Body=picture("cloves", 70), StorageClass="GLACIER")
    assert run_pipeline(tmp_path, "--until", "inspect", **variables).returncode == 0
    assert "archived" in (tmp_path / "data" / "raw" / "rejected.csv").read_text()
    before = (tmp_path / "data" / "inspected" / "_SUCCESS").stat().st_mtime_ns
    variables["REFRESH"] = "true"
    plan = plan_of(tmp_path, "--until", "inspect", **variables)
    assert plan == {"raw": ("run", "1 left out before"), "inspected": ("maybe", "only if raw changes")}
    result = run_pipeline(tmp_path, "--until", "inspect", **variables)
    assert f"Nothing new in s3://{name}/train/images." in result.stdout
    assert [*times_of(result.stdout.splitlines())] == ["raw", "the rest"]  # and not what was unchanged
    assert (tmp_path / "data" / "inspected" / "_SUCCESS").stat().st_mtime_ns == before
    assert run_pipeline(tmp_path, "--until", "label", **variables).returncode == 0
    client.put_object(Bucket=name, Key="train/images/cloves/broken.jpeg", Body=b"<html>")
    result = run_pipeline(tmp_path, "--until", "label", **variables)
    assert "Nothing new" not in result.stdout  # there was; it could not be read
    client.restore_object(Bucket=name, Key=key, RestoreRequest={"Days": 1})
    assert run_pipeline(tmp_path, "--until", "inspect", **variables).returncode == 0
    assert (tmp_path / "data" / "raw" / "cloves" / "frozen.jpeg").read_bytes() == picture("cloves", 70)
    assert plan_of(tmp_path, "--until", "inspect", **variables)["raw"] == ("done", "")


def test_a_refresh_without_news_keeps_the_version(data, tmp_path):
    data_dir, variables = data
    before = folders(data_dir)
    result = run_pipeline(tmp_path, "--refresh", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = result.stdout.splitlines()
    assert "Nothing new in s3://finished/train/images: keeping version 1." in line
    assert redone(before, data_dir) == set()


@pytest.mark.parametrize("how", [["--refresh"], ["--force", "download"]])
def test_pictures_put_there_by_hand_are_never_replaced(tmp_path, how):
    folder = tmp_path / "data" / "raw" / "label"
    folder.mkdir(parents=True)
    (folder / "own.png").write_bytes(picture("label", 1))
    for command in ([], ["plan"]):
        result = run_pipeline(tmp_path, *command, *how, BACKBONE="cnn")
        assert result.returncode == 20, result.stdout + result.stderr
        assert "was put there by hand or by an older version" in result.stdout
        assert "Traceback" not in result.stdout + result.stderr
    assert (folder / "own.png").read_bytes() == picture("label", 1)


def test_pictures_put_there_by_hand_come_from_no_bucket(tmp_path):
    for label in LABELS[:2]:
        (tmp_path / "data" / "raw" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "data" / "raw" / label / f"{number}.png").write_bytes(picture(label, number))
    assert run_pipeline(tmp_path, "--until", "label", BACKBONE="cnn").returncode == 0
    plan = plan_of(tmp_path, "--until", "label", BACKBONE="cnn", AWS_DATA_BUCKET="another")
    assert plan["label_map"] == ("done", "")


def test_a_download_that_was_killed_goes_on_and_fetches_nothing_twice(live, tmp_path):
    name, client, variables = live
    for number in range(300):
        key = f"train/images/nutmeg/{number}.png"
        client.put_object(Bucket=name, Key=key, Body=picture("nutmeg", number, 64))
    process = run_pipeline(tmp_path, "--until", "download", start=True, **variables)
    draft = tmp_path / "data" / ".draft-raw"
    while len(list(draft.glob("nutmeg/*"))) < 40:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    there = {path: path.stat().st_ino for path in draft.rglob("*.*") if ".part" not in path.parts}
    assert 40 <= len(there) < 330
    result = run_pipeline(tmp_path, "--until", "download", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    said = re.search(r"([\d,]+) of 330 objects are there already", result.stdout)
    assert int(said[1]) >= len([path for path in there if path.parent.name in (*LABELS, "nutmeg")])
    raw = tmp_path / "data" / "raw"
    assert json.loads((raw / "_SUCCESS").read_text())["worked"] == 330 - int(said[1].replace(",", ""))
    for path, inode in there.items():
        if path.parent.name in (*LABELS, "nutmeg"):
            assert (raw / path.relative_to(draft)).stat().st_ino == inode
    assert len(list(raw.glob("*/*"))) == 330
    assert not (raw / ".resume").exists()


def test_a_full_disk_is_answered_with_the_bytes_needed_and_the_next_run_goes_on(live, tmp_path):
    _, _, variables = live
    mounted = tmp_path / "disk"
    mounted.mkdir()
    variables["DATA_DIR"] = mounted / "data"
    command = f"{COMMAND} --until convert"
    script = f"""
mount -t tmpfs -o size=$1k tmpfs '{mounted}' || exit 77
{command}; echo "exit $?"
ls -A '{mounted}/data'
mount -o remount,size=$2k '{mounted}'
{command} && ls -A '{mounted}/data'
"""

    def run(size, then):
        result = run_in_own_mounts(tmp_path, script, size, then, **variables)
        assert "Traceback" not in result.stdout + result.stderr
        first, _, second = result.stdout.partition("exit 30\n")
        assert result.returncode == 0, result.stdout + result.stderr
        assert second.split()[-1] == "tfrecord_validation"
        return first, second

    said, after = run(60, 4000)
    assert re.search(r"the disk is full: raw needs 1\d\d\.\d kB, \d\d\.\d kB are free\. Make room and run again", said)
    assert after.startswith((".lock\n", ".draft-raw\n.lock\n"))
    said, after = run(200, 4000)
    assert re.search(r"the disk is full: \w+ needs (about|more than) .* free\. Make room and run again", said)
    kept = [name for name in after.partition("Plan for")[0].split() if name in STEPS]
    assert "raw" in kept
    assert all(re.search(rf"  {step} +done ", after) for step in kept)


def test_a_folder_that_is_read_only_is_answered_with_a_sentence(tmp_path):
    script = f"""
mkdir data && mount -t tmpfs -o ro tmpfs data || exit 77
{COMMAND}; echo "exit $?"
"""
    result = run_in_own_mounts(tmp_path, script)
    assert result.stdout.endswith("exit 30\n")
    assert "data/.lock: Read-only file system. DATA_DIR has to be writable: mend its mount" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_own_pictures_in_a_downloaded_folder_are_not_lost(live, tmp_path):
    name, client, variables = live
    assert run_pipeline(tmp_path, "--until", "download", **variables).returncode == 0
    own = tmp_path / "data" / "raw" / "cloves" / "own.png"
    own.write_bytes(picture("cloves", 77))
    client.put_object(Bucket=name, Key="train/images/cloves/new.png", Body=picture("cloves", 78))
    for how in (["--refresh"], ["--force", "download"]):
        result = run_pipeline(tmp_path, "--until", "download", *how, **variables)
        assert result.returncode == 20, result.stdout + result.stderr
        assert (
            "holds 1 files that were not downloaded and would be lost, the first one is cloves/own.png" in result.stdout
        )
        assert own.read_bytes() == picture("cloves", 77)
    own.unlink()
    assert run_pipeline(tmp_path, "--until", "download", "--refresh", **variables).returncode == 0


def test_a_refresh_fetches_what_somebody_deleted_from_the_folder(live, tmp_path):
    _, _, variables = live
    assert run_pipeline(tmp_path, "--until", "inspect", **variables).returncode == 0
    shutil.rmtree(tmp_path / "data" / "raw" / "cloves")
    variables["REFRESH"] = "true"
    plan = plan_of(tmp_path, "--until", "inspect", **variables)
    assert plan == {"raw": ("run", "10 lost in the folder"), "inspected": ("maybe", "only if raw changes")}
    assert run_pipeline(tmp_path, "--until", "inspect", **variables).returncode == 0
    assert len(list((tmp_path / "data" / "raw" / "cloves").iterdir())) == 10


@pytest.mark.parametrize(
    ("file", "content", "step"),
    [
        ("raw/listing.csv", None, "inspect"),
        ("inspected/images.csv", "path,label\n", "label"),
        ("label_map/mapping.json", None, "train"),
        ("balanced/images.csv", None, "split"),
        ("balanced/class_weights.json", "{", "train"),
        ("split/training.csv", "path,label,class_index,sha256,group\na,b\n", "convert"),
    ],
)
def test_a_file_that_was_deleted_or_edited_inside_a_step_folder_is_named(data, tmp_path, file, content, step):
    data_dir, variables = data
    (data_dir / file).unlink()
    if content is not None:
        (data_dir / file).write_text(content)
    result = run_pipeline(tmp_path, "--force", step, "--until", step, **variables)
    assert result.returncode == 30, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert f"{data_dir / file}: " in result.stdout
    assert f"delete the folder {data_dir / file.split('/')[0]} and run again" in result.stdout


@pytest.mark.slow
def test_a_model_file_that_was_damaged_is_named(data, tmp_path):
    data_dir, variables = data
    (data_dir / "trained_model" / "model.keras").write_bytes(b"PK no model")
    for step in ("evaluate", "register"):
        result = run_pipeline(tmp_path, "--force", step, **{**variables, "MODEL_NAME": "damaged"})
        assert result.returncode == 30
        assert "Traceback" not in result.stdout + result.stderr
        assert f"delete the folder {data_dir / 'trained_model'} and run again" in result.stdout


def test_steps_are_forced_before_and_after_the_command(data, tmp_path):
    _, variables = data
    plan = plan_of(tmp_path, "--force", "balance", **variables)
    assert plan["split"] == ("run", "--force balance")
    result = run_pipeline(tmp_path, "--force", "balance", "plan", "--force", "train", **variables)
    assert re.search(r"  balanced +run .* --force balance$", result.stdout, re.MULTILINE)
    assert re.search(r"  trained_model +run .* --force train$", result.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_training_whose_notes_are_damaged_begins_anew_and_an_embedded_store_that_is_gone_is_made_anew(data, tmp_path):
    data_dir, variables = data
    del variables["MLFLOW_TRACKING_URI"]
    process = run_pipeline(tmp_path, "--force", "train", start=True, **{**variables, "EPOCHS": 30, "PATIENCE": 30})
    for line in process.stdout:
        if " epoch 1/30" in line:
            break
    process.kill()
    process.communicate()
    (data_dir / ".draft-trained_model" / ".resume" / "training.npz").write_bytes(b"PK damaged")
    result = run_pipeline(tmp_path, "--force", "train", **{**variables, "EPOCHS": 30, "PATIENCE": 30})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Training starts again." in result.stdout
    assert " epoch 1/30" in result.stdout
    shutil.rmtree(data_dir / "mlflow")
    result = run_pipeline(tmp_path, **{**variables, "EPOCHS": 30, "PATIENCE": 30})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mlflow/ is missing" in result.stdout
    assert "finished version 1, non-production" in result.stdout
