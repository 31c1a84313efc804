"""The script of the CI workflow that names the published images, with programs that only say how they were called."""

import subprocess

import pytest
import yaml
from conftest import ROOT

IMAGE = "ghcr.io/owner/repository/dgmd_model_pipeline"
MAIN = {"GITHUB_REF_TYPE": "branch", "GITHUB_REF_NAME": "main", "GITHUB_RUN_ATTEMPT": "1"}
TAG = {"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v1.2.3", "GITHUB_RUN_ATTEMPT": "1"}
ARTIFACTS = ["image-amd64-1", "image-arm64-1"]


def publish(folder, artifacts, **variables):
    for name in artifacts:
        (folder / name).mkdir()
    programs = folder / "bin"
    programs.mkdir()
    for name, script in {"docker": 'cat > /dev/null; echo "docker $*"', "gh": 'echo "$NEWEST"'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    *_, step = workflow["jobs"]["publish"]["steps"]
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "GH_TOKEN": "t",
        "GITHUB_ACTOR": "me",
        "GITHUB_REPOSITORY": "Owner/Repository",
        "GITHUB_SHA": "abc",
        "NEWEST": "abc",
        **variables,
    }
    command = ["bash", "-e", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "artifacts", "names", "layouts"),
    [
        (MAIN, ARTIFACTS, ["abc", "latest"], ARTIFACTS),
        (MAIN | {"NEWEST": "def"}, ARTIFACTS, ["abc", "latest"], ARTIFACTS),
        (MAIN | {"NEWEST": "def", "GITHUB_RUN_ATTEMPT": "2"}, ARTIFACTS, ["abc"], ARTIFACTS),
        (TAG, ARTIFACTS, ["1.2.3"], ARTIFACTS),
        (
            MAIN | {"GITHUB_RUN_ATTEMPT": "10"},
            [*ARTIFACTS, "image-arm64-2", "image-arm64-10"],
            ["abc", "latest"],
            ["image-amd64-1", "image-arm64-10"],
        ),
    ],
    ids=["push", "push with a newer one behind it", "repeated after a newer one", "tag", "repeated with a new image"],
)
def test_a_run_publishes_its_newest_images_under_names_of_its_own(variables, artifacts, names, layouts, tmp_path):
    done = publish(tmp_path, artifacts, **variables)
    tags = " ".join(f"--tag {IMAGE}:{name}" for name in names)
    sources = " ".join(f"oci-layout://./{layout}" for layout in layouts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"docker buildx imagetools create {tags} {sources}"


def test_without_the_image_of_a_platform_nothing_is_published(tmp_path):
    done = publish(tmp_path, ["image-amd64-1"], **MAIN)
    assert done.returncode == 1
    assert done.stdout == ('::error::The image for arm64 is kept for a week and is gone: select "Re-run all jobs".\n')
