"""The images in a real Docker engine: `make test-container`. Not a part of `make test`: it builds and runs for minutes.

The pictures come from the S3 server at CONTAINER_S3 (with the AWS_* variables of the shell), or from one in a thread.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import time
import urllib.request

import boto3
import pytest
from conftest import CREDENTIALS, ROOT, picture

pytestmark = [pytest.mark.container, pytest.mark.slow]
DOCKER = os.environ.get("DOCKER", "docker")
LOCKED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]  # noqa: S108
TINY = {"BACKBONE": "cnn", "IMAGE_WIDTH": 16, "IMAGE_HEIGHT": 16, "NUM_SHARDS": 2, "EPOCHS": 2, "SEED": 1}
PORT = 5077  # of the MLflow server, in the host's network
S3, LOGIN = (os.environ.get(name) for name in ("CONTAINER_S3", "AWS_ACCESS_KEY_ID"))
KEYS = {"AWS_ACCESS_KEY_ID": LOGIN, "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY")} if S3 else {}


def docker(*words, check=True, timeout=300):
    done = subprocess.run([DOCKER, *map(str, words)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def images():
    if shutil.which(DOCKER) is None or docker("version", check=False).returncode:
        pytest.skip("no Docker engine answers")
    for target in ("mlflow", "demo", "pipeline"):
        docker("build", "--target", target, "--tag", f"dgmd-test-{target}", ROOT, timeout=1800)


@pytest.fixture(scope="module")
def mlflow_container(images):
    """An MLflow server in a container; its name and address."""
    name = f"dgmd-test-mlflow-{secrets.token_hex(4)}"
    serve = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1"]
    docker("run", "--detach", "--name", name, "--network", "host", *LOCKED, "dgmd-test-mlflow", *serve)
    wait_for_mlflow()
    yield name
    docker("rm", "--force", "--volumes", name)


def wait_for_mlflow():
    for _ in range(600):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the MLflow server does not answer")


class Deployment:
    """A bucket, a volume and the variables of a run."""

    def __init__(self, endpoint):
        self.name = f"dgmd-test-{secrets.token_hex(4)}"
        keys = KEYS or CREDENTIALS
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )
        self.client.create_bucket(Bucket=self.name)
        self.volume = ["--volume", f"{self.name}:/app/data"]
        self.variables = {
            **TINY,
            **keys,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_DATA_BUCKET": self.name,
            "AWS_DATA_PATH": "train",
            "MODEL_NAME": self.name,
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{PORT}",
        }
        for label in ("allspice", "black pepper", "cloves"):
            self.put(label, range(8))

    def put(self, label, numbers):
        for number in numbers:
            self.client.put_object(
                Bucket=self.name, Key=f"train/{label}/{label} {number}.jpeg", Body=picture(label, number)
            )

    def words(self, *options, **variables):
        environment = [f"--env={name}={value}" for name, value in {**self.variables, **variables}.items()]
        return ["--network", "host", *LOCKED, *self.volume, *environment, *options, "dgmd-test-pipeline"]

    def run(self, *command, options=(), **variables):
        return docker("run", "--rm", *self.words(*options, **variables), *command, check=False)

    def start(self, *command, **variables):
        """Start it without waiting; return the container's name."""
        docker("run", "--detach", "--name", self.name, *self.words(**variables), *command)
        return self.name

    def read(self, path):
        return self.run("cat", f"data/{path}").stdout


@pytest.fixture
def deployment(mlflow_container, request):
    made = Deployment(S3 or request.getfixturevalue("s3_endpoint"))
    yield made
    docker("rm", "--force", made.name, check=False)
    docker("volume", "rm", "--force", made.name, check=False)


