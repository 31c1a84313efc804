"""Problems of the environment that an operator can solve: a sentence and an exit code, and never a traceback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from conftest import COMMAND, environment_with, picture, run_in_own_mounts, run_pipeline
from support.http_server import send
from support.s3 import send_listing

# A user who is not in /etc/passwd and is no root
NOBODY = ["unshare", "--user", "--map-user=12345"]
# A file system of which only the folder "$1" can be written, as in a container with --read-only
READ_ONLY = """
mount --rbind / "$2" && mount -o remount,bind,ro "$2" && mount --bind "$1" "$2$1" || exit 77
mount -t tmpfs tmpfs "$2/dev/shm" || exit 77
cd / && exec chroot "$2" sh -c "$3"
"""


@pytest.fixture
def pictures(tmp_path):
    """A folder with a DATA_DIR whose `raw/` has images of two labels that were put there by hand."""
    for label in ("anise", "cumin"):
        (tmp_path / "data" / "raw" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "data" / "raw" / label / f"{number}.png").write_bytes(picture(label, number))
    return tmp_path


def shell(folder, script, **variables):
    """Run a script in which $PIPELINE is the command. Its output is buffered, as usual where it is not a terminal."""
    environment = environment_with({**variables, "PIPELINE": COMMAND})
    environment.pop("PYTHONUNBUFFERED", None)
    command = ["bash", "-o", "pipefail", "-c", script.replace("$PIPELINE", COMMAND)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def status(folder):
    return json.loads((folder / "data" / "status.json").read_text())


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $PIPELINE", 2, "encoding of file names is ascii: expected utf-8"),
        ("ulimit -n 20; $PIPELINE", 2, "This process may have 20 files open: expected at least 256"),
        ("ulimit -Sn 20; $PIPELINE plan", 0, "Plan for data"),
        ("ulimit -f 1; $PIPELINE --until label", 30, "data: File too large. inspected writes a file that is larger"),
        ("DATA_DIR=/proc/data $PIPELINE", 30, "/proc/data: DATA_DIR must be a folder on a disk: choose another path."),
        ("DATA_DIR=/proc/self $PIPELINE", 30, "/proc/self: DATA_DIR must be a folder on a disk: choose another path."),
        (f"DATA_DIR={300 * 'x'} $PIPELINE", 30, f"{200 * 'x'}...: File name too long. DATA_DIR must be shorter"),
        (f"DATA_DIR={3000 * 'x/'} $PIPELINE plan", 30, f"{100 * 'x/'}...: File name too long. DATA_DIR"),
    ],
)  # fmt: skip
def test_a_circumstance_is_answered_with_a_sentence(pictures, command, code, sentence):
    done = shell(pictures, command)
    assert done.returncode == code, done.stdout + done.stderr
    assert sentence in done.stdout


@pytest.mark.parametrize("stop", ["(exec <&-; sleep 1)", "head -n 1"])
def test_a_run_goes_on_when_the_reader_of_its_log_has_gone(pictures, stop):
    done = shell(pictures, f"$PIPELINE run --until label | {stop}")
    assert (done.returncode, done.stderr) == (0, "")
    assert status(pictures)["outcome"] == "succeeded"


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("run --until label > /dev/full", 0, "No space left on device"),
        ("run --until label >&-", 0, "Bad file descriptor"),
        ("plan --json > /dev/full", 30, "No space left on device"),
        ("plan --json >&-", 30, "Bad file descriptor"),
        ("run --until label <&- >&- 2>&-", 0, None),
    ],
)
def test_output_that_cannot_be_written_is_reported_and_does_not_stop_a_run(pictures, command, code, reason):
    done = shell(pictures, f"$PIPELINE {command}")
    assert done.returncode == code, done.stderr
    assert done.stderr == (f"error: standard output: {reason}. Lines are missing there.\n" if reason else "")
    if command.startswith("run"):
        assert status(pictures)["outcome"] == "succeeded"
        assert "Plan" not in (pictures / "data" / ".lock").read_text()


def test_a_user_without_a_home_and_a_name_can_run(pictures):
    pictures.chmod(0o777)
    if subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user of one's own here")
    done = shell(pictures, f"env -u HOME {' '.join(NOBODY)} $PIPELINE plan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Plan for data" in done.stdout


def test_in_a_container_without_a_writable_temporary_folder_data_dir_has_one(pictures):
    (pictures / "root").mkdir()
    old = pictures / "data" / ".tmp" / "left by a killed process"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    script = f"cd {pictures}; touch x && exit 77; cd data; {COMMAND} --until split && ls -A .tmp && {COMMAND} promote"
    done = run_in_own_mounts(
        pictures, READ_ONLY, pictures / "data", pictures / "root", script, DATA_DIR=".", HOME="/nowhere"
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert "split  " in done.stdout, done.stdout + done.stderr
    assert "left by a killed process" not in done.stdout
    assert (pictures / "data" / ".tmp").is_dir()
    assert "holds no embedded store" in done.stdout


SHM = "/dev/shm"  # noqa: S108 - the shared memory that worker processes need


@pytest.mark.parametrize(
    ("mounts", "sentence"),
    [
        (f"mount -t tmpfs -o ro tmpfs {SHM}", f"{SHM}: Read-only file system. Worker processes need shared memory"),
        (f"mount -t tmpfs -o size=4k tmpfs {SHM}; ! cat /dev/zero > {SHM}/x", f"{SHM}: No space left on device."),
        (
            "mount -t tmpfs tmpfs /mnt && touch /mnt/null && mount --bind /dev/null /mnt/null && mount -M /mnt /dev",
            f"{SHM}: No such file or directory. Worker processes need shared memory",
        ),
        (
            "mount -t tmpfs -o nr_inodes=14 tmpfs other && cp -r data/raw other && mount --move other data",
            "free, but its limit of 14 files (inodes) is reached: ",
        ),
        ("mount --bind data/raw data/raw && mount -o remount,bind,ro data/raw", None),
    ],
)
def test_the_file_system_that_lacks_something_is_named(pictures, mounts, sentence):
    (pictures / "other").mkdir()
    script = f"({mounts}) 2> /dev/null || exit 77\n{COMMAND} --until label; echo exit $?"
    done = run_in_own_mounts(pictures, script)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.endswith("exit 30\n" if sentence else "exit 0\n"), done.stdout + done.stderr
    assert (sentence or "label_map") in done.stdout.splitlines()[-2] + done.stdout
    assert "the disk is full" not in done.stdout


@pytest.mark.parametrize("removed", ["data", "data/.draft-raw"])
def test_a_folder_that_is_removed_during_a_download_is_named(fake_s3, signed, tmp_path, removed):
    started, go_on = threading.Event(), threading.Event()

    def answer(request, key, query):
        if "list-type" in query:
            send_listing(request, [f"p/{label}/{number}.png" for label in "ab" for number in range(9)])
            return
        started.set()
        go_on.wait(60)
        send(request, 200, b"abc", ETag='"e"')

    fake_s3(answer)
    process = run_pipeline(tmp_path, "--until", "label", start=True, AWS_DATA_BUCKET="bucket", AWS_DATA_PATH="p")
    assert started.wait(60)
    (tmp_path / removed).rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    go_on.set()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 30, said
    assert f"{removed} was removed while raw used it. Run again" in said
    assert "Traceback" not in said


def test_health_notices_a_single_run_that_was_killed(variables, tmp_path):
    assert run_pipeline(tmp_path, "--until", "label", **variables).returncode == 0
    path = tmp_path / "data" / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ended": "2026-01-01T03:00:00+00:00"}))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = run_pipeline(tmp_path, "--refresh", start=True, **{**variables, "AWS_ENDPOINT_URL": endpoint})
        silent.settimeout(60)
        silent.accept()
        active = run_pipeline(tmp_path, "health", **variables)
        assert (active.returncode, "succeeded" in active.stdout) == (0, True)
        process.kill()
        process.communicate()
    done = run_pipeline(tmp_path, "health", "--json", **variables)
    found = json.loads(done.stdout)
    assert (done.returncode, found["outcome"], found["exit_code"]) == (1, "failed", 128 + signal.SIGKILL)
    assert (
        f"(process {process.pid} on {socket.gethostname()}) was killed, for example because memory ran out"
        in found["message"]
    )
