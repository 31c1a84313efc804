"""The command `compare`, and the comparison that a run makes, against a real MLflow server."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from support.trained_versions import NAME

from dgmd_pipeline import manifest
from dgmd_pipeline.evaluation import summary
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.registry import versions

pytest_plugins = ["support.trained_versions"]


def test_a_run_compares_its_model_with_production_on_the_same_images(trained, tmp_path):
    assert "version 1 is production: fetching it to compare" in trained.second_run
    version = trained.client.get_model_version(NAME, "2")
    assert version.aliases == ["candidate"]
    evaluation = Path(trained.client.download_artifacts(version.run_id, "evaluation", str(tmp_path)))
    comparison = json.loads((evaluation / "comparison.json").read_text())
    assert (comparison["version"], comparison["left_out"]) == (1, 0)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert comparison["images"] == metrics["images"]
    (status,) = trained.notified
    outcome = "worse" if status["verdict"] == "worse" else "succeeded"
    assert (status["outcome"], status["version"], status["accuracy"]) == (outcome, 2, metrics["accuracy"])
    assert [status[name] for name in ("difference", "low", "high")] == [
        comparison[name] for name in ("difference", "low", "high")
    ]
    benchmark = json.loads((evaluation / "assessment.json").read_text())
    assert benchmark["predictions_equal"] and benchmark["latency_ratio"] > 0
    figures = json.loads(version.tags["dgmd.measured"])
    assert figures["compared_with"] == 1
    assert figures["latency_p50_ms"] == pytest.approx(benchmark["latency_p50_ms"], rel=1e-4)
    assert len({*version.tags} | {"dgmd.failed"}) == 8


def test_the_log_the_message_and_mlflow_say_the_same_of_a_version(trained):
    (told,) = trained.notified
    version = trained.client.get_model_version(NAME, "2")
    run = trained.client.get_run(version.run_id)
    said = version.description.split("\n\n")
    accuracy, compared, command, report = said
    images = run.data.metrics["system/data/images_validation"]
    assert accuracy == f"Accuracy {version.tags['accuracy']} on {images:.0f} validation images."
    assert compared.lower().startswith(summary.THAN[version.tags["verdict"]] + " version 1: ")
    page = f"#/experiments/{run.info.experiment_id}/runs/{version.run_id}/artifacts/evaluation/report.html"
    page += "?workflowType=machine_learning"
    assert report == f"Report: [report.html]({page})"
    assert command.startswith("Next command: `promote 2` ")
    assert run.data.tags["mlflow.note.content"] == version.description

    lines = [f"{NAME} version 2, non-production.", accuracy, compared, command, f"Report: {told['report']}"]
    assert told["message"] == " ".join(lines)
    assert told["text"] == f"{NAME}: {told['outcome']}. {told['message']}"
    last = trained.second_run.splitlines()[-len(lines) :]
    assert [line.split(" ", 2)[2] for line in last] == lines  # after date and time


def test_two_versions_are_compared(trained, json_of):
    found = json_of(trained.folder, "compare", "2", "1", **trained.variables)
    with np.load(trained.folder / "data/evaluation/predictions.npz") as kept:  # of version 2
        right = (kept["probabilities"].argmax(1) == kept["truth"]).mean()
    assert found["comparison"]["accuracy"] == pytest.approx(right)
    assert found["comparison"]["version"] == 1 and "other_accuracy" in found["comparison"]
    assert found["assessment"]["latency_ratio"] > 0 and "other_bytes" in found["assessment"]
    assert (found["version"], found["other_version"]) == (2, 1)
    assert found["verdict"] in ("better", "no difference", "worse")
    assert [gate["name"] for gate in found["gates"] if gate["passed"] is not None]
    assert "production" not in json.dumps(found)


def test_a_version_that_does_not_exist_is_reported(trained, command):
    result = command(trained.folder, "compare", "1", "x", **trained.variables)
    assert result.returncode == 20
    assert "has no version x" in result.stdout


def test_the_registry_keeps_which_images_a_version_was_trained_on(trained, tmp_path):
    store = registry_store.Store(trained.variables["MLFLOW_TRACKING_URI"], None)
    newest = versions.read(store, NAME).versions[0]
    fetched = versions.fetch(store, NAME, newest, tmp_path)
    split = trained.folder / "data" / "split" / "training.csv"
    files = [trained.folder / "data" / "raw" / row.path for row in manifest.read(split, manifest.Example)]
    assert fetched.trained_on == {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
