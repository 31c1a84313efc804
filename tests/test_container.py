"""The images in a real Docker engine: `make test-container`. Not a part of `make test`: it builds and runs for minutes.

The pictures come from the S3 server at CONTAINER_S3 (with the AWS_* variables of the shell), or from one in a thread.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
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
SPLITS = ("training", "validation")
S3, LOGIN = (os.environ.get(name) for name in ("CONTAINER_S3", "AWS_ACCESS_KEY_ID"))
KEYS = {"AWS_ACCESS_KEY_ID": LOGIN, "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY")} if S3 else {}


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


PORT, COMPOSE_PORT, LUIGI_PORT = free_ports(3)  # PORT: of the MLflow server, in the host's network


def docker(*words, check=True, timeout=300):
    done = subprocess.run([DOCKER, *map(str, words)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def images():
    if shutil.which(DOCKER) is None or docker("version", check=False).returncode:
        pytest.skip("no Docker engine answers")
    for target in ("mlflow", "demo", "pipeline"):
        words = ["--target", target, "--tag", f"dgmd-test-{target}", "--build-arg", "GIT_REVISION=abc123"]
        docker("build", *words, ROOT, timeout=1800)


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


def logs_until(container, wanted, seconds=180, times=1):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done = docker("logs", container)
        if (done.stdout + done.stderr).count(wanted) >= times:
            return done.stdout + done.stderr
        time.sleep(0.2)
    raise AssertionError(f"no {wanted!r} in:\n{done.stdout + done.stderr}")


def healthy(container):
    """Wait until Docker knows how it is."""
    for _ in range(900):
        health = docker("inspect", "--format", "{{.State.Health.Status}}", container).stdout.strip()
        if health != "starting":
            break
        time.sleep(0.2)
    assert health == "healthy"


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
    third = deployment.run()
    assert f"{deployment.name} version 2, non-production" in third.stdout, third.stdout + third.stderr
    assert " raw " not in third.stdout.partition("Plan")[2].partition("...")[2]


def test_any_user_may_run_it_on_a_fresh_volume(deployment):
    done = deployment.run(options=["--user", "12345"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "version 1, non-production" in done.stdout


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
    assert "docker run --user 4321" in done.stdout and "PIPELINE_USER=4321" in done.stdout
    assert deployment.run("python", "pipeline.py", "health").returncode  # no run can say so there
    container = deployment.start("python", "pipeline.py", "--time", "0.5")
    assert "Traceback" not in logs_until(container, "the schedule continues", times=2)
    docker("rm", "--force", container)
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
    logs_until(container, "epoch 3/500")
    code, seconds = stopped(container)
    assert (code, seconds < 5) == (143, True), seconds
    assert json.loads(deployment.read("status.json"))["outcome"] == "stopped"
    docker("rm", container)
    deployment.start(EPOCHS=500, PATIENCE=500)
    logs = logs_until(container, "Resuming training from the checkpoint")
    assert re.search(r"^.* raw +run", logs, re.MULTILINE) is None
    assert " epoch 1/500" not in logs_until(container, " epoch 5/500")
    assert stopped(container)[0] == 143


def test_a_training_is_kept_when_mlflow_is_away_at_the_end_and_registered_when_it_is_back(deployment, mlflow_container):
    container = deployment.start(MLFLOW_HTTP_REQUEST_MAX_RETRIES=1)
    logs_until(container, "epoch 1/2")
    docker("stop", mlflow_container)
    try:
        assert docker("wait", container, timeout=200).stdout.strip() == "30"
        assert "The training is kept" in docker("logs", container).stdout
    finally:
        docker("start", mlflow_container)
        wait_for_mlflow()
    done = deployment.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{deployment.name} version 1, non-production" in done.stdout
    assert "epoch" not in done.stdout


def test_the_server_upgrades_the_database_of_an_older_mlflow_and_keeps_a_copy(images):
    volume = f"dgmd-test-old-{secrets.token_hex(4)}"
    docker("volume", "create", volume)
    try:
        words = ["run", "--rm", *LOCKED, "--volume", f"{volume}:/mlflow"]
        dump = ["--volume", f"{ROOT}/tests/support/mlflow-3.10.sql:/old.sql:ro", "--entrypoint", "python"]
        fill = "import sqlite3; sqlite3.connect('/mlflow/mlflow.db').executescript(open('/old.sql').read())"
        docker(*words, *dump, "dgmd-test-mlflow", "-c", fill)
        ask = "import mlflow; print(mlflow.MlflowClient('sqlite:////mlflow/mlflow.db').get_registered_model('jars'))"
        done = docker(*words, "dgmd-test-mlflow", "python", "-c", ask)
        assert "aliases={'candidate': 1}" in done.stdout
        assert "upgraded from schema 1b5f0d9ad7c1 to" in done.stderr
        assert "mlflow.db.1b5f0d9ad7c1.backup" in docker(*words, "dgmd-test-mlflow", "ls", "/mlflow").stdout
    finally:
        docker("volume", "rm", volume)


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
    tmp_path.chmod(0o755)
    (tmp_path / "app" / "data").mkdir(parents=True)
    shutil.copy(ROOT / "pipeline.py", tmp_path / "app")
    shutil.copytree(ROOT / "dgmd_pipeline", tmp_path / "app" / "dgmd_pipeline")
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    module = tmp_path / "app" / "dgmd_pipeline" / "cli.py"
    module.write_text(module.read_text().replace("exit codes:", "codes of the mounted code:"))
    deployment.volume = ["--volume", f"{tmp_path}/app:/app", "--volume", f"{tmp_path}/data:/app/data"]
    shown = deployment.run("python", "pipeline.py", "--help")
    assert "codes of the mounted code:" in shown.stdout, shown.stdout + shown.stderr
    done = deployment.run("python", "pipeline.py", "--until", "label", "--time", "0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_cpu_quota_limits_processes_and_the_threads_of_libraries(images):
    code = """
