"""Reads the environment into a frozen `Settings`, which declares every variable with type, default, range and meaning.

No other module reads settings from the environment. Some libraries (boto3, MLflow) read the environment themselves. For
these libraries, `load` exports the variables of a `.env` file, and sets default values.
"""

import getpass
import io
import os
import re
import socket
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import dotenv
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dgmd_pipeline import certificates, env_file, environment, formatting, invalid_settings
from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.registry.database import check_driver
from dgmd_pipeline.workflow import machine

# A function that prepares the environment of a Dask worker. FROZEN_DEFAULTS make TensorFlow use one thread for a batch.
# This suits a worker, because a worker has one thread.
provide_worker_defaults = partial(
    environment.provide, environment.LIBRARY_DEFAULTS | environment.FROZEN_DEFAULTS, environment.DASK_VARIABLES
)
TEMPORARY = ".tmp"  # folder in DATA_DIR; made only if it is used
# Variables that `load` unsets if they are empty. With an empty MLFLOW_TRACKING_SERVER_CERT_PATH, MLflow would not
# verify the server. boto3 would reject empty values of the other variables.
UNSET_IF_EMPTY = (*certificates.VARIABLES, "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE")


class Settings(BaseSettings):
    """The settings of a run (see docs/configuration.md). A field is named like its variable, in lower case."""

    model_config = SettingsConfigDict(
        frozen=True,
        alias_generator=str.upper,
        case_sensitive=True,
        env_ignore_empty=True,
        extra="ignore",
        allow_inf_nan=False,
    )

    data_dir: Path = Field(Path("./data"), description="Folder that contains the step folders.")
    aws_data_bucket: str = Field("dgmd-s17-assets", min_length=1, description="Bucket that contains the images.")
    aws_data_path: str = Field(
        "train/downloaded-images",
        description="Folder in the bucket. The images are the objects `<AWS_DATA_PATH>/<label>/<file>`. `/` is the "
        "whole bucket.",
    )
    refresh: bool = Field(
        False,
        description="`true`: list the bucket, download new and changed objects, and remove the images of deleted ones. "
        "`false`: use the existing `raw/` if it was downloaded from the same bucket and folder.",
    )
    max_rejected_pcnt: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The run stops if more than this fraction of a label's files cannot be downloaded or decoded.",
    )
    min_images_per_label: int = Field(2, ge=2, le=10**9, description="Labels with fewer usable images are left out.")
    balance_limit: float | None = Field(
        None,
        ge=1,
        le=10**6,
        description="Maximum size of a class, as a multiple of the mean class size, for example 1.15. Larger classes "
        "are reduced to this maximum size. Unset: no class is reduced, and only `CLASS_WEIGHTS` corrects the "
        "imbalance. On every measured data set, models were more accurate without a limit.",
    )
    validation_pcnt: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Fraction (not percentage) of each label's images that goes into the validation split.",
    )
    num_shards: int = Field(10, ge=1, le=99_999, description="Number of TFRecord files for each split.")
    image_width: int = Field(
        256, ge=8, le=4096, description="Width of the stored images and of the model's input, in pixels."
    )
    image_height: int = Field(
        192, ge=8, le=4096, description="Height of the stored images and of the model's input, in pixels."
    )
    image_fit: Literal["stretch", "letterbox", "crop"] = Field(
        "stretch",
        description="How images whose aspect ratio is not `IMAGE_WIDTH / IMAGE_HEIGHT` are resized: `stretch` changes "
        "the aspect ratio, `letterbox` adds black bars, `crop` cuts off two edges.",
    )
    backbone: str = Field(
        "EfficientNetV2-B1",
        description="A frozen network of `keras.applications`, or `cnn` (a small network trained from scratch).",
    )
    backbone_weights: str = Field(
        "imagenet",
        min_length=1,
        description="`imagenet`, `none` (random weights) or the path of a weights file (`.h5`). Not used by `cnn`.",
    )
    batch_size: int = Field(
        128,
        ge=1,
        le=10**6,
        description="Maximum number of images in a training batch. For `cnn`, batches are smaller if an epoch would "
        "otherwise have fewer than 50 batches. A batch of fine-tuning has at most 32 images.",
    )
    head: Literal["auto", "linear", "hidden"] = Field(
        "auto",
        description="Classifier on the features of a frozen backbone: `linear` is a logistic regression, `hidden` has "
        "two hidden layers. `auto` selects the one with the lower log loss in a cross-validation on the training "
        "images. Not used by `cnn`.",
    )
    epochs: int = Field(
        15,
        ge=1,
        le=10**6,
        description="For `cnn`, the number of epochs. For a hidden head, the maximum number of epochs; "
        "cross-validation chooses the number.",
    )
    learning_rate: float = Field(0.01, gt=0, le=1000, description="Learning rate of the first epoch.")
    decay_rate: float = Field(
        0.5,
        ge=0,
        le=10**6,
        description="The learning rate of epoch e, counted from 0, is `LEARNING_RATE / (1 + DECAY_RATE * e)`.",
    )
    patience: int = Field(
        3,
        ge=1,
        le=10**6,
        description="Cross-validation of a hidden head stops after this many epochs without a lower held-out loss. "
        "Not used by `cnn`.",
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="Optimizer, also for fine-tuning.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout rate of the head.")
    weight_decay: float = Field(
        0.0, ge=0, le=1000, description="Decoupled weight decay of the optimizer, also for fine-tuning."
    )
    augmentation: Literal["none", "shift", "flip", "strong"] = Field(
        "shift",
        description="Random changes of the training images of `cnn`. `shift` moves them. `flip` also mirrors them left "
        "to right: do not use it for text, digits or other classes that mirroring changes. `strong` also "
        "rotates and zooms them, and changes their contrast and brightness.",
    )
    fine_tune: Literal["none", "top", "all"] = Field(
        "none",
        description="After the head has been trained, also train the last blocks of the backbone (`top`) or the whole "
        "backbone (`all`). The result is kept only if it lowers the log loss on held-out training images. Not used by "
        "`cnn`.",
    )
    fine_tune_epochs: int = Field(
        6,
        ge=1,
        le=10**6,
        description="Maximum number of fine-tuning epochs. The number that is best on held-out images is used.",
    )
    fine_tune_learning_rate: float = Field(
        3e-4,
        gt=0,
        le=1000,
        description="Learning rate of the first fine-tuning epoch. The learning rate of epoch e, counted from 0, is "
        "`FINE_TUNE_LEARNING_RATE / (1 + e)`.",
    )
    class_weights: bool = Field(
        True,
        description="Weight the loss of each class by the inverse square root of its number of images.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=2**32 - 1,
        description="Makes trainings on a CPU repeatable. Unset: each training uses a random seed.",
    )
    model_name: str = Field("dgmd_model", min_length=1, description="Name of the registered model.")
    max_class_drop: float = Field(
        0.15,
        ge=0,
        le=1,
        description="`promote` refuses a version if its recall of a class is significantly lower than production's, "
        "and lower by more than this fraction.",
    )
    max_latency_ratio: float = Field(
        1.5,
        gt=0,
        le=10**6,
        description="`promote` refuses a version if its latency for one image is more than this multiple of "
        "production's.",
    )
    allow_lost_labels: bool = Field(
        False,
        description="`true`: `promote` accepts a version without training images of a label that production was "
        "trained on.",
    )
    promote_if_better: bool = Field(
        False,
        description="`true`: a run promotes its version if it is better than production and no condition fails.",
    )
    mlflow_experiment_name: str | None = Field(None, description="Name of the MLflow experiment. Unset: `MODEL_NAME`.")
    mlflow_tracking_uri: str | None = Field(
        None,
        description="URI of an MLflow 3 server or an MLflow database. An SQLite database, such as "
        "`sqlite:////srv/mlflow/mlflow.db`, stores artifacts in the folder `artifacts` beside it. Unset: an embedded "
        "store in `DATA_DIR/mlflow`.",
    )

    schedule: str | None = Field(
        None,
        description="Cron expression (minute, hour, day of month, month, day of week), for example `0 3 * * *`. "
        "`python pipeline.py` then keeps running and starts a run at these times, with `REFRESH=true`. Unset: it runs "
        "once, immediately.",
    )
    tz: str | None = Field(
        None,
        description="Time zone of `SCHEDULE`, for example `Europe/Berlin`. Unset: the time zone of the system; in a "
        "container, this is UTC.",
    )
    luigi_scheduler_url: str | None = Field(
        None,
        description="Address of a Luigi scheduler (`luigid`), for example `http://luigid:8082`. The scheduler's web "
        "page shows the run.",
    )
    dask_scheduler_address: str | None = Field(
        None,
        description="Address of a Dask scheduler, for example `tcp://dask-scheduler:8786` or `tls://host:8786`. "
        "The workers of this scheduler run the steps `download`, `inspect`, `convert` and `extract`. Unset: processes "
        "on this machine run these steps. Dask itself reads its other variables (`DASK_...`) and its configuration "
        "files.",
    )
    luigi_config_path: Path | None = Field(
        None, description="Luigi configuration file. Only the address of the scheduler is read from it."
    )
    notify_url: SecretStr | None = Field(
        None,
        description="URL that receives a JSON message by POST after each run, promotion and rollback.",
    )
    notify_on: Literal["always", "change", "problem"] = Field(
        "always",
        description="Events that send a message to `NOTIFY_URL`: `always` (all events), `change` (all events "
        "except runs that changed nothing), `problem` (runs that failed, or registered a version that is worse than "
        "production).",
    )
    health_max_age: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="`health` fails if the last successful run was more than this number of hours ago. For a nightly "
        "schedule, use for example 26. Unset: the time does not matter.",
    )

    keras_home: Path = Field(
        Path("~/.keras"), validate_default=True, description="Folder for downloaded ImageNet weights."
    )
    git_revision: str | None = Field(
        None, description="Commit that the container image was built from. It is recorded with each version."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_one_line(cls, value: object) -> object:
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f-\x9f]", value):
            raise ValueError("a value without line breaks and other control characters")
        return value

    @field_validator("*")
    @classmethod
    def _has_no_negative_zero(cls, value: object) -> object:
        return value + 0.0 if isinstance(value, float) else value

    @field_validator("keras_home")
    @classmethod
    def _is_below_home(cls, value: Path) -> Path:
        return Path(os.path.expanduser(value))  # noqa: PTH111 - Path.expanduser raises for a user without a home folder

    @field_validator("aws_data_path")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        return value.strip("/")

    @field_validator(*invalid_settings.CHECKS)
    @classmethod
    def _passes_its_checks(cls, value: Any, info: ValidationInfo) -> Any:
        for check in invalid_settings.CHECKS[str(info.field_name)] if value is not None else ():
            check(value.get_secret_value() if isinstance(value, SecretStr) else value)
        return value

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _has_its_driver(cls, value: str | None) -> str | None:
        if value is not None:
            check_driver(value)
        return value

    @field_validator("backbone")
    @classmethod
    def _is_known(cls, value: str, info: ValidationInfo) -> str:
        from dgmd_pipeline.training.backbones import BACKBONES, FROZEN

        names = {name.casefold(): name for name in BACKBONES}
        if value.casefold() not in names:
            raise ValueError("one of " + ", ".join(BACKBONES))
        name = names[value.casefold()]
        size = [info.data[field] for field in ("image_width", "image_height") if field in info.data]
        if name in FROZEN and min(size, default=4096) < FROZEN[name].min_size:
            raise ValueError(
                f"IMAGE_WIDTH and IMAGE_HEIGHT of at least {FROZEN[name].min_size} for this network, or cnn, which "
                "accepts smaller images"
            )
        return name

    def public(self, names: Iterable[str] | None = None) -> dict[str, object]:
        """Return all settings, or those in `names`, as JSON values. User names and passwords in URIs are removed."""
        values = self.model_dump(mode="json", include=None if names is None else set(names))
        return {
            name: formatting.redact(value) if isinstance(value, str) else value
            for name, value in sorted(values.items())
        }


