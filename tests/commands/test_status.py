"""`status.json`, the command `health` and the message to NOTIFY_URL."""

import json
import os
import re

import pytest
from conftest import COMMAND, picture, run_in_own_mounts, run_pipeline

from dgmd_pipeline.commands import health as health_command
from dgmd_pipeline.commands import notify, run, schedule, status
from dgmd_pipeline.formatting import utc_now
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.workflow import lock
from dgmd_pipeline.workflow.run_context import RunResult
from dgmd_pipeline.workflow.success_file import StepRecord, write_record


def health(folder, variables, *arguments):
    done = run_pipeline(folder, "health", *arguments, **variables)
    return done.returncode, done.stdout


def test_health_and_message_show_success_no_change_and_failure(variables, listener, tmp_path):
    url, bodies = listener
    variables |= {"NOTIFY_URL": f"{url}/hook"}
    assert health(tmp_path, variables)[0] == 1  # a mistyped DATA_DIR must not look healthy
    (tmp_path / "data").mkdir()
    assert health(tmp_path, variables)[0] == 0  # before the first run nothing has failed
    assert "No run has ended yet" in health(tmp_path, variables)[1]

    assert run_pipeline(tmp_path, "--until", "label", **variables).returncode == 0
    code, text = health(tmp_path, variables)
    assert code == 0
    assert "succeeded after" in text
    assert run_pipeline(tmp_path, "--until", "label", **variables).returncode == 0
    assert "unchanged after" in health(tmp_path, variables)[1]

    elsewhere = variables | {"AWS_DATA_PATH": "gone"}
    assert run_pipeline(tmp_path, "--until", "label", **elsewhere).returncode == 20
    code, text = health(tmp_path, variables)
    assert code == 1
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d: failed after ", text), text  # one time in a line
    assert "/gone" in text

    assert "Last success: 20" in text

    assert [body["outcome"] for body in bodies] == ["succeeded", "unchanged", "failed"]
    assert bodies[2]["last_success"] == bodies[1]["ended"]
    assert all(body["model"] == "spices" for body in bodies)
    assert bodies[0]["text"].startswith("spices: succeeded. label_map: ")
    assert bodies[2]["exit_code"] == 20
    status = json.loads(health(tmp_path, variables, "--json")[1])
    body = {name: value for name, value in bodies[2].items() if name != "text"}
    assert status == body | {"running": None, "next_run": None, "problems": []}


def test_the_status_names_the_failed_step(variables, tmp_path):
    variables |= {"MIN_IMAGES_PER_LABEL": 50}
    assert run_pipeline(tmp_path, **variables, BACKBONE="cnn").returncode == 20
    status = json.loads(health(tmp_path, variables, "--json")[1])
    assert (status["step"], status["exit_code"], status["version"]) == ("label_map", 20, None)
    assert "MIN_IMAGES_PER_LABEL" in status["message"]


def test_a_run_that_finds_data_dir_locked_does_not_write_a_status(variables, tmp_path):
    (tmp_path / "data").mkdir()
    with lock.hold(tmp_path / "data"):
        assert run_pipeline(tmp_path, **variables).returncode == 10
    assert not (tmp_path / "data" / "status.json").exists()


@pytest.mark.parametrize(
    ("notify_on", "told"),
    [
        ("always", ["succeeded", "worse", "unchanged", "failed", "promoted"]),
        ("change", ["succeeded", "worse", "failed", "promoted"]),
        ("problem", ["worse", "failed"]),
    ],
)
def test_messages_are_sent_only_for_the_outcomes_that_the_operator_wants(notify_on, told, listener, tmp_path):
    url, bodies = listener
    values = Settings(DATA_DIR=tmp_path, NOTIFY_URL=url, NOTIFY_ON=notify_on)
    idle, busy, worse = RunResult(), RunResult(records=[object()]), registered_worse(tmp_path)
    for result, code in ((busy, 0), (worse, 0), (idle, 0), (idle, 20)):
        run.publish_status(values, result, code, "what happened", 1.0)
    notify.tell(values, status.Status(status.PROMOTED, 0, "what happened", utc_now(), 0.0, "spices"))
    assert [body["outcome"] for body in bodies] == told


def registered_worse(data_dir):
    """The result of a run that has registered version 2 in `data_dir`, which is worse than version 1."""
    measured = {"accuracy": 0.5, "images": 40, "verdict": "worse", "compared_with": 1, "failed": ["accuracy"]}
    measured |= {"difference": -0.25, "low": -0.4, "high": -0.1}
    for name, counts in (("evaluation", measured), ("registered_model", {"name": "spices", "version": 2})):
        (data_dir / name).mkdir()
        write_record(data_dir / name, StepRecord(name, 1, "", {}, {}, counts, utc_now(), 1.0, "1"))
    ran = {"registered_model": "spices version 2"}
    return RunResult(fingerprints=ran, records=[object()], summaries=ran)


