"""The operator's commands against a real MLflow server (test_demo has the embedded store), then a consumer."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import keras
import mlflow
import numpy as np
import pytest
from conftest import ROOT, environment_with, listening, picture, run_pipeline, wait_for
from PIL import Image
from support.pipeline import LABELS, TINY, on_a_terminal

from dgmd_pipeline import manifest
from dgmd_pipeline.cli import main
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.registry import versions

ANY = {
    "MAX_CLASS_DROP": 1,
    "MAX_LATENCY_RATIO": 100,
}  # models of one epoch: what matters here is what is done with them


@pytest.fixture(scope="module")
def trained(mlflow_server, tmp_path_factory):
    """A folder where two versions were trained, the second one with production (version 1) to compare with."""
    folder = tmp_path_factory.mktemp("trained")
    for label in LABELS:
        (folder / "data/raw" / label).mkdir(parents=True)
        for number in range(12):
            (folder / f"data/raw/{label}/{label} {number}.png").write_bytes(picture(label, number))
    Image.open(io.BytesIO(picture(LABELS[1], 99, side=40))).save(folder / "jar.jpeg", quality=95)
    place = {"DATA_DIR": folder / "data", "MODEL_NAME": "jars", "MLFLOW_TRACKING_URI": mlflow_server}
    variables = {**TINY, **ANY, **place}
    first = run_pipeline(folder, **variables)
    assert first.returncode == 0, first.stdout + first.stderr
    promoted = run_pipeline(folder, "promote", "--yes", "--reason", "the first one", **variables)
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    shutil.rmtree(folder / "data/trained_model")
    with listening() as (url, bodies):
        second = run_pipeline(folder, **{**variables, "LEARNING_RATE": 0.003}, NOTIFY_URL=url)
    assert second.returncode == 0, second.stdout + second.stderr
    (folder / "notified.json").write_text(json.dumps(bodies))
    return folder, variables, promoted.stdout, second.stdout


@pytest.fixture
def command(monkeypatch, capsys, _own_process):
    """The command in this process, which has TensorFlow and MLflow already."""

    def run(folder, *words, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.chdir(folder)
        capsys.readouterr()
        code = main([*map(str, words)])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


@pytest.fixture
def asked(command):
    """What a command says in JSON."""

    def ask(folder, *words, **variables):
        result = command(folder, *words, "--json", **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout)

    return ask


def client_of(variables):
    return mlflow.MlflowClient(variables["MLFLOW_TRACKING_URI"], variables["MLFLOW_TRACKING_URI"])


def register_again(client, name, version, run=None):
    """Register the model of a version under another name, as that of its own run or of another one."""
    run_id = run.info.run_id if run else version.run_id
    model_id = version.source.removeprefix("models:/")
    client.create_model_version(name, version.source, run_id, tags=version.tags, model_id=model_id)


def run_with(client, version, *folders):
    """Make a run that has these folders of a version's run."""
    run = client.create_run(client.get_run(version.run_id).info.experiment_id)
    for folder in folders:
        client.log_artifacts(run.info.run_id, client.download_artifacts(version.run_id, folder), folder)
    return run


def test_a_first_model_has_nothing_to_compare_with_and_that_is_said(trained):
    *_, promoted, _ = trained
    assert promoted.count("There is no production version to compare with.") == 3
    assert "version 1 is production" in promoted


def test_a_run_compares_its_model_with_production_on_the_same_pictures(trained):
    folder, variables, _, second = trained
    assert "version 1 is production: fetching it to compare" in second
    client = client_of(variables)
    version = client.get_model_version_by_alias(variables["MODEL_NAME"], "candidate")
    assert int(version.version) == 2
    evaluation = Path(client.download_artifacts(version.run_id, "evaluation", str(folder)))
    found = json.loads((evaluation / "comparison.json").read_text())
    assert (found["version"], found["left_out"]) == (1, 0)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert found["images"] == metrics["images"]
    (told,) = json.loads((folder / "notified.json").read_text())
    assert (told["outcome"], told["version"], told["accuracy"]) == ("succeeded", 2, metrics["accuracy"])
    assert told["difference"] == found["difference"]
    tried = json.loads((evaluation / "assessment.json").read_text())
    assert tried["predictions_equal"] and tried["latency_ratio"] > 0
    assert version.tags["dgmd.compared_with"] == "1"
    assert float(version.tags["dgmd.latency_p50_ms"]) == pytest.approx(tried["latency_p50_ms"], rel=1e-4)