import json, os
from dgmd_pipeline import settings
from dgmd_pipeline.workflow import executors, machine
settings.load()
import numpy, tensorflow, threadpoolctl
numpy.ones((99, 99)) @ numpy.ones((99, 99))
tensorflow.ones((9, 9)) @ tensorflow.ones((9, 9))
blas = {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}
threads = len(os.listdir("/proc/self/task"))
print(json.dumps([machine.cores(), executors.ProcessExecutor()._processes, *blas, threads]))
"""
    cores = os.cpu_count()
    counts = []
    for quota in ("0.5", str(cores)):
        done = docker("run", "--rm", "--cpus", quota, *LOCKED, "dgmd-test-pipeline", "python", "-c", code)
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts[0][:3] == [1, 1, 1]
    assert counts[1][:3] == [cores] * 3
    assert cores == 1 or counts[0][3] < counts[1][3]


def test_the_image_says_what_it_is(images):
    labels = json.loads(docker("inspect", "--format", "{{json .Config.Labels}}", "dgmd-test-pipeline").stdout)
    named = {name.rpartition(".")[2] for name in labels if name.startswith("org.opencontainers.image.")}
    assert named == {"title", "description", "source", "revision", "version"}
    assert labels["org.opencontainers.image.revision"] == "abc123"
    docker("build", "--target", "pipeline", "--tag", "dgmd-test-plain", ROOT, timeout=1800)
    labels = json.loads(docker("inspect", "--format", "{{json .Config.Labels}}", "dgmd-test-plain").stdout)
    assert labels["org.opencontainers.image.revision"] == labels["org.opencontainers.image.source"] == "unknown"


def test_the_image_holds_nothing_that_it_does_not_need(images):
    unwanted = ["cc", "gcc", "pip.whl", "tests", ".cache", ".git", ".env", "lock.txt"]
    names = " -o ".join(f"-name '{name}'" for name in unwanted)
    find = f"find /app /home /opt /root /tmp /usr/bin /usr/local/bin \\( {names} \\); ls -A /app"
    found = docker("run", "--rm", "--user", "0", "dgmd-test-pipeline", "sh", "-c", find).stdout.split()
    assert found == ["data", "dgmd_pipeline", "pipeline.py", "requirements.txt", "setup.py"]


@pytest.mark.parametrize("target", ["pipeline", "mlflow"])
def test_the_image_holds_no_private_key_installer_test_or_setuid_program(images, target):
    find = """
        find / -xdev -type f -perm /6000
        find / -xdev \\( -name '*.key' -o -name '*.whl' -o -name ensurepip \\)
        find / -xdev \\( -path '*/bin/pip*' -o -path '*/site-packages/pip' \\)
        find /usr/local/lib/python3.*/site-packages -name '*.dist-info'
        find /opt -type d \\( -name test -o -name tests \\) -not -path '*/tensorflow/*'
        grep -rl --include='*.pem' 'PRIVATE KEY' /opt /app /etc /usr
        true"""
    assert docker("run", "--rm", "--user", "0", f"dgmd-test-{target}", "sh", "-c", find).stdout == ""


def test_the_demo_runs_in_its_image_without_a_network(images):
    done = docker("run", "--rm", "--network", "none", *LOCKED, "dgmd-test-demo", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dgmd_model version 1, non-production" in done.stdout


@pytest.fixture(scope="module")
def compose():
    """The command: docker compose, or the older docker-compose."""
    words = [DOCKER, "compose"]
    if subprocess.run([*words, "version"], capture_output=True).returncode:
        words = ["docker-compose"]
        if shutil.which(*words) is None:
            pytest.skip("neither docker compose nor docker-compose is there")
    return words


@pytest.fixture
def project(images, compose, tmp_path):
    """A compose project of the shipped file: a function that calls it, and the address of its MLflow."""
    for target, name in (("mlflow", "dgmd_mlflow"), ("demo", "dgmd_demo"), ("pipeline", "dgmd_model_pipeline")):
        docker("tag", f"dgmd-test-{target}", name)
    name = f"dgmd-test-{secrets.token_hex(4)}"
    base = [*compose, "--project-name", name, "--file", str(ROOT / "docker-compose.yml")]
    address = f"127.0.0.1:{COMPOSE_PORT}"

    def call(*words, **variables):
        environment = {**os.environ, "MLFLOW_ADDRESS": address, **variables}
        return subprocess.run([*base, *words], capture_output=True, text=True, timeout=600, env=environment)

    yield call, address
    profiles = [f"--profile={each}" for each in ("demo", "once", "schedule", "luigid", "cluster")]
    call(*profiles, "down", "--volumes")


def test_compose_runs_the_demo_to_a_registered_model(project):
    call, address = project
    up = call("--profile", "demo", "up", "--exit-code-from", "demo-pipeline")
    assert up.returncode == 0, up.stdout + up.stderr
    assert "demo version 1, non-production" in up.stdout
    assert f"The demo is over. MLflow is still running; http://{address} shows" in up.stdout
    assert call("up", "--detach", "mlflow").returncode == 0
    search = f"http://{address}/api/2.0/mlflow/registered-models/search"
    for _ in range(300):
        try:
            found = json.load(urllib.request.urlopen(search, timeout=5))
            break
        except OSError:
            time.sleep(0.5)
    assert [model["name"] for model in found["registered_models"]] == ["demo"]
    mlflow = call("ps", "--quiet", "mlflow").stdout.strip()
    healthy(mlflow)
    logs = docker("logs", mlflow)
    assert "/health" not in logs.stdout + logs.stderr
    assert docker("inspect", "--format", "{{.Config.StopTimeout}}", mlflow).stdout.strip() == "60"


def test_compose_runs_the_pipeline_on_one_s_own_bucket_once_and_on_a_schedule(project, tmp_path):
    """With the demo's bucket as one's own, over the same network."""
    call, _ = project
    assert call("--profile", "demo", "up", "--detach", "demo-bucket").returncode == 0
    own = {"AWS_ENDPOINT_URL": "http://demo-bucket:9000", "AWS_DATA_BUCKET": "dgmd-demo", "BACKBONE": "cnn"}
    keys = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo"}
    healthy(call("ps", "--quiet", "demo-bucket", COMPOSE_PROFILES="demo").stdout.strip())  # it has been filled
    run = call("run", "--rm", "model-pipeline", "python", "pipeline.py", "--until", "label", **own, **keys)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "10 labels, 10 outputs" in run.stdout
    who = ["python", "-c", "from dgmd_pipeline.settings import operator; print(operator())"]
    assert call("run", "--rm", "model-pipeline", *who, USER="ada").stdout.startswith("ada@")
    (tmp_path / "authority.pem").write_text("a certificate")
    bundle = {"CA_FILE": str(tmp_path / "authority.pem"), "AWS_CA_BUNDLE": "/certs/ca.pem"}
    shown = call("run", "--rm", "model-pipeline", "sh", "-c", "cat $AWS_CA_BUNDLE", **bundle)
    assert shown.stdout == "a certificate", shown.stderr
    without_file = call("run", "--rm", "model-pipeline", AWS_CA_BUNDLE="/certs/ca.pem")
    assert without_file.returncode == 2
    assert "AWS_CA_BUNDLE=/certs/ca.pem" in without_file.stdout + without_file.stderr
    refused = call("run", "--rm", "model-pipeline", **{**own, **keys, "AWS_DATA_PATH": "elsewhere"})
    assert refused.returncode == 20, refused.stdout + refused.stderr
    small = {"IMAGE_WIDTH": "32", "IMAGE_HEIGHT": "32", "EPOCHS": "2"}
    once = call("up", "--detach", **own, **keys, **small, COMPOSE_PROFILES="once")
    assert once.returncode == 0, once.stdout + once.stderr
    container = call("ps", "--quiet", "model-pipeline", COMPOSE_PROFILES="once").stdout.strip()
    assert docker("wait", container).stdout.strip() == "0", docker("logs", container).stdout
    assert "version 1, non-production" in docker("logs", container).stdout
    every_minute = {"COMPOSE_PROFILES": "schedule", "SCHEDULE": "* * * * *"}
    assert call("up", "--detach", **own, **keys, **small, **every_minute).returncode == 0
    container = call("ps", "--quiet", "model-pipeline-scheduled", **every_minute).stdout.strip()
    logs_until(container, "Nothing new in s3://dgmd-demo/train/downloaded-images: keeping version 1.")
    healthy(container)
    assert call("stop", "model-pipeline-scheduled", **every_minute).returncode == 0
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip() == "143"
    assert call("start", "model-pipeline-scheduled", **every_minute).returncode == 0
    ended = re.search(r"docker compose (--profile schedule rm .*)", (ROOT / ".env.example").read_text())[1]
    assert call(*ended.split(), COMPOSE_PROFILES="once").returncode == 0
    assert docker("ps", "--quiet", "--filter", f"id={container}").stdout == ""


def test_compose_lets_only_the_operator_s_account_promote_if_mlflow_requires_a_login(project):
    call, _ = project
    passwords = {"MLFLOW_OPERATOR_PASSWORD": "day after day", "MLFLOW_PIPELINE_PASSWORD": "night after night"}
    account = {"MLFLOW_TRACKING_USERNAME": "pipeline", "MLFLOW_TRACKING_PASSWORD": "night after night"}
    half = {**passwords, "MLFLOW_PIPELINE_PASSWORD": ""}
    assert call("up", "--detach", "mlflow", **half).returncode == 0
    container = call("ps", "--all", "--quiet", "mlflow", **half).stdout.strip()
    logs_until(container, "MLFLOW_PIPELINE_PASSWORD: expected at least 12 characters, found 0")

    own = {"AWS_ENDPOINT_URL": "http://demo-bucket:9000", "AWS_DATA_BUCKET": "dgmd-demo", **passwords, **account}
    own |= {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "BACKBONE": "cnn", "EPOCHS": "2"}
    own |= {"IMAGE_WIDTH": "32", "IMAGE_HEIGHT": "32"}
    assert call("--profile", "demo", "up", "--detach", "demo-bucket", "mlflow", **own).returncode == 0
    healthy(call("ps", "--quiet", "demo-bucket", COMPOSE_PROFILES="demo", **own).stdout.strip())
    run = call("run", "--rm", "model-pipeline", **own)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "version 1, non-production" in run.stdout
    promote = ["model-pipeline", "python", "pipeline.py", "promote", "--yes"]
    refused = call("run", "--rm", *promote, **own)
    assert refused.returncode == 30, refused.stdout + refused.stderr
    assert "the account pipeline may not change which version is production" in refused.stdout.splitlines()[-1]
    operator = ["-e", "MLFLOW_TRACKING_USERNAME=operator", "-e", "MLFLOW_TRACKING_PASSWORD"]
    promoted = call("run", "--rm", *operator, *promote, **{**own, "MLFLOW_TRACKING_PASSWORD": "day after day"})
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    assert "version 1 is production" in promoted.stdout
    again = call("up", "--detach", "mlflow", **dict.fromkeys(passwords, ""))  # accounts remain, but no passwords
    assert again.returncode == 0, again.stdout + again.stderr
    container = call("ps", "--all", "--quiet", "mlflow").stdout.strip()
    logs_until(
        container, "accounts.db has accounts, but MLFLOW_OPERATOR_PASSWORD and MLFLOW_PIPELINE_PASSWORD are not set"
    )


def test_compose_starts_a_luigi_scheduler(project):
    call, _ = project
    up = call("up", "--detach", "luigid", COMPOSE_PROFILES="luigid", LUIGID_ADDRESS=f"127.0.0.1:{LUIGI_PORT}")
    assert up.returncode == 0, up.stdout + up.stderr
    healthy(call("ps", "--quiet", "luigid", COMPOSE_PROFILES="luigid").stdout.strip())
    with urllib.request.urlopen(f"http://127.0.0.1:{LUIGI_PORT}/api/task_list?data={{}}", timeout=5) as answer:
        assert json.load(answer)["response"] == {}


def test_compose_runs_the_heavy_steps_on_a_dask_cluster_as_on_one_machine(project, tmp_path):
    call, _ = project
    assert call("--profile", "demo", "up", "--detach", "demo-bucket").returncode == 0
    healthy(call("ps", "--quiet", "demo-bucket", COMPOSE_PROFILES="demo").stdout.strip())
    bucket = {"AWS_ENDPOINT_URL": "http://demo-bucket:9000", "AWS_DATA_BUCKET": "dgmd-demo"}
    keys = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo"}
    network = {"BACKBONE": "MobileNetV3-Small", "BACKBONE_WEIGHTS": "none", "IMAGE_WIDTH": "32", "IMAGE_HEIGHT": "32"}
    variables = {**bucket, **keys, **network, "SEED": "7"}

    def run(*words, **more):
        done = call("run", "--rm", "model-pipeline", *words, **variables, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def results(**more):
        """The version, its accuracy, and the checksums of the records."""
        status = json.loads(run("cat", "data/status.json", **more))
        index = [json.loads(run("cat", f"data/tfrecord_{split}/index.json", **more)) for split in SPLITS]
        return status["version"], status["accuracy"], index

    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    alone = {"PIPELINE_DATA": str(tmp_path / "data"), "MODEL_NAME": "alone"}
    run(**alone)
    up = call("--profile", "cluster", "up", "--detach", "--scale", "dask-worker=2", **variables)
    assert up.returncode == 0, up.stdout + up.stderr
    containers = call("ps", "--quiet", "dask-scheduler", "dask-worker", COMPOSE_PROFILES="cluster").stdout.split()
    assert len(containers) == 3
    for each in containers:
        host = json.loads(docker("inspect", "--format", "{{json .HostConfig}}", each).stdout)
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Privileged"]
        assert host["Memory"] and host["RestartPolicy"]["Name"] == "unless-stopped"
    healthy(call("ps", "--quiet", "dask-scheduler", COMPOSE_PROFILES="cluster").stdout.strip())
    together = {"DASK_SCHEDULER_ADDRESS": "tcp://dask-scheduler:8786", "MODEL_NAME": "together"}
    assert "2 workers" in run(**together)
    (version, accuracy, records), (of_one, accuracy_of_one, records_of_one) = results(**together), results(**alone)
    assert (version, records) == (of_one, records_of_one) == (1, records)
    assert accuracy == pytest.approx(accuracy_of_one, abs=0.01)  # features are equal within rounding
