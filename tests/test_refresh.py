"""Bringing raw/ up to date with the bucket."""

import io
import json
import re
import shutil
import time

import pytest
from conftest import COMMAND, picture, run_in_own_mounts, run_pipeline
from PIL import Image
from support.pipeline import LABELS, STEPS, TINY, folders, plan_of, redone, times_of


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
    assert "no record of a download: used as it is" in result.stdout
    assert "loose.png,,no label," in (tmp_path / "data" / "inspected" / "rejected.csv").read_text()
    result = run_pipeline(tmp_path, "--until", "label", **variables)
    assert "Nothing to do" in result.stdout
    (tmp_path / "data" / "raw" / LABELS[0] / "new.png").write_bytes(picture(LABELS[0], 50))
    result = run_pipeline(tmp_path, "plan", **variables)
    assert re.search(r"  inspected +run .* raw changes", result.stdout, re.MULTILINE)


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
    assert "26 of 39 objects already downloaded" in result.stdout
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
    assert plan == {"raw": ("run", "1 left out by the last download"), "inspected": ("maybe", "only if raw changes")}
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
    version = json.loads((data_dir / "registered_model" / "version.json").read_text())["version"]
    assert f"Nothing new in s3://finished/train/images: keeping version {version}." in line
    assert redone(before, data_dir) == set()


@pytest.mark.parametrize("how", [["--refresh"], ["--force", "download"]])
def test_pictures_put_there_by_hand_are_never_replaced(tmp_path, how):
    folder = tmp_path / "data" / "raw" / "label"
    folder.mkdir(parents=True)
    (folder / "own.png").write_bytes(picture("label", 1))
    for command in ([], ["plan"]):
        result = run_pipeline(tmp_path, *command, *how, BACKBONE="cnn")
        assert result.returncode == 20, result.stdout + result.stderr
        assert "was not downloaded by this version of the pipeline" in result.stdout
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
    said = re.search(r"([\d,]+) of 330 objects already downloaded", result.stdout)
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
    assert re.search(
        r"the disk is full: raw needs 1\d\d\.\d kB, but only \d\d\.\d kB are free\. Free space and run again", said
    )
    assert after.startswith((".lock\n", ".draft-raw\n.lock\n"))
    said, after = run(200, 4000)
    assert re.search(r"the disk is full: \w+ needs (about|more than) .* free\. Free space and run again", said)
    kept = [name for name in after.partition("Plan for")[0].split() if name in STEPS]
    assert "raw" in kept
    assert all(re.search(rf"  {step} +done ", after) for step in kept)


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
            "contains 1 files that were not downloaded and would be lost. The first one is cloves/own.png"
            in result.stdout
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
    assert plan == {"raw": ("run", "10 missing from the folder"), "inspected": ("maybe", "only if raw changes")}
    assert run_pipeline(tmp_path, "--until", "inspect", **variables).returncode == 0
    assert len(list((tmp_path / "data" / "raw" / "cloves").iterdir())) == 10
