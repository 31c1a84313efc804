import itertools
import json
import logging
import os
import signal
import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from conftest import CREDENTIALS, picture, run_pipeline

from dgmd_pipeline.commands import schedule
from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.workflow import folders

BERLIN = ZoneInfo("Europe/Berlin")


class Clock:
    def __init__(self, *now):
        self.now = datetime(*now, tzinfo=UTC)

    def __call__(self):
        return self.now


def test_the_times_are_those_of_cron_in_the_time_zone():
    times = schedule.at("0 3 * * MON-FRI", BERLIN, Clock(2026, 11, 27))
    assert [due.isoformat() for due in itertools.islice(times, 2)] == [
        "2026-11-27T03:00:00+01:00",
        "2026-11-30T03:00:00+01:00",
    ]


@pytest.mark.parametrize(("month", "day", "hours"), [(3, 29, 23), (10, 25, 25)])
def test_three_o_clock_is_three_o_clock_when_clocks_change(month, day, hours):
    times = schedule.at("0 3 * * *", BERLIN, Clock(2026, month, day - 1))
    first, second = itertools.islice(times, 2)
    assert second - first.astimezone(UTC) == timedelta(hours=hours)


def test_times_that_go_by_while_a_run_is_going_are_passed_over(caplog):
    clock = Clock(2026, 11, 24, 3, 0, 30)
    times = schedule.at("* * * * *", UTC, clock)
    assert next(times) == datetime(2026, 11, 24, 3, 1, tzinfo=UTC)
    clock.now += timedelta(minutes=5)
    with caplog.at_level(logging.INFO, "dgmd_pipeline"):
        assert next(times) == datetime(2026, 11, 24, 3, 6, tzinfo=UTC)
    assert caplog.messages == ["Passed over, because the run before took so long: 4."]


@pytest.mark.parametrize("name", ["Europe/Atlantis", "/etc/passwd", "../secret"])
def test_a_time_zone_that_is_none_is_refused_with_a_sentence(name):
    with pytest.raises(SettingsError, match="expected the name of a time zone"):
        schedule.zone(name)


def test_a_time_zone_may_be_written_as_in_posix():
    assert schedule.zone(":Europe/Berlin") == BERLIN


def test_without_a_time_zone_it_is_the_system_s():
    now = datetime.now().astimezone()
    assert now.astimezone(schedule.zone(None)).utcoffset() == now.utcoffset()


@pytest.fixture
def start(tmp_path):
    """Start the command; one that hangs is killed, so that reading from it ends."""
    started = []

    def start(*arguments, **variables):
        process = run_pipeline(tmp_path, *arguments, start=True, **variables)
        killing = threading.Timer(60, process.kill)
        killing.start()
        started.append((process, killing))
        return process

    yield start
    for process, killing in started:
        killing.cancel()
        process.kill()
        process.stdout.close()
        process.wait()


def lines_until(process, wanted):
    """Read what it prints up to a line that holds `wanted`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return lines
    raise AssertionError(f"no {wanted!r} in:\n{''.join(lines)}")


@pytest.fixture
def variables(bucket, s3_endpoint, tmp_path):
    """A run up to the label map, which takes no TensorFlow."""
    name, client = bucket
    for label in ("anise", "cumin"):
        for number in range(3):
            client.put_object(Bucket=name, Key=f"p/{label}/{number}.png", Body=picture(label, number))
    place = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_DATA_BUCKET": name, "AWS_DATA_PATH": "p"}
    return {**CREDENTIALS, **place, "DATA_DIR": tmp_path / "data"}


def test_runs_follow_each_other_take_what_is_new_and_survive_one_that_fails(
    variables, bucket, start, listener, tmp_path
):
    name, client = bucket
    url, bodies = listener
    process = start("--time", "0.2", "--until", "label", **variables, NOTIFY_URL=url)
    lines_until(process, "Slowest")
    idle = lines_until(process, "Nothing new")
    assert [line.split(" ", 2)[2].split(":")[0] for line in idle] == ["Next run", "Nothing new in s3"]
    client.put_object(Bucket=name, Key="p/dill/0.png", Body=picture("dill", 0))
    lines_until(process, "1 new")
    for number in range(3):
        client.delete_object(Bucket=name, Key=f"p/cumin/{number}.png")
    lines_until(process, "exit code 20; the next one comes all the same")
    assert json.loads((tmp_path / "data" / "status.json").read_text())["outcome"] == "failed"
    lines_until(process, "Next run")
    assert [body["message"] for body in bodies if "could not begin" in body["message"]] == []  # it has told so itself
    client.put_object(Bucket=name, Key="p/dill/1.png", Body=picture("dill", 1))
    lines_until(process, "Slowest")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143


def test_a_signal_ends_the_run_that_is_going_too(variables, start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the run waits for an answer
        variables["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = start("--time", "100", "--until", "label", **variables)
        silent.settimeout(60)
        silent.accept()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    with folders.lock(tmp_path / "data"):  # nobody holds it any more
        pass


def test_a_schedule_and_an_interval_exclude_each_other(tmp_path):
    done = run_pipeline(tmp_path, "--time", "60", SCHEDULE="0 3 * * *")
    assert done.returncode == 2
    assert "expected one of the two" in done.stdout


def test_a_scheduled_run_waits_for_its_time(start):
    process = start(SCHEDULE="0 3 29 2 *", TZ="Europe/Berlin")
    assert "-02-29 03:00:00 CET" in lines_until(process, "Next run")[-1]
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130


def test_a_run_that_is_killed_is_told_by_the_schedule(variables, start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = start("--time", "100", "--until", "label", **variables)
        silent.settimeout(60)
        silent.accept()
        (run,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(run), signal.SIGKILL)
        lines_until(process, "Next run")
    told = json.loads((tmp_path / "data" / "status.json").read_text())
    assert (told["outcome"], told["exit_code"]) == ("failed", 137)
    assert "killed by signal 9" in told["message"]


def test_a_run_that_could_not_begin_is_told_by_the_schedule(variables, start, listener, tmp_path):
    settings = tmp_path / "settings"
    settings.write_text("EPOCHS=3")
    url, bodies = listener
    process = start("--time", "0.2", "--env-file", "settings", "--until", "label", **variables, NOTIFY_URL=url)
    lines_until(process, "Slowest")
    settings.write_text("BATCH_SIZE=many")
    lines_until(process, "exit code 2; the next one comes all the same")
    lines_until(process, "Next run")
    assert bodies[-1]["exit_code"] == 2
    assert "could not begin" in bodies[-1]["message"]
    assert json.loads((tmp_path / "data" / "status.json").read_text())["exit_code"] == 2


def test_an_interval_is_of_no_command(tmp_path):
    assert run_pipeline(tmp_path, "--time", "1", "run").returncode == 2


@pytest.mark.parametrize("seconds", ["-1", "soon", "inf"])
def test_an_interval_has_to_be_a_number_of_seconds(seconds, tmp_path):
    assert run_pipeline(tmp_path, "--time", seconds).returncode == 2
