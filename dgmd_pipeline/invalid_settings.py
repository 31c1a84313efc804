"""Checks values, and describes an invalid setting in one line: its name, its value and what is expected."""

import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, Lt
from cronsim import CronSim, CronSimError
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import SettingsError

MAX_NAME = 256  # maximum length of a name in MLflow's database, in characters
SHOWN = 200  # maximum number of characters of a value that an error shows
# Memory that each pixel of an image in a batch needs at least, in bytes. The value lies between two figures. A float32
# image alone takes 12 bytes a pixel. The training of `cnn` took 180 bytes a pixel: batches of 64 images were compared
# with batches of 32 images. Each image had 256 x 192 pixels.
PIXEL_BYTES = 40
FROZEN_BATCH = 16  # images that a frozen backbone processes at once, in each thread


def describe(name: str, field: FieldInfo, value: object, message: str) -> str:
    """Return the line about an invalid `value` of the variable `name`. `message` is pydantic's error message."""
    allowed = message.removeprefix("Value error, ") if message.startswith("Value error") else expected_values(field)
    shown = "***" if field.annotation == SecretStr | None else formatting.redact(str(value))
    if name.endswith("_URI"):
        shown = shown.rpartition("@")[2]  # removes user and password from a URI without a scheme
    shown = formatting.printable(shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}...")
    line = f"{name}={shown}: expected {allowed}."
    if name.endswith("_PCNT"):
        try:
            percent = float(str(value))
        except ValueError:
            return line
        if 1 < percent < 100:
            line += f" It is a fraction: did you mean {percent / 100:g}?"
    return line


def expected_values(field: FieldInfo) -> str:
    """Return the type and range of a field in words, as in "a number above 0 and below 1"."""
    kind = field.annotation
    if getattr(kind, "__origin__", None) is Literal:
        return "one of " + ", ".join(kind.__args__)  # type: ignore[union-attr]
    words: dict[object, str] = {
        int: "a whole number",
        int | None: "a whole number",
        float: "a number",
        float | None: "a number",
        bool: "true or false",
    }
    bounds = []
    for item in field.metadata:
        match item:
            case Gt(gt=low):
                bounds.append(f"above {low:,}")
            case Ge(ge=low):
                bounds.append(f"of at least {low:,}")
            case Lt(lt=high):
                bounds.append(f"below {high:,}")
            case Le(le=high):
                bounds.append(f"at most {high:,}")
    return " ".join([words.get(kind, "a non-empty text"), " and ".join(bounds)]).strip()


def check_cron_expression(value: str) -> None:
    """Raise ValueError, which says what is expected, if `value` is not a cron expression that matches a future time."""
    try:
        if len(value.split()) != 5:  # cronsim also accepts a sixth field, for seconds
            raise CronSimError
        next(CronSim(value, datetime.now()))
    except CronSimError:
        raise ValueError("minute, hour, day of month, month, day of week, as in cron: 0 3 * * *") from None
    except StopIteration:
        raise ValueError("a schedule that matches a time in the future, such as 0 3 * * *") from None


def check_page(value: str) -> None:
    """Raise ValueError, which says what is expected, if `value` is not an HTTP URL, or contains a user name."""
    try:
        url = urlsplit(value)
        known = url.scheme in ("http", "https") and url.hostname and url.port != 0 and not url.username
    except ValueError:
        known = False
    if not known or not re.fullmatch(r"[!-~]+", value):
        raise ValueError("http://... or https://... in ASCII, without a user name or password")


def check_scheduler(value: str) -> None:
    """Raise ValueError, which says what is expected, if `value` is not the address of a Dask scheduler."""
    if not re.fullmatch(r"(tcp|tls|ws|wss)://[^\s/@]+:\d+/?", value):
        raise ValueError("tcp://host:port or tls://host:port")


def check_bucket(value: str) -> None:
    """Raise ValueError, which says what is expected, if `value` cannot be the name of a bucket."""
    if not re.fullmatch(r"[\w.-]+|arn:\S+", value):
        raise ValueError("the name of a bucket, without s3:// and without slashes")


def check_weights(value: str) -> None:
    """Raise ValueError, which says what is expected, if `value` names no weights of a backbone."""
    readable = value.endswith(".h5") and Path(value).is_file() and os.access(value, os.R_OK)
    if value not in ("imagenet", "none") and not readable:
        raise ValueError("imagenet, none, or the path of a weights file (.h5) that can be read")


def check_store(value: str) -> None:
    """Raise ValueError, which says what is expected, if `value` is not the URI of an MLflow server or database."""
    known = r"https?://[^/\s]+.*|(sqlite|postgresql|mysql|mssql)(\+\w+)?://.+|databricks.*"
    if not re.fullmatch(known, value) or ":memory:" in value:
        raise ValueError("http://host:port, https://host, or a database like sqlite:////data/mlflow.db")


def check_model_name(value: str) -> None:
    """Raise ValueError, which says what is expected, if MLflow does not accept `value` as the name of a model."""
    if re.search(r"[/:'\"]", value):
        raise ValueError("a name without /, : and quotes, which MLflow reserves")
    if value == "." or value.startswith(".."):
        raise ValueError("a name that is not . and does not begin with .., which MLflow reads as a path")


def check_name(value: str) -> None:
    """Raise ValueError, which says what is expected, if `value` is blank or longer than MLflow's database allows."""
    if not value.strip() or len(value) > MAX_NAME:
        raise ValueError(f"a name of at most {MAX_NAME} characters that are not all blanks")


CHECKS: dict[str, tuple[Callable[[str], None], ...]] = {  # name of a setting -> its checks
    "aws_data_bucket": (check_bucket,),
    "backbone_weights": (check_weights,),
    "mlflow_tracking_uri": (check_store,),
    "mlflow_experiment_name": (check_name,),
    "model_name": (check_model_name, check_name),
    "schedule": (check_cron_expression,),
    "notify_url": (check_page,),
    "dask_scheduler_address": (check_scheduler,),
}


def check_memory(width: int, height: int, batch_size: int | None, memory: int) -> None:
    """Raise SettingsError if the images that are in memory at once do not fit in `memory` bytes.

    `width` and `height` are in pixels; `batch_size` is BATCH_SIZE for the backbone `cnn`, and None for other backbones.
    """
    images = FROZEN_BATCH if batch_size is None else batch_size
    needed = images * width * height * PIXEL_BYTES
    if needed > memory:
        batch = "" if batch_size is None else f", BATCH_SIZE={batch_size}"
        raise SettingsError(
            f"IMAGE_WIDTH={width}, IMAGE_HEIGHT={height}{batch}: expected values with which {images:,} images fit in "
            f"memory at once. They need at least {formatting.format_bytes(needed)} of memory, and "
            f"{formatting.format_bytes(memory)} are available."
        )
