"""The environment -> one frozen `Settings`: every variable once, with its type, default, range and meaning.

The only door to the environment. `load` also hands the variables of a `.env` file to the libraries that read the
environment themselves (boto3, MLflow) and sets a few quiet defaults for them.
"""

import getpass
import os
import re
import socket
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import dotenv
from annotated_types import Ge, Gt, Le, Lt
from cronsim import CronSim, CronSimError
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import SettingsError

LIBRARY_DEFAULTS = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorFlow's start-up chatter: warnings and errors only
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a batch job tells nobody about itself
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # about a minute; the default of 7 waits four, then the next run retries
    "GIT_PYTHON_REFRESH": "quiet",
    # Pillow keeps two blocks of memory of up to 16 MB for the next image; fresh pages cost a third of writing a record.
    "PILLOW_BLOCKS_MAX": "2",
}
# Batches go through a frozen backbone side by side: each in a thread of its own is up to half as fast again as all
# threads on one batch. docs/measurements.md
FROZEN_DEFAULTS = {"TF_NUM_INTRAOP_THREADS": "1"}


class Settings(BaseSettings):
    """What a run is asked to do. Field names are the variables in lower case."""

    model_config = SettingsConfigDict(
        frozen=True,
        alias_generator=str.upper,
        case_sensitive=True,
        env_ignore_empty=True,
        extra="ignore",
        allow_inf_nan=False,
    )

    data_dir: Path = Field(Path("./data"), description="folder that holds the step folders")
    aws_data_bucket: str = Field("dgmd-s17-assets", min_length=1, description="bucket that holds the pictures")
    aws_data_path: str = Field(
        "train/downloaded-images", description="folder in the bucket: `<AWS_DATA_PATH>/<label>/<file>`"
    )
    refresh: bool = Field(False, description="fetch what is new or changed in the bucket, and drop what is gone")
    max_rejected_pcnt: float = Field(
        0.5, ge=0, le=1, description="the run stops when more than this fraction of a label's files cannot be decoded"
    )
    min_images_per_label: int = Field(2, ge=2, description="labels with fewer usable images are left out")
    balance_limit: float | None = Field(
        None,
        ge=1,
        description="classes larger than this many times the mean class size are cut down to it; unset: none",
    )
    validation_pcnt: float = Field(0.2, gt=0, lt=1, description="fraction of each label that is kept for validation")
    num_shards: int = Field(10, ge=1, le=99_999, description="TFRecord files for each side of the split")
    image_width: int = Field(256, ge=8, le=4096, description="width of the stored pictures and the model, pixels")
    image_height: int = Field(192, ge=8, le=4096, description="height of the stored pictures and the model, pixels")
    image_fit: Literal["stretch", "letterbox", "crop"] = Field(
        "stretch", description="how images of another aspect ratio are fitted to IMAGE_WIDTH x IMAGE_HEIGHT"
    )
    backbone: str = Field(
        "EfficientNetV2-B1", description="a frozen network of keras.applications, or `cnn`, trained from scratch"
    )
    backbone_weights: str = Field(
        "imagenet", min_length=1, description="`imagenet`, `none` (random) or a weights file; not used by `cnn`"
    )
    batch_size: int = Field(128, ge=1, description="images in one training step")
    head: Literal["auto", "linear", "hidden"] = Field(
        "auto", description="what classifies the features of a frozen backbone; not used by `cnn`"
    )
    epochs: int = Field(15, ge=1, description="times the training goes through all images, at most")
    learning_rate: float = Field(0.01, gt=0, description="learning rate of the first epoch")
    decay_rate: float = Field(0.5, ge=0, description="LEARNING_RATE / (1 + DECAY_RATE * epoch)")
    patience: int = Field(3, ge=1, description="epochs without a lower held-out loss before cross-validation stops")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="how the weights are updated")
    dropout: float = Field(0.1, ge=0, lt=1, description="fraction of the head's units dropped in training")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    augmentation: Literal["none", "shift", "flip", "strong"] = Field(
        "shift", description="random changes of the training images of `cnn`"
    )
    fine_tune: Literal["none", "top", "all"] = Field(
        "none", description="after the head, train the frozen network's last blocks or all of it, if that is better"
    )
    fine_tune_epochs: int = Field(6, ge=1, description="times fine-tuning goes through all images, at most")
    fine_tune_learning_rate: float = Field(3e-4, gt=0, description="learning rate of fine-tuning's first epoch")
    class_weights: bool = Field(True, description="give images of small classes more weight in training")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="makes a training on CPU repeatable")
    model_name: str = Field("dgmd_model", min_length=1, description="name in the model registry")
    max_class_drop: float = Field(
        0.15, ge=0, le=1, description="`promote` refuses when a class loses more than this fraction of its images"
    )
    max_latency_ratio: float = Field(
        1.5, gt=0, description="`promote` refuses when a picture takes more than this many times as long"
    )
    mlflow_experiment_name: str | None = Field(None, description="MLflow experiment; unset: MODEL_NAME")
    mlflow_tracking_uri: str | None = Field(
        None, description="MLflow server or its database; unset: an embedded store in DATA_DIR/mlflow"
    )

    schedule: str | None = Field(None, description="cron expression: when to run, with REFRESH; unset: once, now")
    tz: str | None = Field(None, description="time zone of SCHEDULE, like Europe/Berlin; unset: the system's")
    luigi_scheduler_url: str | None = Field(
        None, description="a Luigi scheduler (luigid) whose page shows the run, like http://luigid:8082"
    )
    luigi_config_path: Path | None = Field(
        None, description="a Luigi configuration; of it, only the address of the scheduler is used"
    )
    notify_url: SecretStr | None = Field(None, description="gets a short JSON by POST after each run")

    keras_home: Path = Field(Path.home() / ".keras", description="where Keras keeps downloaded weights")
    git_revision: str | None = Field(None, description="commit that the image was built from, noted with each version")

    @field_validator("aws_data_path")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        return value.strip("/")

    @field_validator("aws_data_bucket")
    @classmethod
    def _is_a_bucket(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+|arn:\S+", value):
            raise ValueError("the bare name of a bucket, without s3:// and slashes")
        return value

    @field_validator("backbone_weights")
    @classmethod
    def _is_there(cls, value: str) -> str:
        readable = value.endswith(".h5") and Path(value).is_file() and os.access(value, os.R_OK)
        if value not in ("imagenet", "none") and not readable:
            raise ValueError("imagenet, none, or the path of a weights file (.h5) that can be read")
        return value

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _is_a_store(cls, value: str | None) -> str | None:
        known = r"https?://[^/\s]+.*|(sqlite|postgresql|mysql|mssql)(\+\w+)?://.+|databricks.*"
        if value is not None and not re.fullmatch(known, value):
            raise ValueError("http://host:port, https://host, or a database like sqlite:////data/mlflow.db")
        return value

    @field_validator("schedule")
    @classmethod
    def _is_a_cron_expression(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                if len(value.split()) != 5:  # with a sixth one cronsim counts seconds
                    raise CronSimError
                next(CronSim(value, datetime.now()))
            except CronSimError:
                raise ValueError("minute, hour, day of month, month, day of week, as in cron: 0 3 * * *") from None
            except StopIteration:
                raise ValueError("a time that comes, as 0 3 * * * does") from None
        return value

    @field_validator("notify_url")
    @classmethod
    def _is_a_page(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                url = urlsplit(value.get_secret_value())
                known = url.scheme in ("http", "https") and url.hostname and url.port != 0 and not url.username
            except ValueError:
                known = False
            if not known or not re.fullmatch(r"[!-~]+", value.get_secret_value()):
                raise ValueError("http://... or https://... in ASCII, without user and password")
        return value

    @field_validator("model_name")
    @classmethod
    def _is_one_name(cls, value: str) -> str:
        if re.search(r"[/:'\"]", value):
            raise ValueError("a name without / : and quotes, which mean something in MLflow's addresses and searches")
        return value

    @field_validator("backbone")
    @classmethod
    def _is_known(cls, value: str, info: ValidationInfo) -> str:
        from dgmd_pipeline.training.backbones import BACKBONES, FROZEN

        names = {name.casefold(): name for name in BACKBONES}
        if value.casefold() not in names:
            raise ValueError("one of " + ", ".join(BACKBONES))
        name = names[value.casefold()]
        sides = [info.data[side] for side in ("image_width", "image_height") if side in info.data]
        if name in FROZEN and min(sides, default=4096) < FROZEN[name].min_size:
            raise ValueError(
                f"IMAGE_WIDTH and IMAGE_HEIGHT of at least {FROZEN[name].min_size} for this network, or cnn, which "
                "takes smaller pictures"
            )
        return name

    def public(self, names: Iterable[str] | None = None) -> dict[str, object]:
        """Return settings, all or those named, as JSON values fit to be recorded and shown: no secret in a URI."""
        values = self.model_dump(mode="json", include=None if names is None else set(names))
        return {
            name: formatting.redact(value) if isinstance(value, str) else value
            for name, value in sorted(values.items())
        }


def mlflow_login() -> str | None:
    """Return "user:password" for the MLflow server where the environment has one."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}" if user else None


def operator() -> str:
    """Return who is at the keyboard, for the history: the MLflow user or the system's, and the machine."""
    try:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's bare user number
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def variable(name: str) -> str:
    """Return the environment variable of a field."""
    return name.upper()


def load(env_file: str | Path | None = None) -> Settings:
    """Read `env_file` (default: `.env` where there is one) and the environment, which wins.

    Raises SettingsError with one line for each mistake: the variable, its value, what is allowed.
    """
    path = Path(env_file or ".env")
    if env_file and not path.is_file():
        raise SettingsError(f"--env-file {path}: there is no such file.")
    if path.is_file():
        try:
            dotenv.load_dotenv(path, override=False)
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: expected lines NAME=value in UTF-8 that can be read ({error}).") from None
    for name, value in LIBRARY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        settings = Settings()
    except ValidationError as error:
        mistakes = [_mistake(str(item["loc"][0]), item["input"], item["msg"]) for item in error.errors()]
        raise SettingsError("\n".join(mistakes)) from None
    from dgmd_pipeline.training.backbones import is_frozen

    if is_frozen(settings.backbone) and settings.fine_tune == "none":  # which trains on one batch at a time
        for name, value in FROZEN_DEFAULTS.items():
            os.environ.setdefault(name, value)
    return settings


def serving_environment() -> dict[str, str]:
    """Return the environment for a process that uses a model as a service would: without what speeds up a training."""
    return {name: value for name, value in os.environ.items() if FROZEN_DEFAULTS.get(name) != value}


def _mistake(name: str, value: object, message: str) -> str:
    field = next(field for key, field in Settings.model_fields.items() if variable(key) == name)
    allowed = message.removeprefix("Value error, ") if message.startswith("Value error") else _allowed(field)
    shown = "***" if field.annotation == SecretStr | None else formatting.redact(str(value))
    if name.endswith("_URI"):
        shown = shown.rpartition("@")[2]  # a login without a scheme before it
    line = f"{name}={shown}: expected {allowed}."
    if name.endswith("_PCNT"):
        try:
            percent = float(str(value))
        except ValueError:
            return line
        if 1 < percent < 100:
            line += f" It is a fraction: did you mean {percent / 100:g}?"
    return line


def _allowed(field: FieldInfo) -> str:
    """Return the type and range of a field in words."""
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
                bounds.append(f"above {low}")
            case Ge(ge=low):
                bounds.append(f"of at least {low}")
            case Lt(lt=high):
                bounds.append(f"below {high}")
            case Le(le=high):
                bounds.append(f"of at most {high}")
    return " ".join([words.get(kind, "a text that is not empty"), " and ".join(bounds)]).strip()
