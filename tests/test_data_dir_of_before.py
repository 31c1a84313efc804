"""A DATA_DIR of an earlier version is brought up to date without another download.

`support/data_dirs_of_before.tar.xz` holds two of them, made from twelve small images by commit c815a26: one with
`cnn`, one with a frozen backbone. Models, plots, the report and the content of the MLflow store are left out; no plan
reads them. Since then, the formats of three steps have changed, because they store what the next run reuses.
"""

import json
import tarfile

import pytest
from conftest import ROOT, run_pipeline

SETTINGS = {
    "AWS_DATA_BUCKET": "jars",
    "AWS_DATA_PATH": "train",
    "IMAGE_WIDTH": 32,
    "IMAGE_HEIGHT": 32,
    "EPOCHS": 1,
    "NUM_SHARDS": 2,
    "SEED": 1,
    "MAX_REJECTED_PCNT": 1,
}


BACKBONES = {"cnn": {"BACKBONE": "cnn"}, "frozen": {"BACKBONE": "MobileNetV2", "BACKBONE_WEIGHTS": "none"}}


@pytest.mark.parametrize(("name", "last"), [("cnn", "convert"), ("frozen", "extract")])
def test_steps_whose_format_changed_are_redone_without_a_download(name, last, tmp_path):
    with tarfile.open(ROOT / "tests" / "support" / "data_dirs_of_before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    variables = SETTINGS | BACKBONES[name] | {"DATA_DIR": tmp_path / name}
    plan = json.loads(run_pipeline(tmp_path, "plan", "--json", **variables).stdout)
    steps = {step["step"]: step for step in plan["steps"]}
    assert steps["raw"]["state"] == "done"
    assert {name for name, step in steps.items() if "format" in step["reason"]} == {
        *("inspected", "tfrecord_training", "tfrecord_validation"),
        *(("features_training", "features_validation") if name == "frozen" else ()),
    }
    result = run_pipeline(tmp_path, "run", "--until", last, **variables)
    assert result.returncode == 0, result.stdout
    assert "reused" not in result.stdout
    again = run_pipeline(tmp_path, "run", "--until", last, **variables)
    assert "Nothing to do" in again.stdout


@pytest.mark.parametrize("name", BACKBONES)
def test_nothing_is_redone_in_one_of_this_version(name, tmp_path):
    """`support/data_dirs.tar.xz` holds the same two, made by this version. If it fails, a format has to be raised."""
    with tarfile.open(ROOT / "tests" / "support" / "data_dirs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    variables = SETTINGS | BACKBONES[name] | {"DATA_DIR": tmp_path / name}
    plan = json.loads(run_pipeline(tmp_path, "plan", "--json", **variables).stdout)
    assert {step["step"]: step["reason"] for step in plan["steps"] if step["state"] != "done"} == {}
