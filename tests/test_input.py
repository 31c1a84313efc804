"""Input, settings and places that cannot be used: one sentence each, and an exit code."""

import http.server
import os
import subprocess
import sys
import threading

import pytest
from conftest import COMMAND, CREDENTIALS, run_in_own_mounts, run_pipeline
from support.pipeline import TINY, fill, folders, redone


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
    assert "EPOCHS=0: expected a whole number of at least 1 and at most 1,000,000." in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_at_the_same_time_exits_with_its_own_code(tmp_path):
    (tmp_path / "data").mkdir()
    code = "import sys, pathlib; from dgmd_pipeline.workflow import lock\n" \
        "with lock.hold(pathlib.Path('data')): print(flush=True); sys.stdin.read()"  # fmt: skip
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


@pytest.mark.parametrize("command", [["--force"], ["plan", "--until"], ["run", "--force"]])
def test_an_unknown_step_is_answered_with_the_known_ones(data, tmp_path, command):
    data_dir, variables = data
    before = folders(data_dir)
    result = run_pipeline(tmp_path, *command, "tain", **variables)
    assert result.returncode == 2, result.stdout
    assert "'tain' is not a step of this run" in result.stdout
    for name in ("download (raw)", "convert (tfrecord_training, tfrecord_validation)", "train (trained_model)"):
        assert name in result.stdout
    assert redone(before, data_dir) == set()


def test_a_folder_that_is_read_only_is_answered_with_a_sentence(tmp_path):
    script = f"""
mkdir data && mount -t tmpfs -o ro tmpfs data || exit 77
{COMMAND}; echo "exit $?"
"""
    result = run_in_own_mounts(tmp_path, script)
    assert result.stdout.endswith("exit 30\n")
    assert "data/.lock: Read-only file system. DATA_DIR must be writable: correct its mount" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
