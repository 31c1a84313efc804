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
from conftest import picture, run_pipeline

from dgmd_pipeline.commands import schedule
from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.workflow import lock

BERLIN = ZoneInfo("Europe/Berlin")


class Clock:
    def __init__(self, *now):
        self.now = datetime(*now, tzinfo=UTC)

    def __call__(self):
        return self.now


def test_times_follow_the_cron_expression_in_the_time_zone():
    times = schedule.at("0 3 * * MON-FRI", BERLIN, Clock(2026, 11, 27))
    assert [due.isoformat() for due in itertools.islice(times, 2)] == [
        "2026-11-27T03:00:00+01:00",
        "2026-11-30T03:00:00+01:00",
    ]


@pytest.mark.parametrize(("month", "day", "hours"), [(3, 29, 23), (10, 25, 25)])
def test_a_run_at_three_stays_at_three_when_clocks_change(month, day, hours):
    times = schedule.at("0 3 * * *", BERLIN, Clock(2026, month, day - 1))
    first, second = itertools.islice(times, 2)
    assert second - first.astimezone(UTC) == timedelta(hours=hours)


def test_times_that_pass_during_a_run_are_skipped(caplog):
    clock = Clock(2026, 11, 24, 3, 0, 30)
    times = schedule.at("* * * * *", UTC, clock)
    assert next(times) == datetime(2026, 11, 24, 3, 1, tzinfo=UTC)
    clock.now += timedelta(minutes=5)
    with caplog.at_level(logging.INFO, "dgmd_pipeline"):
        assert next(times) == datetime(2026, 11, 24, 3, 6, tzinfo=UTC)
    assert caplog.messages == ["Skipped 4 scheduled runs: the previous run was still active."]


@pytest.mark.parametrize("name", ["Europe/Atlantis", "/etc/passwd", "../secret"])
def test_an_unknown_time_zone_is_refused(name):
    with pytest.raises(SettingsError, match="expected the name of a time zone"):
        schedule.zone(name)


def test_a_time_zone_may_be_written_as_in_posix():
    assert schedule.zone(":Europe/Berlin") == BERLIN


def test_the_default_is_the_time_zone_of_the_system():
    now = datetime.now().astimezone()
    assert now.astimezone(schedule.zone(None)).utcoffset() == now.utcoffset()


@pytest.fixture
def start(tmp_path):
    """Start the command; kill it if it hangs, so that reading its output ends."""
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
    """Read its output up to a line that contains `wanted`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return lines
    raise AssertionError(f"no {wanted!r} in:\n{''.join(lines)}")


def test_repeated_runs_download_what_is_new_and_continue_after_a_failure(variables, bucket, start, listener, tmp_path):
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
    lines_until(process, "exit code 20; the schedule continues")
    assert json.loads((tmp_path / "data" / "status.json").read_text())["outcome"] == "failed"
    lines_until(process, "Next run")
    # The run published its own status.
    assert [body["message"] for body in bodies if "could not start" in body["message"]] == []
    client.put_object(Bucket=name, Key="p/dill/1.png", Body=picture("dill", 1))
    lines_until(process, "Slowest")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143


def test_a_signal_also_ends_the_active_run(variables, start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the run waits for an answer
        variables["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = start("--time", "100", "--until", "label", **variables)
        silent.settimeout(60)
        silent.accept()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    with lock.hold(tmp_path / "data"):  # the lock is free again
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


def test_the_schedule_publishes_the_status_of_a_killed_run(variables, start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = start("--time", "100", "--until", "label", "--only-if-better", **variables)
        silent.settimeout(60)
        silent.accept()
        (run,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert b"--only-if-better" in Path(f"/proc/{run}/cmdline").read_bytes()
        os.kill(int(run), signal.SIGKILL)
        said = lines_until(process, "Next run")
    assert "Run failed with exit code 137 (killed by signal 9, for example because memory ran out" in "".join(said)
    status = json.loads((tmp_path / "data" / "status.json").read_text())
    assert (status["outcome"], status["exit_code"]) == ("failed", 137)
    assert "killed by signal 9" in status["message"]


def test_the_schedule_publishes_the_status_of_a_run_that_could_not_start(variables, start, listener, tmp_path):
    settings = tmp_path / "settings"
    settings.write_text("EPOCHS=3")
    url, bodies = listener
    process = start("--time", "0.2", "--env-file", "settings", "--until", "label", **variables, NOTIFY_URL=url)
    lines_until(process, "Slowest")
    settings.write_text("BATCH_SIZE=many")
    lines_until(process, "exit code 2; the schedule continues")
    lines_until(process, "Next run")
    assert bodies[-1]["exit_code"] == 2
    assert "could not start" in bodies[-1]["message"]
    assert json.loads((tmp_path / "data" / "status.json").read_text())["exit_code"] == 2


def test_an_interval_cannot_be_combined_with_a_command(tmp_path):
    assert run_pipeline(tmp_path, "--time", "1", "run").returncode == 2


@pytest.mark.parametrize("seconds", ["-1", "soon", "inf"])
def test_an_interval_is_a_number_of_seconds(seconds, tmp_path):
    assert run_pipeline(tmp_path, "--time", seconds).returncode == 2


def test_an_interval_of_0_runs_once(variables, tmp_path):
    done = run_pipeline(tmp_path, "--time", "0", "--until", "label", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Slowest" in done.stdout and "Next run" not in done.stdout
