"""Luigi's own commands, configurations and scheduler, with the real command in a process."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from conftest import environment_with, picture, run_pipeline, wait_for

BIN = Path(sys.executable).parent
SETTINGS = {"BACKBONE": "cnn", "IMAGE_WIDTH": 16, "IMAGE_HEIGHT": 16, "NUM_SHARDS": 1, "EPOCHS": 1, "SEED": 1}
FOREIGN = {
    "several workers": "[core]\nworkers=4\nparallel_scheduling=true\n",
    "a task limit": "[worker]\ntask_limit=2\n",
    "a time limit": "[worker]\ntimeout=1\n",
    "another scheduler": "[core]\ndefault-scheduler-url=http://127.0.0.1:9\nlocal_scheduler=false\n",
    "processes for tasks": "[worker]\nforce_multiprocessing=true\ncheck_complete_on_run=true\n",
}


@pytest.fixture
def data_dir(tmp_path):
    """A DATA_DIR with images of two labels that were put there by hand."""
    for label in ("allspice", "anise"):
        (tmp_path / "data" / "raw" / label).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "data" / "raw" / label / f"{number}.png").write_bytes(picture(label, number))
    return tmp_path / "data"


def luigi_command(name, folder, *words, **variables):
    command = [BIN / name, "--module", "dgmd_pipeline.tasks", *words]
    environment = environment_with(SETTINGS | variables)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_luigi_runs_the_whole_pipeline_and_shows_its_tree(data_dir, tmp_path):
    before = luigi_command("luigi-deps-tree", tmp_path, "RegisterModel", DATA_DIR=data_dir)
    assert before.returncode == 0, before.stderr
    assert before.stdout.count("PENDING") and "DownloadImages" in before.stdout
    result = luigi_command("luigi", tmp_path, "RegisterModel", "--local-scheduler", DATA_DIR=data_dir)
    assert result.returncode == 0, result.stderr
    assert "1 RegisterModel(" in result.stderr
    assert json.loads((data_dir / "registered_model" / "version.json").read_text())["version"] == 1
    after = luigi_command("luigi-deps-tree", tmp_path, "RegisterModel", DATA_DIR=data_dir)
    assert "PENDING" not in after.stdout
    assert after.stdout.count("COMPLETE") == before.stdout.count("PENDING") + before.stdout.count("COMPLETE")


def test_two_luigi_workers_do_one_step_at_a_time(data_dir, tmp_path):
    words = ["WriteTFRecords", "--split", "validation", "--local-scheduler", "--workers", "2"]
    result = luigi_command("luigi", tmp_path, *words, DATA_DIR=data_dir)
    assert result.returncode == 0, result.stderr
    assert (data_dir / "tfrecord_validation" / "_SUCCESS").is_file()


def test_a_step_that_luigi_runs_waits_for_no_other_run_but_says_that_there_is_one(data_dir, tmp_path):
    from dgmd_pipeline.workflow import lock

    with lock.hold(data_dir):
        result = luigi_command("luigi", tmp_path, "InspectImages", "--local-scheduler", DATA_DIR=data_dir)
    assert "is in use by another run" in result.stderr
    assert not (data_dir / "inspected").exists()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_configuration_changes_nothing(name, data_dir, tmp_path):
    (tmp_path / "luigi.cfg").write_text(FOREIGN[name])
    result = run_pipeline(tmp_path, "--until", "convert", **SETTINGS, DATA_DIR=data_dir)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (data_dir / "tfrecord_validation" / "_SUCCESS").is_file()
    assert "warning" not in result.stdout


@pytest.mark.parametrize("command", ["run", "plan", "models"])
def test_a_configuration_that_cannot_be_read_is_one_sentence(command, data_dir, tmp_path):
    (tmp_path / "luigi.cfg").write_text("[core\nworkers=4\n")
    result = run_pipeline(tmp_path, command, **SETTINGS, DATA_DIR=data_dir)
    assert result.returncode == 2
    assert "Luigi's configuration cannot be read (File contains no section headers. file: 'luigi.cfg'" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "variables",
    [{"LUIGI_CONFIG_PATH": "missing.cfg"}, {"LUIGI_CONFIG_PARSER": "toml"}],
)
def test_a_configuration_that_is_missing_or_of_another_kind_is_one_sentence(variables, data_dir, tmp_path):
    result = run_pipeline(tmp_path, "plan", **SETTINGS, **variables, DATA_DIR=data_dir)
    assert result.returncode == 2
    assert len(result.stdout.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def luigid(tmp_path_factory):
    """A real Luigi scheduler: its URL."""
    folder = tmp_path_factory.mktemp("luigid")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BIN / "luigid", "--address", "127.0.0.1", "--port", str(port), "--state-path", folder / "state"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    wait_for(f"{url}/api/task_list", server)
    yield url
    server.kill()
    server.wait()


def tasks_at(url, model):
    """The tasks of a run on the scheduler's page, by family and split."""
    found = {}
    for status in ("PENDING", "RUNNING", "DONE", "FAILED"):
        data = urllib.parse.quote(json.dumps({"status": status, "upstream_status": "", "max_shown_tasks": 1000}))
        with urllib.request.urlopen(f"{url}/api/task_list?data={data}") as answer:
            for task in json.load(answer)["response"].values():
                if task["params"]["deployment"].startswith(f"{model}-"):
                    found[task["name"], task["params"].get("split", "")] = task
    return found


