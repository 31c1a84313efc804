"""The command `demo`: serves a small real data set at a local S3 endpoint and runs the pipeline on this data set.

The 1,797 handwritten digits of scikit-learn (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, 1998) become image files of mixed formats and sizes. The bucket has the defects of real
data: imbalanced classes, duplicates, damaged files, and objects that are not images.
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
from typing import TYPE_CHECKING, NoReturn

import dotenv
from PIL import Image

from dgmd_pipeline.errors import PipelineError

if TYPE_CHECKING:
    import numpy as np
    from moto.server import ThreadedMotoServer

log = logging.getLogger(__name__)
BUCKET, PREFIX = "dgmd-demo", "train/downloaded-images"
ENV_FILE, DATA_DIR = Path("demo.env"), Path("demo-data")
READY = "ready"  # key of the object that shows other containers that the bucket is complete
SETTINGS = {
    "AWS_DATA_BUCKET": BUCKET,
    "AWS_DATA_PATH": PREFIX,
    "BACKBONE": "cnn",
    "IMAGE_WIDTH": "32",
    "IMAGE_HEIGHT": "32",
    "BALANCE_LIMIT": "1.15",  # low enough to reduce some classes
    "SEED": "7",  # makes the result repeatable on the same CPU; docs/measurements/training.md compares seeds
}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": "us-east-1"}
# The warning about the caller's variables leaves out these variables, because they do not change what the commands
# after the demo do.
HARMLESS = ("KERAS_HOME", "TZ", "GIT_REVISION")
# The demo keeps only this setting of the caller, because it does not change the result.
KEPT = "DASK_SCHEDULER_ADDRESS"
# Extension of the file name, and format of the content. They may differ, because scraped files often have a wrong
# extension.
FORMATS = (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("jpeg", "PNG"), ("bmp", "BMP"))
SHARES = (1.0, 1.0, 0.9, 1.0, 0.8, 1.0, 0.7, 1.0, 0.6, 0.5)  # share of each digit's images that is put into the bucket


def run(pipeline: Callable[[list[str]], int]) -> int:
    """Fill a bucket, write `demo.env`, run `pipeline` with this file, print what to do next, and return the exit code.

    Raises PipelineError if the `demo` extra is not installed.
    """
    server = _endpoint("127.0.0.1", 0)
    try:
        _, port = server.get_host_and_port()
        variables = {
            "DATA_DIR": str(DATA_DIR.resolve()),
            **SETTINGS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            **CREDENTIALS,
            "NO_PROXY": "127.0.0.1",
        }
        kept = _changes_in_env_file(variables)
        if kept:
            log.info("%s keeps your changes: %s", ENV_FILE, ", ".join(kept))
        variables |= kept
        _write_env_file(variables)
        removed = _remove_own_settings()
        os.environ.update(variables)
        if not (DATA_DIR / "raw").exists():
            _fill_bucket()
        code = pipeline(["--env-file", str(ENV_FILE)])
    finally:
        server.stop()
    if code == 0:
        _print_next_commands()
        overriding = [name for name in removed if name in variables or not name.startswith(("AWS_", *HARMLESS))]
        if overriding:
            log.warning(
                "Your environment overrides %s. Before these commands, run `unset %s`", ENV_FILE, " ".join(overriding)
            )
    return code


def serve(port: int) -> NoReturn:
    """Fill a bucket and serve it at `port` to other containers until a signal arrives.

    Raises PipelineError if the port cannot be used, or if the `demo` extra is not installed.
    """
    try:  # moto would wait forever if its server could not bind the port
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        raise PipelineError(f"Port {port} cannot be used ({error}): choose another one.") from None
    server = _endpoint("0.0.0.0", port)  # noqa: S104 - a container has its own network
    _remove_own_settings()
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", NO_PROXY="127.0.0.1")
    try:
        _fill_bucket(mark_ready=True)
        log.info("Serving the demo bucket %s at port %d until stopped.", BUCKET, port)
        while True:
            time.sleep(3600)
    finally:
        server.stop()


def _endpoint(host: str, port: int) -> "ThreadedMotoServer":
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        raise PipelineError("The demo needs a local S3 endpoint. Install it with: pip install -e '.[demo]'") from None

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(host, port=port, verbose=False)
    server.start()
    return server


def _changes_in_env_file(variables: dict[str, str]) -> dict[str, str]:
    """Return what the operator has changed in or added to `demo.env`, except DATA_DIR and the endpoint's variables."""
    if not ENV_FILE.exists():
        return {}
    own = {"DATA_DIR", "AWS_ENDPOINT_URL", "NO_PROXY", *CREDENTIALS}
    written = dotenv.dotenv_values(ENV_FILE)
    return {
        name: value for name, value in written.items() if value and name not in own and value != variables.get(name)
    }