def test_the_story_of_two_versions(trained, command, asked):
    folder, variables, *_ = trained
    name = variables["MODEL_NAME"]

    def environments():
        return {row["version"]: row["environment"] for row in asked(folder, "models", **variables)}

    rows = {row["version"]: row for row in asked(folder, "models", **variables)}
    assert {number: row["environment"] for number, row in rows.items()} == {1: "production", 2: "non-production"}
    assert rows[2]["compared_with"] == "1" and rows[2]["bytes"] > 10_000 and rows[2]["latency_p50_ms"] > 0
    assert rows[1]["promoted_by"] and rows[2]["promoted_by"] is None

    refused = command(folder, "promote", "--yes", **{**variables, "MAX_LATENCY_RATIO": 1e-3})
    assert refused.returncode == 40
    assert re.search(r"latency +FAILS", refused.stdout) and "Version 2 is not promoted. One image" in refused.stdout
    assert command(folder, "promote", **variables).returncode == 2  # nobody can be asked
    assert command(folder, "promote", "--force", **variables).returncode == 2  # no reason
    assert environments() == {1: "production", 2: "non-production"}

    slow = {**variables, "MAX_LATENCY_RATIO": 1e-3}
    forced = asked(folder, "promote", "2", "--yes", "--force", "--reason", "it is needed", **slow)
    assert forced["promoted"] and forced["event"]["forced"]
    assert environments() == {1: "non-production", 2: "production"}
    assert "is production already" in command(folder, "promote", "@production", **variables).stdout

    client = client_of(variables)
    assert client.get_model_version(name, "1").current_stage == "Archived"
    assert client.get_model_version(name, "2").aliases == ["production"]

    back = command(folder, "rollback", "--yes", "--reason", "it was not", **variables)
    assert back.returncode == 0 and "version 1 is production again" in back.stdout
    assert environments() == {1: "production", 2: "non-production"}
    assert command(folder, "rollback", "--yes", **variables).returncode == 40

    events = asked(folder, "history", **variables)
    assert [(e["action"], e["former"], e["version"], e["forced"], e["why"]) for e in events] == [
        ("promote", None, 1, False, "the first one"),
        ("promote", 1, 2, True, "it is needed"),
        ("rollback", 2, 1, False, "it was not"),
    ]
    assert ["latency", False] in [gate[:2] for gate in events[1]["gates"]]
    table = command(folder, "history", **variables).stdout.splitlines()
    assert len(table) == 4 and "promote (forced)" in table[2]


def test_an_operator_at_a_terminal_is_asked(trained):
    folder, variables, *_ = trained
    result = answered(folder, "n", "promote", "2", **variables)
    assert result.returncode == 40, result.stdout
    assert "[y/N]" in result.stdout and "Nothing was changed." in result.stdout


