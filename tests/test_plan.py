"""The plan, the last step of a run, and forced steps."""

import json
import re

import pytest
from conftest import run_pipeline
from support.pipeline import STEPS, folders, on_a_terminal, plan_of, redone, times_of


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
    assert rows["tfrecord_training"]["reuse"] == "reuses unchanged images"
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
    (data_dir / "features_training").mkdir(exist_ok=True)  # the data are those of `cnn`
    lines = on_a_terminal(tmp_path, "plan", **variables)
    assert max(len(line) for line in lines if str(data_dir) not in line) <= 80  # the folder's name may be longer
    rows = "\n".join(lines)
    assert re.search(r"^  inspected +done +31 +\d+\.\d kB$", rows, re.MULTILINE), rows
    assert re.search(r"^  registered_model +maybe +\d+ B  only if split changes$", rows, re.MULTILINE), rows
    assert "Folders that these settings do not use: features_training." in " ".join(rows.split())


def test_a_plan_does_not_guess_how_many_images_a_missing_folder_will_have(data, tmp_path):
    data_dir, variables = data
    for name in ("split", "tfrecord_training", "tfrecord_validation"):
        (data_dir / name).rename(tmp_path / name)
    rows = json.loads(run_pipeline(tmp_path, "plan", "--json", **variables).stdout)["steps"]
    images = {row["step"]: row["images"] for row in rows}
    assert images["split"] == images["balanced"] == 30
    assert (images["tfrecord_training"], images["tfrecord_validation"], images["trained_model"]) == (None, None, None)
    assert images["evaluation"] == 6  # its folder is there
    (waiting,) = {row["reason"] for row in rows if row["state"] == "maybe"}
    assert waiting == "only if split or tfrecord_training or tfrecord_validation changes"


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
    status = (data_dir / "status.json").read_text()
    result = run_pipeline(tmp_path, "--force", "train", "--until", "split", **variables)
    assert result.returncode == 2
    assert (data_dir / "status.json").read_text() == status
    assert "'train' is not a step of this run" in result.stdout


@pytest.mark.slow
def test_forced_registration_notes_the_version_that_is_there(data, tmp_path):
    data_dir, variables = data
    before = folders(data_dir)
    result = run_pipeline(tmp_path, "--force", "register", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "finished version 1, already registered" in result.stdout
    assert redone(before, data_dir) == {"registered_model"}


def test_steps_are_forced_before_and_after_the_command(data, tmp_path):
    _, variables = data
    plan = plan_of(tmp_path, "--force", "balance", **variables)
    assert plan["split"] == ("run", "--force balance")
    result = run_pipeline(tmp_path, "--force", "balance", "plan", "--force", "train", **variables)
    assert re.search(r"  balanced +run .* --force balance$", result.stdout, re.MULTILINE)
    assert re.search(r"  trained_model +run .* --force train$", result.stdout, re.MULTILINE)