def logs_until(container, wanted, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done = docker("logs", container)
        if wanted in done.stdout + done.stderr:
            return done.stdout + done.stderr
        time.sleep(0.2)
    raise AssertionError(f"no {wanted!r} in:\n{done.stdout + done.stderr}")


def stopped(container):
    """Stop it as an operator does; return its exit code and the seconds that it took."""
    start = time.monotonic()
    docker("stop", container)
    seconds = time.monotonic() - start
    return int(docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout), seconds


def test_a_run_registers_a_model_a_second_one_does_nothing_and_without_the_model_it_trains_again(deployment):
    first = deployment.run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"{deployment.name} version 1, non-production" in first.stdout
    second = deployment.run()
    assert second.returncode == 0
    (line,) = second.stdout.splitlines()
    assert "Nothing to do" in line
    assert deployment.run("rm", "-r", "data/trained_model").returncode == 0
    third = deployment.run(LEARNING_RATE=0.02)
    assert f"{deployment.name} version 2, non-production" in third.stdout, third.stdout + third.stderr
    assert " raw " not in third.stdout.partition("Plan")[2].partition("...")[2]


def test_any_user_may_run_it_on_a_fresh_volume(deployment):
    done = deployment.run("python", "pipeline.py", "--until", "label", options=["--user", "12345"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_or_a_credentials_file_of_somebody_else_is_answered_with_the_command_that_mends_it(
    deployment, tmp_path
):
    (tmp_path / "data").mkdir()
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    for path in (tmp_path / "data", tmp_path / "credentials"):
        path.chmod(0o700)
        os.chown(path, 4321, 4321)
    deployment.volume = ["--volume", f"{tmp_path}/data:/app/data"]
    done = deployment.run()
    assert done.returncode == 30
    assert len(done.stdout.splitlines()) == 1
    assert "chown -R 1000" in done.stdout and "--user" in done.stdout
    mended = deployment.run("python", "pipeline.py", "--until", "label", options=["--user", "4321"])
    assert mended.returncode == 0, mended.stdout + mended.stderr

    deployment.volume = ["--volume", f"{tmp_path}/credentials:/secrets/aws_credentials:ro"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del deployment.variables[name]
    done = deployment.run(AWS_SHARED_CREDENTIALS_FILE="/secrets/aws_credentials")
    assert done.returncode == 20
    assert "chown 1000 /secrets/aws_credentials" in done.stdout and "--user 4321" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_run_that_docker_stops_ends_in_time_and_the_next_one_goes_on(deployment):
    container = deployment.start(EPOCHS=500, PATIENCE=500)
    logs_until(container, "epoch 2/500")
    code, seconds = stopped(container)
    assert (code, seconds < 5) == (143, True), seconds
    assert json.loads(deployment.read("status.json"))["outcome"] == "stopped"
    docker("rm", container)
    done = deployment.run("python", "pipeline.py", "--until", "train", EPOCHS=500, PATIENCE=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on" in done.stdout or "epoch 3/" in done.stdout
    assert re.search(r"raw +run", done.stdout) is None


def test_a_training_is_kept_when_mlflow_is_away_at_the_end_and_registered_when_it_is_back(deployment, mlflow_container):
    container = deployment.start(MLFLOW_HTTP_REQUEST_MAX_RETRIES=1)
    logs_until(container, "epoch 1/2")
    docker("stop", mlflow_container)
    try:
        assert docker("wait", container, timeout=200).stdout.strip() == "30"
        assert "the next run only registers" in docker("logs", container).stdout
    finally:
        docker("start", mlflow_container)
        wait_for_mlflow()
    done = deployment.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{deployment.name} version 1, non-production" in done.stdout
    assert "epoch" not in done.stdout


def test_a_schedule_takes_what_is_new_and_a_stop_ends_it_in_time(deployment):
    container = deployment.start("python", "pipeline.py", "--until", "label", SCHEDULE="* * * * *", TZ="Europe/Berlin")
    assert " CE" in logs_until(container, "Next run: ")
    logs_until(container, "3 labels, 3 outputs")
    deployment.put("dill", range(3))
    logs_until(container, "4 labels, 4 outputs")
    logs_until(container, "Nothing new in")
    health = docker("exec", container, "python", "pipeline.py", "health")
    assert "unchanged after" in health.stdout
    code, seconds = stopped(container)
    assert (code, seconds < 5) == (143, True), seconds


def test_code_that_is_mounted_over_the_image_s_is_what_runs(deployment, tmp_path):
    """As deployments before this image did: ../model_training_pipeline:/app, ./data:/app/data."""
    for name in ("pipeline.py", "dgmd_pipeline"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir(mode=0o777)
    (tmp_path / "data").chmod(0o777)
    source = (tmp_path / "dgmd_pipeline" / "cli.py").read_text()
    (tmp_path / "dgmd_pipeline" / "cli.py").write_text(source.replace("exit codes:", "codes of the mounted code:"))
    deployment.volume = ["--volume", f"{tmp_path}:/app", "--volume", f"{tmp_path}/data:/app/data"]
    assert "codes of the mounted code:" in deployment.run("python", "pipeline.py", "--help").stdout
    done = deployment.run("python", "pipeline.py", "--until", "label", "--time", "0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_holds_nothing_that_it_does_not_need(deployment):
    found = deployment.run("sh", "-c", "ls -A /app /tmp /root; ls /usr/bin/gcc /usr/bin/cc; id -u; pip list --path x")
    assert "gcc: No such file" not in found.stdout
    names = set(found.stdout.split())
    assert {"pipeline.py", "dgmd_pipeline"} <= names
    assert not names & {"tests", ".git", ".env", "benchmarks", "gcc", ".cache", "lock.txt"}
    assert "1000" in names


def test_the_demo_runs_in_its_image_without_a_network(images):
    done = docker("run", "--rm", "--network", "none", *LOCKED, "dgmd-test-demo", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dgmd_model version 1 is registered" in done.stdout


@pytest.fixture(scope="module")
def compose():
    """The command: docker compose, or the older docker-compose."""
    words = [DOCKER, "compose"]
    if subprocess.run([*words, "version"], capture_output=True).returncode:
        words = ["docker-compose"]
        if shutil.which(*words) is None:
            pytest.skip("neither docker compose nor docker-compose is there")
    return words


def test_compose_runs_the_demo_to_a_registered_model(images, compose, tmp_path):
    for target in ("mlflow", "demo"):
        docker("tag", f"dgmd-test-{target}", f"dgmd_{target}")
    docker("tag", "dgmd-test-pipeline", "dgmd_model_pipeline")
    project = f"dgmd-test-{secrets.token_hex(4)}"
    base = [*compose, "--project-name", project, "--file", str(ROOT / "docker-compose.yml"), "--profile", "demo"]
    environment = {**os.environ, "MLFLOW_ADDRESS": f"127.0.0.1:{PORT + 1}"}

    def call(*words):
        return subprocess.run([*base, *words], capture_output=True, text=True, timeout=600, env=environment)

    try:
        up = call("up", "--exit-code-from", "demo-pipeline")
        assert up.returncode == 0, up.stdout + up.stderr
        assert "demo version 1, non-production" in up.stdout
        assert call("up", "--detach", "mlflow").returncode == 0
        search = f"http://127.0.0.1:{PORT + 1}/api/2.0/mlflow/registered-models/search"
        for _ in range(300):
            try:
                found = json.load(urllib.request.urlopen(search, timeout=5))
                break
            except OSError:
                time.sleep(0.5)
        assert [model["name"] for model in found["registered_models"]] == ["demo"]
    finally:
        call("down", "--volumes")
