import contextlib
import logging
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from dgmd_pipeline import cli
from dgmd_pipeline.commands import logs
from dgmd_pipeline.workflow import signals

pytestmark = pytest.mark.usefixtures("_own_process")


@pytest.mark.parametrize("arguments", [["--env-file", "my.env", "plan"], ["plan", "--env-file", "my.env"]])
def test_options_may_stand_before_and_after_the_command(arguments, capsys, tmp_path):
    (tmp_path / "my.env").write_text("EPOCHS=0\n")
    assert cli.main(arguments) == 2
    assert "EPOCHS=0: expected a whole number of at least 1 and at most 1,000,000." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["plan", "too much"],
        ["plan", "--only-if-better"],
        ["--time", "-1"],
        ["health", "--max-age", "0"],
        ["health", "--max-age", "nan"],
    ],
)
def test_an_invalid_argument_shows_the_usage_and_exits_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(arguments)
    assert exited.value.code == 2
    assert "usage: pipeline.py" in capsys.readouterr().err


def test_demo_accepts_no_options_of_run(capsys):
    assert cli.main(["--until", "split", "--only-if-better", "demo", "--env-file", "my.env"]) == 2
    assert "demo does not accept --env-file, --until, --only-if-better. After the demo, use" in capsys.readouterr().out


def test_the_help_names_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["--help"])
    assert exited.value.code == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("run ", "plan ", "demo ", "  143 "))


def test_log_lines_hide_passwords_in_arguments_and_tracebacks(capsys):
    logs.start(sys.stdout, verbose=False)
    log = logging.getLogger("dgmd_pipeline.test")
    log.info("at %s", "http://me:s3cr3t@host/")
    try:
        raise ValueError("no http://me:s3cr3t@host/")
    except ValueError:
        log.exception("failed")
    output = capsys.readouterr().out
    assert "http://host/" in output
    assert "error: failed" in output
    assert "Traceback" in output
    assert "s3cr3t" not in output


def test_log_lines_have_a_time_with_its_zone_and_no_control_characters(capsys):
    logs.start(sys.stdout, verbose=False)
    logging.getLogger("dgmd_pipeline.test").warning("%s\n%s", "a\rb\x1b[2J\x07\x9b\tc", "café\U0001f600")
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d warning: a\\rb\\x1b\[2J\\x07\\x9b\tc", first)
    assert second == "café\U0001f600"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_swallows_ends_the_command(monkeypatch, number, code):
    def command(_):
        with contextlib.suppress(KeyboardInterrupt):  # as TensorFlow does while it traces a function
            signal.raise_signal(number)
        signals.check_stopped()

    monkeypatch.setattr(cli, "_plan", command)
    assert cli.main(["plan"]) == code


def test_a_closed_pipe_shows_no_traceback(tmp_path):
    command = f"{sys.executable} {ROOT / 'pipeline.py'} plan | head -n 1"
    result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "Plan for data" in result.stdout
    assert "Traceback" not in result.stderr
    assert "Logging error" not in result.stderr