def test_a_version_that_is_worse_is_an_outcome_of_its_own_and_health_stays_good(tmp_path, capsys):
    values = Settings(DATA_DIR=tmp_path)
    run.publish_status(values, registered_worse(tmp_path), 0, "what happened", 1.0)
    assert health_command.health(values, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    shown = ("outcome", "verdict", "version", "difference", "low", "high", "report", "last_success")
    assert [found[name] for name in shown] == [
        "worse", "worse", 2, -0.25, -0.4, -0.1, str(tmp_path / "evaluation/report.html"), found["ended"],
    ]  # fmt: skip
    run.publish_status(values, RunResult(), 0, "nothing to do", 1.0)
    assert status.read(tmp_path).outcome == "unchanged"


def test_a_run_of_some_steps_does_not_replace_the_status_of_a_whole_one(tmp_path):
    values = Settings(DATA_DIR=tmp_path)
    for code, until in ((0, "label"), (20, None), (0, "label")):
        run.publish_status(values, RunResult(), code, "what happened", 1.0, until)
    found = status.read(tmp_path)
    assert (found.outcome, found.until) == ("failed", None)
    assert found.last_success


def test_health_shows_the_active_run_and_the_next_one(tmp_path, capsys):
    values = Settings(DATA_DIR=tmp_path)
    (tmp_path / schedule.NEXT).write_text("2999-01-01T03:00:00+00:00")
    with lock.hold(tmp_path) as holder:
        holder.tell("tfrecord_training", "1,200 of 2,251 images")
        assert health_command.health(values, as_json=True) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["next_run"] == "2999-01-01T03:00:00+00:00"
        assert shown["running"]["step"] == "tfrecord_training"
        assert shown["running"]["progress"] == "1,200 of 2,251 images"

        os.utime(tmp_path / lock.LOCK, (0, 0))
        assert health_command.health(values, as_json=True) == 1  # it hangs
        assert "has made no progress for" in json.loads(capsys.readouterr().out)["problems"][0]
    assert health_command.health(values, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["running"] is None


def test_an_old_success_is_a_problem_where_the_operator_says_so(tmp_path, capsys):
    values = Settings(DATA_DIR=tmp_path, HEALTH_MAX_AGE=26)
    assert health_command.health(values, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0].startswith("No run has succeeded yet")
    run.publish_status(values, RunResult(), 0, "what happened", 1.0)
    assert health_command.health(values, as_json=True) == 0
    assert health_command.health(values, as_json=True, max_age=1e-6) == 1


def test_on_a_full_disk_a_failure_replaces_an_old_success(variables, tmp_path):
    script = f"""
mkdir data && mount -t tmpfs -o size=300k tmpfs data || exit 77
{COMMAND} --until label && {COMMAND} health || exit 1
cat /dev/zero > data/full
AWS_DATA_PATH=gone {COMMAND} --until label
{COMMAND} health; echo "health $?"
"""
    done = run_in_own_mounts(tmp_path, script, **variables)
    assert "succeeded after" in done.stdout
    assert done.stdout.endswith("health 1\n"), done.stdout + done.stderr


def test_in_a_folder_that_became_read_only_an_old_success_does_not_count(variables, tmp_path):
    script = f"""
mkdir data && mount -t tmpfs tmpfs data || exit 77
{COMMAND} --until label && mount -o remount,ro data || exit 1
{COMMAND} health; echo "health $?"
"""
    done = run_in_own_mounts(tmp_path, script, **variables)
    assert "data: Read-only file system. DATA_DIR must be writable" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("health 30\n")


def test_a_file_name_that_is_not_utf_8_is_reported(tmp_path, listener):
    url, bodies = listener
    for label in ("anise", os.fsdecode(b"caf\xe9")):
        folder = tmp_path / "data" / "raw" / label
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.png").write_bytes(picture("a", number) if label == "anise" else b"<html>")
    done = run_pipeline(tmp_path, "--until", "label", NOTIFY_URL=url, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 20, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "caf\\udce9 (3 of 3 files)" in done.stdout
    assert health(tmp_path, {})[0] == 1
    assert "caf\udce9 (3 of 3 files)" in bodies[0]["message"]


@pytest.mark.parametrize("content", ["{", '{"outcome": "succeeded"}'])
def test_an_unreadable_status_counts_as_none(content, variables, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "status.json").write_text(content)
    code, text = health(tmp_path, variables)
    assert code == 0
    assert "No run has ended yet" in text


def test_a_failure_of_the_receiver_is_a_warning_without_its_path(listener, caplog):
    url, bodies = listener
    notify.post(f"{url}/broken", {"outcome": "succeeded"})
    assert bodies == [{"outcome": "succeeded"}]
    notify.post("http://127.0.0.1:9/s3cr3t", {})
    notify.post(f"{url}/moved", {})
    assert [message.split(": ")[0] for message in caplog.messages] == ["NOTIFY_URL"] * 3
    assert "302" in caplog.messages[2]
    assert "500" in caplog.messages[0]
    assert "127.0.0.1" in caplog.messages[1]
    assert "s3cr3t" not in caplog.text
    assert "broken" not in caplog.text


def test_a_receiver_that_does_not_answer_does_not_delay_the_run(monkeypatch, caplog):
    import socket

    monkeypatch.setattr(notify, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        notify.post(f"http://127.0.0.1:{silent.getsockname()[1]}/", {})
    assert "127.0.0.1" in caplog.text


@pytest.mark.parametrize(
    "url",
    ["file:///s3cr3t", "http://me:s3cr3t@host/", "http://[::1/s3cr3t", "http://host:x/s3cr3t", "http://host/s3cr3tü"],
)
def test_an_invalid_receiver_is_refused_without_showing_its_url(url, tmp_path):
    done = run_pipeline(tmp_path, "plan", NOTIFY_URL=url)
    assert done.returncode == 2
    assert "NOTIFY_URL=***: expected http://... or https://..." in done.stdout
    assert "s3cr3t" not in done.stdout + done.stderr
