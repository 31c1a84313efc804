"""The commands `models` and `history` against a real MLflow server."""

import json
import re
import subprocess
import sys

import pytest
from conftest import environment_with

pytest_plugins = ["support.trained_versions"]


def test_models_shows_environment_comparison_and_promotion_of_each_version(trained, json_of, command):
    rows = {row["version"]: row for row in json_of(trained.folder, "models", **trained.variables)}
    assert {number: row["environment"] for number, row in rows.items()} == {1: "production", 2: "non-production"}
    assert rows[2]["compared_with"] == 1 and rows[2]["bytes"] > 10_000 and rows[2]["latency_p50_ms"] > 0
    assert (rows[1]["verdict"], rows[1]["latency_ratio"], rows[1]["compared_with"]) == ("first", None, None)
    assert rows[2]["verdict"] in ("better", "no difference", "worse") and rows[2]["latency_ratio"] > 0
    assert [type(rows[2][name]) for name in ("version", "compared_with", "bytes")] == [int] * 3
    assert rows[2]["aliases"] == ["candidate"]
    assert rows[1]["promoted_by"] and rows[1]["promoted_at"]
    assert rows[2]["promoted_by"] is None and rows[2]["promoted_at"] is None
    table = command(trained.folder, "models", **trained.variables).stdout.splitlines()
    assert max(map(len, table)) <= 80, table
    promoted = rows[1]["promoted_at"][:16].replace("T", " ")
    assert f"promoted {promoted} by {rows[1]['promoted_by']}" in "\n".join(table)
    assert rows[1]["created"][:16].replace("T", " ") in "\n".join(table)
    assert f"x {rows[2]['latency_ratio']:.2f}" in table[2] and " ms" not in "".join(table)
    assert table[-1].startswith("* candidate")


def test_a_version_of_before_verdicts_is_shown_without_one(trained, own_model, json_of, command):
    figures = json.loads(trained.client.get_model_version(own_model["MODEL_NAME"], "2").tags["dgmd.measured"])
    del figures["latency_ratio"]
    for name, value in figures.items():  # a tag for each
        trained.client.set_model_version_tag(own_model["MODEL_NAME"], "2", f"dgmd.{name}", value)
    for name in ("verdict", "dgmd.measured"):
        trained.client.delete_model_version_tag(own_model["MODEL_NAME"], "2", name)
    trained.client.set_model_version_tag(own_model["MODEL_NAME"], "1", "dgmd.failed", "labels, latency")
    newest, first = json_of(trained.folder, "models", **own_model)
    assert (newest["verdict"], newest["latency_ratio"], newest["failed"]) == (None, None, [])
    assert (newest["accuracy"], newest["compared_with"]) == (figures["validation_accuracy"], 1)
    assert first["failed"] == ["labels", "latency"]
    table = command(trained.folder, "models", **own_model).stdout
    assert f"compared with version 1: {100 * newest['difference']:+.1f} points" in table
    assert "first version; failed: labels, latency" in table


@pytest.mark.parametrize("word", ["models", "promote", "rollback", "history"])
def test_a_missing_registry_or_model_is_reported(trained, tmp_path, command, word):
    variables = {**trained.variables, "DATA_DIR": tmp_path, "MODEL_NAME": "other"}
    result = command(tmp_path, word, **variables)
    assert result.returncode == 20
    assert "There is no version of other in the registry" in result.stdout
    result = command(tmp_path, word, **{**variables, "MLFLOW_TRACKING_URI": ""})
    assert result.returncode == 20
    assert re.search(r"There is no registry: .* holds no embedded store", result.stdout)


def test_models_and_history_do_not_import_tensorflow(trained):
    code = """
import sys
from dgmd_pipeline import cli
for word in ("models", "history"):
    assert cli.main([word]) == 0
assert "tensorflow" not in sys.modules
"""
    environment = environment_with(trained.variables)
    ran = subprocess.run([sys.executable, "-c", code], cwd=trained.folder, env=environment, timeout=120)
    assert ran.returncode == 0
