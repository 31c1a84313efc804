"""A DATA_DIR that was written before the code was divided into packages is up to date.

`support/data_dirs.tar.xz` holds two of them, made from twelve small images by commit c815a26: one with `cnn`, one with
a frozen backbone. Models, plots, the report and the content of the MLflow store are left out; no plan reads them.
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


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("cnn", {"BACKBONE": "cnn"}), ("frozen", {"BACKBONE": "MobileNetV2", "BACKBONE_WEIGHTS": "none"})],
)
def test_nothing_of_it_is_redone(name, backbone, tmp_path):
    with tarfile.open(ROOT / "tests" / "support" / "data_dirs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    variables = SETTINGS | backbone | {"DATA_DIR": tmp_path / name}
    plan = json.loads(run_pipeline(tmp_path, "plan", "--json", **variables).stdout)
    assert {step["step"]: step["state"] for step in plan["steps"] if step["state"] != "done"} == {}
    result = run_pipeline(tmp_path, "run", **variables)
    assert "Nothing to do: dgmd_model version 1 is registered." in result.stdout
    assert result.returncode == 0