def mlflow_variables() -> dict[str, str]:
    """Return the variables of the environment that MLflow's client reads."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}


def operator() -> str:
    """Return "user@host" for the history of promotions: MLflow's user if one is set, else the operating system's."""
    try:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def variable(name: str) -> str:
    """Return the name of the environment variable for a field of `Settings`."""
    return name.upper()


def load(path: str | Path | None = None) -> Settings:
    """Read the file of variables at `path` (default: `.env`, if it exists) and the environment, which takes precedence.

    Raises SettingsError with one line for each invalid variable: its name, its value and what is expected.
    """
    fields = {variable(name): field for name, field in Settings.model_fields.items()}
    try:
        text = env_file.read(Path(path or ".env"), fields)
        dotenv.load_dotenv(stream=io.StringIO(text), override=False)
    except FileNotFoundError:
        if path:
            raise SettingsError(f"--env-file {path}: there is no such file.") from None
    environment.remove_carriage_returns()
    environment.provide_home(Settings.model_fields["data_dir"].default)
    for name in UNSET_IF_EMPTY:
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    environment.provide(environment.LIBRARY_DEFAULTS)
    try:
        settings = Settings()
    except ValidationError as error:
        mistakes = [(str(item["loc"][0]), item["input"], item["msg"]) for item in error.errors()]
        raise SettingsError(
            "\n".join(invalid_settings.describe(name, fields[name], *rest) for name, *rest in mistakes)
        ) from None
    size = settings.image_width, settings.image_height
    environment.provide_temporary_folder(settings.data_dir / TEMPORARY)
    batch = settings.batch_size if settings.backbone == "cnn" else None
    invalid_settings.check_memory(*size, batch, machine.memory())
    if problems := certificates.mistakes(os.environ):
        raise SettingsError("\n".join(problems))
    from dgmd_pipeline.training.backbones import is_frozen

    # FROZEN_DEFAULTS make TensorFlow use one thread for a batch. This would slow fine-tuning, which trains on one batch
    # at a time.
    if is_frozen(settings.backbone) and settings.fine_tune == "none":
        environment.provide(environment.FROZEN_DEFAULTS)
    if settings.dask_scheduler_address:  # paths are sent to workers, which have another working directory
        settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
    environment.provide(machine.thread_defaults())
    return settings


def serving_environment() -> dict[str, str]:
    """Return the environment for a process that serves a model, without the defaults that are only for training."""
    kept = {name: value for name, value in os.environ.items() if environment.FROZEN_DEFAULTS.get(name) != value}
    return {**machine.thread_defaults(), **kept}
