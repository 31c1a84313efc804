"""The embedded default: a small real data set behind a local S3 endpoint, and the real pipeline on it.

The 1,797 handwritten digits of scikit-learn (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, 1998) become picture files of mixed formats and sizes, with what real buckets have:
uneven classes, copies, broken files, objects that are no pictures.
"""

import io
import logging
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from dgmd_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

log = logging.getLogger(__name__)
BUCKET, PREFIX = "dgmd-demo", "train/downloaded-images"
ENV_FILE, DATA_DIR = Path("demo.env"), Path("demo-data")
READY = "ready"  # key of an object that is there when all others are
SETTINGS = {
    "AWS_DATA_BUCKET": BUCKET,
    "AWS_DATA_PATH": PREFIX,
    "BACKBONE": "cnn",
    "IMAGE_WIDTH": "32",
    "IMAGE_HEIGHT": "32",
    "BALANCE_LIMIT": "1.15",  # a limit that has something to cut
    "SEED": "7",  # the same model each time on the same CPU, and a usual one: docs/measurements.md
}
LOGIN = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": "us-east-1"}
NO_MATTER = ("KERAS_HOME", "TZ", "GIT_REVISION")  # to the demo
FORMATS = (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("jpeg", "PNG"), ("bmp", "BMP"))  # scraped names lie
KEPT = (1.0, 1.0, 0.9, 1.0, 0.8, 1.0, 0.7, 1.0, 0.6, 0.5)  # of each digit: classes are uneven


def run(pipeline: Callable[[list[str]], int]) -> int:
    """Fill a bucket, write `demo.env`, call `pipeline` with it and say what came of it; return its exit code.

    Raises PipelineError where the `demo` extra is not installed.
    """
    server = _endpoint("127.0.0.1", 0)
    try:
        _, port = server.get_host_and_port()
        variables = {
            "DATA_DIR": str(DATA_DIR.resolve()),
            **SETTINGS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            **LOGIN,
            "NO_PROXY": "127.0.0.1",
        }
        _write_env_file(variables)
        foreign = _forget_own_settings()
        os.environ.update(variables)
        if not (DATA_DIR / "raw").exists():
            _fill_bucket()
        code = pipeline(["--env-file", str(ENV_FILE)])
    finally:
        server.stop()
    if code == 0:
        _say_what_next()
        foreign = [name for name in foreign if name in variables or not name.startswith(("AWS_", *NO_MATTER))]
        if foreign:
            log.warning("Your environment goes before %s: first do `unset %s`", ENV_FILE, " ".join(foreign))
    return code


def serve(port: int) -> NoReturn:
    """Fill a bucket, and offer it at this port to other containers until a signal comes.

    Raises PipelineError where the `demo` extra is not installed.
    """
    try:  # moto would wait for itself without end
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        raise PipelineError(f"The port {port} cannot be used ({error}): choose another one.") from None
    server = _endpoint("0.0.0.0", port)  # noqa: S104 - a container's network is its own
    _forget_own_settings()
    os.environ.update(LOGIN, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", NO_PROXY="127.0.0.1")
    try:
        client = _fill_bucket()
        client.put_object(Bucket=BUCKET, Key=READY, Body=b"", ACL="public-read")
        log.info("The demo's bucket %s is there, at port %d, until this is stopped.", BUCKET, port)
        while True:
            time.sleep(3600)
    finally:
        server.stop()


def _endpoint(host: str, port: int) -> "ThreadedMotoServer":
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        raise PipelineError("The demo needs a local S3 endpoint: pip install -e '.[demo]'") from None

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(host, port=port, verbose=False)
    server.start()
    return server


def _write_env_file(variables: dict[str, str]) -> None:
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    head = (
        "# The demo's settings; what is set in the environment goes before them.\n"
        "# Its S3 endpoint is there only while `python pipeline.py demo` runs.\n"
    )
    ENV_FILE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def _forget_own_settings() -> list[str]:
    """Take the caller's settings away: a demo must not reach the caller's bucket or MLflow. Return their names."""
    from dgmd_pipeline.settings import Settings, variable

    own = {variable(name) for name in Settings.model_fields}
    foreign = sorted(name for name in os.environ if name in own or name.startswith("AWS_"))
    for name in foreign:
        del os.environ[name]
    return foreign


def _fill_bucket() -> Any:
    """Return the client that did it."""
    from dgmd_pipeline.s3 import client as s3_client

    client = s3_client.connect()
    client.create_bucket(Bucket=BUCKET)
    count = 0
    for name, content in _objects():
        client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}", Body=content)
        count += 1
    log.info("Demo bucket s3://%s/%s: %d objects", BUCKET, PREFIX, count)
    return client