@pytest.mark.slow
def test_a_finished_run_is_on_the_page_of_the_scheduler(luigid, data_dir, tmp_path):
    variables = SETTINGS | {"DATA_DIR": data_dir, "MODEL_NAME": "finished", "LUIGI_SCHEDULER_URL": luigid}
    process = run_pipeline(tmp_path, start=True, **variables)
    seen, messages = set(), set()
    while process.poll() is None:
        for task in tasks_at(luigid, "finished").values():
            seen.add(task["status"])
            messages.add(task["status_message"] or "")
        time.sleep(0.1)
    assert process.returncode == 0, process.stdout.read()
    assert {"PENDING", "RUNNING", "DONE"} <= seen
    assert any(message.startswith("epoch 1: loss") for message in messages)
    found = tasks_at(luigid, "finished")
    assert {task["status"] for task in found.values()} == {"DONE"}
    assert len(found) == 10, " ".join(map("-".join, found))
    assert found["RegisterModel", ""]["tracking_url"]


def test_a_failed_run_is_on_the_page_and_so_is_its_reason(luigid, data_dir, tmp_path):
    for path in (data_dir / "raw" / "anise").iterdir():
        path.write_bytes(b"no image")
    (tmp_path / "luigi.cfg").write_text(
        f"[core]\nscheduler_host=127.0.0.1\nscheduler_port={luigid.rpartition(':')[2]}\n"
    )
    variables = SETTINGS | {"DATA_DIR": data_dir, "MODEL_NAME": "failed", "LUIGI_CONFIG_PATH": tmp_path / "luigi.cfg"}
    result = run_pipeline(tmp_path, **variables)
    assert result.returncode == 20
    found = tasks_at(luigid, "failed")
    assert found["InspectImages", ""]["status"] == "DONE"
    assert found["MapLabels", ""]["status"] == "FAILED"
    data = urllib.parse.quote(json.dumps({"task_id": next(iter(ids_of(luigid, "FAILED", "failed")))}))
    with urllib.request.urlopen(f"{luigid}/api/fetch_error?data={data}") as answer:
        assert "More than 50 % of the files cannot be decoded" in json.load(answer)["response"]["error"]


def ids_of(url, status, model):
    data = urllib.parse.quote(json.dumps({"status": status, "upstream_status": ""}))
    with urllib.request.urlopen(f"{url}/api/task_list?data={data}") as answer:
        tasks = json.load(answer)["response"]
    return [name for name, task in tasks.items() if task["params"]["deployment"].startswith(f"{model}-")]


def test_a_scheduler_that_is_away_is_a_warning(data_dir, tmp_path):
    with contextlib.closing(socket.socket()) as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:s3cr3t@127.0.0.1:{taken.getsockname()[1]}"
        variables = SETTINGS | {"DATA_DIR": data_dir, "LUIGI_SCHEDULER_URL": url}
        result = run_pipeline(tmp_path, "--until", "split", **variables)
    assert result.returncode == 0, result.stdout
    warnings = [line for line in result.stdout.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0] and "The run continues without it." in warnings[0]
    assert "s3cr3t" not in result.stdout