def answered(folder, answer, *words, **variables):
    """The command on a terminal, where somebody answers its question."""
    words = f"{sys.executable} {ROOT / 'pipeline.py'} {' '.join(words)}"
    return subprocess.run(
        ["script", "-qec", words, "/dev/null"], input=f"{answer}\n", cwd=folder, env=environment_with(variables),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_without_the_validation_records_a_changed_production_makes_the_assessment_missing(trained, tmp_path, command):
    folder, variables, *_ = trained
    client, name = client_of(variables), f"{variables['MODEL_NAME']}-moved"
    client.create_registered_model(name)
    for version in ("1", "2"):
        register_again(client, name, client.get_model_version(variables["MODEL_NAME"], version))
    client.set_registered_model_alias(name, "production", "2")  # version 1 was compared with nothing
    elsewhere = {**variables, "DATA_DIR": tmp_path / "nothing", "MODEL_NAME": name}
    refused = command(tmp_path, "promote", "1", "--yes", **elsewhere)
    assert refused.returncode == 40, refused.stdout
    assert "there are no validation records" in refused.stdout
    at_hand = command(folder, "promote", "1", "--yes", **{**variables, "MODEL_NAME": name})
    assert at_hand.returncode == 0, at_hand.stdout + at_hand.stderr
    assert "Production is version 2: comparing" in at_hand.stdout


def test_an_assessment_that_the_run_could_not_make_is_made_by_promote(trained, tmp_path, command):
    folder, variables, *_ = trained
    client, name = client_of(variables), f"{variables['MODEL_NAME']}-untried"
    known = client.get_model_version(variables["MODEL_NAME"], "2")
    run = run_with(client, known, "evaluation", "split")
    (tmp_path / "assessment.json").write_text('{"missing": "It died."}')
    client.log_artifact(run.info.run_id, tmp_path / "assessment.json", "evaluation")
    client.create_registered_model(name)
    register_again(client, name, known, run)
    elsewhere = command(tmp_path, "promote", "1", "--yes", **{**variables, "MODEL_NAME": name, "DATA_DIR": tmp_path})
    assert elsewhere.returncode == 40 and "It died." in elsewhere.stdout
    promoted = command(folder, "promote", "1", "--yes", **{**variables, "MODEL_NAME": name})
    assert promoted.returncode == 0, promoted.stdout
    assert "Benchmarking the model in a clean process ..." in promoted.stdout


def test_a_model_that_is_damaged_in_the_registry_is_said(trained, tmp_path, command):
    folder, variables, *_ = trained
    client, name = client_of(variables), f"{variables['MODEL_NAME']}-damaged"
    known = client.get_model_version(variables["MODEL_NAME"], "2")
    run = run_with(client, known, "split")
    model = Path(mlflow.artifacts.download_artifacts(known.source, tracking_uri=variables["MLFLOW_TRACKING_URI"]))
    (model / "data" / "model.keras").write_bytes(b"PK no model")
    client.log_artifacts(run.info.run_id, model, "model")
    client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    for words in (["promote", "1", "--yes"], ["predict", "jar.jpeg", "--version", "1"]):
        refused = command(folder, *words, **{**variables, "MODEL_NAME": name})
        assert refused.returncode == 30
        assert f"{name} version 1 is damaged in the registry, it cannot be loaded" in refused.stdout + refused.stderr
        assert "dgmd-" not in refused.stdout + refused.stderr


def test_what_a_version_was_trained_on_comes_from_the_registry(trained, tmp_path):
    folder, variables, *_ = trained
    store = registry_store.Store(variables["MLFLOW_TRACKING_URI"], None)
    entry = versions.entries(store, variables["MODEL_NAME"])[0]
    fetched = versions.fetch(store, variables["MODEL_NAME"], entry, tmp_path)
    split = folder / "data" / "split" / "training.csv"
    files = [folder / "data" / "raw" / row.path for row in manifest.read(split, manifest.Example)]
    assert fetched.trained_on == {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_versions_are_compared(trained, asked):
    folder, variables, *_ = trained
    found = asked(folder, "compare", "2", "1", **variables)
    with np.load(folder / "data/evaluation/predictions.npz") as kept:  # of version 2
        right = (kept["probabilities"].argmax(1) == kept["truth"]).mean()
    assert found["comparison"]["accuracy"] == pytest.approx(right)
    assert found["comparison"]["version"] == 1 and "other_accuracy" in found["comparison"]
    assert found["assessment"]["latency_ratio"] > 0 and "other_bytes" in found["assessment"]
    assert "production_" not in json.dumps(found)


def test_pictures_are_predicted_from_the_registry_alone(trained, tmp_path, command, asked):
    folder, variables, *_ = trained
    (tmp_path / "in/below").mkdir(parents=True)
    for label in LABELS:
        (tmp_path / f"in/below/{label}.png").write_bytes(picture(label, 3))
    elsewhere = {**variables, "DATA_DIR": tmp_path / "nothing"}
    rows = asked(tmp_path, "predict", "in", "--version", "1", **elsewhere)
    assert [row["file"] for row in rows] == [f"in/below/{label}.png" for label in LABELS]
    network = keras.models.load_model(folder / "data/trained_model/model.keras", compile=False)  # version 2
    second = asked(tmp_path, "predict", "in", "--version", "2", **elsewhere)
    for row in second:
        pixels = np.asarray(Image.open(tmp_path / row["file"]).convert("RGB"))[np.newaxis]
        probabilities = network.predict(pixels, verbose=0)[0]
        assert row["label"] == LABELS[probabilities.argmax()]
        assert row["probability"] == pytest.approx(probabilities.max(), abs=1e-5)
    assert not (tmp_path / "nothing").exists()

    (tmp_path / "in/notes.txt").write_text("no picture")
    result = command(tmp_path, "predict", "in", "--csv", **elsewhere)  # production
    assert result.returncode == 20
    assert [row["file"] for row in csv.DictReader(io.StringIO(result.stdout))] == [row["file"] for row in rows]
    assert "1 of 4 files could not be read; the first one is in/notes.txt" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["promote", "9"], "has no version 9: the newest are 2, 1, and there is "),
        (["promote", "@nobody"], "has no version @nobody"),
        (["predict", "nowhere.png"], "There is no file or folder nowhere.png."),
        (["compare", "1", "x"], "has no version x"),
    ],
)
def test_what_is_not_there_is_said(trained, command, words, said):
    folder, variables, *_ = trained
    result = command(folder, *words, **variables)
    assert result.returncode == 20
    assert said in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("word", ["models", "promote", "rollback", "history"])