def _objects() -> Iterator[tuple[str, bytes]]:
    """Yield key below the prefix and content of each object."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit, kept in enumerate(KEPT):
        pictures = digits.images[digits.target == digit]
        for number, values in enumerate(pictures[: round(kept * len(pictures))]):
            extension, file_format = FORMATS[number % len(FORMATS)]
            side = 24 + 8 * (number % 6)
            yield f"{digit}/digit {digit}_{number}.{extension}", picture(values, side, file_format)
    first = picture(digits.images[digits.target == 3][0], 24, "PNG")
    yield "3/copy of digit 3_0.png", first
    yield "3/digit 3_0, larger.png", picture(digits.images[digits.target == 3][0], 48, "PNG")
    both = picture(digits.images[digits.target == 9][-1], 32, "PNG")
    yield "4/is it a 4.png", both
    yield "9/or a 9.png", both
    yield "5/cut off.jpeg", picture(digits.images[digits.target == 5][0], 64, "JPEG")[:300]
    yield "7/not a picture.jpeg", b"<html><body>404 Not Found</body></html>"
    yield "8/empty.png", b""
    yield "readme.txt", b"objects directly under the prefix have no label"
    yield "1/../../outside.png", first


def picture(values: "object", side: int, file_format: str) -> bytes:
    """Return a digit (8 x 8 numbers of 0..16) as a picture file of `side` x `side` pixels, black on white."""
    import numpy as np

    levels = (255 - np.asarray(values) * (255 / 16)).round().astype(np.uint8)
    image = Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    options = {"quality": 90} if file_format in ("JPEG", "WEBP") else {}
    image.convert("RGB").save(buffer, file_format, **options)
    return buffer.getvalue()


def _say_what_next() -> None:
    from dgmd_pipeline.workflow.provenance import read_record

    registered, evaluation = read_record(DATA_DIR / "registered_model"), read_record(DATA_DIR / "evaluation")
    if not registered or not evaluation:
        return
    name, version, accuracy = registered.counts["name"], registered.counts["version"], evaluation.counts["accuracy"]
    pipeline = f"{_own('python')} {shlex.quote(sys.argv[0])}"
    log.info(
        f"""
{name} version {version} is registered, non-production, with a validation accuracy of {accuracy:.2%}.

What next?
  # what there is to know about it, for a browser: {DATA_DIR}/evaluation/report.html
  # make it production; a later version is compared with it
  {pipeline} promote --env-file {ENV_FILE}
  # what it then says of pictures
  {pipeline} predict --env-file {ENV_FILE} {DATA_DIR}/raw/6
  # look at the registry: http://127.0.0.1:5050
  {_own("mlflow")} server --port 5050 --backend-store-uri sqlite:///{DATA_DIR}/mlflow/mlflow.db
  # what would run now
  {pipeline} plan --env-file {ENV_FILE}
  # train again from the converted files (for other parameters change {ENV_FILE})
  rm -r {DATA_DIR}/trained_model
  {pipeline} --env-file {ENV_FILE}"""
    )


def _own(command: str) -> str:
    """Return how to call a command of this very environment from here."""
    path = Path(sys.executable).with_name(command)
    return command if shutil.which(command) == str(path) else shlex.quote(os.path.relpath(path))