def _write_env_file(variables: dict[str, str]) -> None:
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    head = (
        "# Settings of the demo. Environment variables override them.\n"
        "# The S3 endpoint answers only while `python pipeline.py demo` runs.\n"
    )
    ENV_FILE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def _remove_own_settings() -> list[str]:
    """Remove the caller's settings from the environment and return their names.

    The demo must not use the caller's bucket or MLflow server.
    """
    from dgmd_pipeline.settings import Settings, variable

    settings = {variable(name) for name in Settings.model_fields} - {KEPT}
    found = sorted(name for name in os.environ if name in settings or name.startswith("AWS_"))
    for name in found:
        del os.environ[name]
    return found


def _fill_bucket(mark_ready: bool = False) -> None:
    """Create the bucket and its objects. With `mark_ready`, add the public object READY at the end."""
    from dgmd_pipeline.s3 import client as s3_client

    client = s3_client.connect()
    client.create_bucket(Bucket=BUCKET)
    count = 0
    for name, content in _objects():
        # Public: the workers of a cluster have no credentials for this endpoint.
        client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}", Body=content, ACL="public-read")
        count += 1
    log.info("Demo bucket s3://%s/%s: %s objects", BUCKET, PREFIX, f"{count:,}")
    if mark_ready:
        client.put_object(Bucket=BUCKET, Key=READY, Body=b"", ACL="public-read")


def _objects() -> Iterator[tuple[str, bytes]]:
    """Yield each object: its key, which is relative to the prefix, and its content."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit, share in enumerate(SHARES):
        images = digits.images[digits.target == digit]
        for number, pixels in enumerate(images[: round(share * len(images))]):
            extension, file_format = FORMATS[number % len(FORMATS)]
            size = 24 + 8 * (number % 6)
            yield f"{digit}/digit {digit}_{number}.{extension}", encode_digit(pixels, size, file_format)
    first = encode_digit(digits.images[digits.target == 3][0], 24, "PNG")
    yield "3/copy of digit 3_0.png", first
    yield "3/digit 3_0, larger.png", encode_digit(digits.images[digits.target == 3][0], 48, "PNG")
    both = encode_digit(digits.images[digits.target == 9][-1], 32, "PNG")
    yield "4/is it a 4.png", both
    yield "9/or a 9.png", both
    yield "5/cut off.jpeg", encode_digit(digits.images[digits.target == 5][0], 64, "JPEG")[:300]
    yield "7/not a picture.jpeg", b"<html><body>404 Not Found</body></html>"
    yield "8/empty.png", b""
    yield "readme.txt", b"objects directly under the prefix have no label"
    yield "1/../../outside.png", first


def encode_digit(digit: "np.ndarray", size: int, file_format: str) -> bytes:
    """Return a digit (8 x 8 numbers from 0 to 16) as an image file of `size` x `size` pixels, black on white."""
    import numpy as np

    levels = (255 - digit * (255 / 16)).round().astype(np.uint8)
    image = Image.fromarray(levels).resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    options = {"quality": 90} if file_format in ("JPEG", "WEBP") else {}
    image.convert("RGB").save(buffer, file_format, **options)
    return buffer.getvalue()


def _print_next_commands() -> None:
    from dgmd_pipeline.workflow.success_file import read_record

    if not read_record(DATA_DIR / "registered_model"):
        return
    pipeline = f"{_command('python')} {shlex.quote(sys.argv[0])}"
    log.info(
        f"""What next?
  # open the report in a browser: {DATA_DIR}/evaluation/report.html
  # make the version production; later versions are compared with it
  {pipeline} promote --env-file {ENV_FILE}
  # classify images with the production version
  {pipeline} predict --env-file {ENV_FILE} {DATA_DIR}/raw/6
  # view the registry at http://127.0.0.1:5050
  {_command("mlflow")} server --workers 1 --port 5050 --backend-store-uri sqlite:///{DATA_DIR}/mlflow/mlflow.db
  # show what the next run would do
  {pipeline} plan --env-file {ENV_FILE}
  # train again on the same images (edit {ENV_FILE} to change parameters)
  rm -r {DATA_DIR}/trained_model
  {pipeline} --env-file {ENV_FILE}""",
        extra={"verbatim": True},
    )


def _command(name: str) -> str:
    """Return the shell command for a program of this Python environment, relative to the working directory."""
    path = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(path) else shlex.quote(os.path.relpath(path))