def test_without_a_registry_or_a_model_there_is_a_sentence(trained, tmp_path, command, word):
    _, variables, *_ = trained
    result = command(tmp_path, word, **{**variables, "DATA_DIR": tmp_path, "MODEL_NAME": "other"})
    assert result.returncode == 20
    assert re.search(r"There is no (registry|version of other)", result.stdout)


def test_tables_fit_a_terminal(trained):
    folder, variables, *_ = trained
    lines = on_a_terminal(folder, "models", **variables)
    assert max(map(len, lines)) <= 80, lines


def test_looking_needs_no_tensorflow(trained):
    folder, variables, *_ = trained
    code = """
import sys
from dgmd_pipeline import cli
for word in ("models", "history"):
    assert cli.main([word]) == 0
assert "tensorflow" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment_with(variables), timeout=120)
    assert ran.returncode == 0


PAGE = (ROOT / "docs/moving.md").read_text("utf-8")
LOADING, ASKING, ADOPTING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(SERVING,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def consumer(trained, asked):
    """A folder with a picture in it, the variables of a consumer, and what the production model says of the picture."""
    folder, variables, *_ = trained
    (row,) = asked(folder, "predict", "jar.jpeg", **variables)
    return folder, {name: variables[name] for name in ("MODEL_NAME", "MLFLOW_TRACKING_URI")}, row


@pytest.mark.parametrize("uri", ['f"models:/{NAME}/Production"', 'f"models:/{NAME}@production"'])
def test_a_consumer_loads_the_production_model_with_mlflow_s_client_alone(consumer, uri):
    folder, variables, expected = consumer
    code = LOADING.replace('f"models:/{NAME}/Production"', uri, 1)
    assert uri in code
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment_with(variables), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    label, probability = ran.stdout.split("\n")[-2].rsplit(" ", 1)
    assert label == expected["label"]
    assert float(probability) == pytest.approx(expected["probability"], abs=1e-5)


def test_pictures_that_were_scaled_are_refused(consumer):
    folder, variables, _ = consumer
    code = LOADING.replace('.convert("RGB"))', '.convert("RGB")) / 255')
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment_with(variables), capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "float64 does not match expected dtype uint8" in ran.stderr


def test_mlflow_s_own_server_answers_a_picture_with_probabilities(consumer):
    folder, variables, expected = consumer
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**variables, "PORT": port, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        SERVING, shell=True, cwd=folder, env=environment_with(variables), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        ran = subprocess.run(
            [sys.executable, "-c", ASKING], cwd=folder, env=environment_with(variables), capture_output=True, text=True
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    assert ran.returncode == 0, ran.stderr
    probabilities = np.array(json.loads(ran.stdout))
    assert LABELS[probabilities.argmax()] == expected["label"]
    assert probabilities.max() == pytest.approx(expected["probability"], abs=1e-4)
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)


def test_a_version_of_an_older_pipeline_becomes_production_and_is_gone_back_to(trained, command, asked):
    folder, variables, *_ = trained
    client, name = client_of(variables), "jars-of-before"
    run = client.create_run(client.get_experiment_by_name(variables["MODEL_NAME"]).experiment_id)
    Path("MLmodel").write_text("flavors:\n  keras: {}\n")
    client.log_artifact(run.info.run_id, "MLmodel", "model")
    client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    register_again(client, name, client.get_model_version(variables["MODEL_NAME"], "2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage(name, "1", "Production")
    variables = {**variables, "MODEL_NAME": name}
    slow = {**variables, "MAX_LATENCY_RATIO": 1e-3}
    assert "version 1 has the stage Production and not the alias" in command(folder, "promote", "2", **slow).stdout
    code = [sys.executable, "-c", ADOPTING]
    subprocess.run(code, cwd=folder, env=environment_with({**variables, "VERSION": 1}), check=True)
    assert [row["environment"] for row in asked(folder, "models", **variables)] == ["non-production", "production"]
    refused = command(folder, "promote", "2", "--yes", "--json", **variables)
    assert refused.returncode == 40
    gates = {gate["name"]: gate for gate in json.loads(refused.stdout)["gates"]}
    assert "was not made by this pipeline" in gates["assessment"]["text"] and not gates["assessment"]["passed"]
    assert asked(folder, "promote", "2", "--yes", "--force", "--reason", "the first of ours", **variables)["promoted"]
    back = command(folder, "rollback", "--yes", **variables)
    assert back.returncode == 0, back.stdout + back.stderr
    assert "version 1 is production again" in back.stdout
    assert "Whether it can be loaded is not tried." in back.stdout
    assert client.get_model_version(name, "1").current_stage == "Production"
