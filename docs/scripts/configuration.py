"""`Settings` -> docs/configuration.md. `make docs` writes the file; tests/test_documents.py compares it."""

from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from dgmd_pipeline.environment import FROZEN_DEFAULTS, LIBRARY_DEFAULTS
from dgmd_pipeline.invalid_settings import expected_values
from dgmd_pipeline.settings import Settings, variable
from dgmd_pipeline.training.backbones import BACKBONES

TARGET = Path(__file__).parents[1] / "configuration.md"
HEAD = """\
# Configuration

All settings are environment variables. They can also be in a file `.env` in the working directory,
or in the file that `--env-file` names. The environment takes precedence over the file. An empty
variable counts as unset. If values are invalid, the command reports all of them before anything
starts, and exits with 2. It also exits with 2 if a line of the file cannot be parsed as
`NAME=value`. The error has the line number, but not the content of the line. A name in the file
that is similar to the name of a variable, such as `EPOCS`, causes a warning.

This file is generated from `dgmd_pipeline/settings.py`: run `make docs` after a change there.
"""
NOTES = {  # group -> a paragraph before its table
    "Training": """\
`BATCH_SIZE`, `EPOCHS`, `LEARNING_RATE`, `DECAY_RATE`, `OPTIMIZER`, `DROPOUT` and `WEIGHT_DECAY`
apply to `cnn` and to a hidden head, not to a linear head.
""",
}
GROUPS = {
    "Input": ("data_dir", "aws_data_bucket", "aws_data_path", "refresh"),
    "Selection and split": ("max_rejected_pcnt", "min_images_per_label", "balance_limit", "validation_pcnt"),
    "TFRecords": ("num_shards", "image_width", "image_height", "image_fit"),
    "Backbone": ("backbone", "backbone_weights", "keras_home"),
    "Training": (
        *("head", "batch_size", "epochs", "learning_rate", "decay_rate", "patience", "optimizer", "dropout"),
        *("weight_decay", "augmentation", "class_weights", "seed"),
    ),
    "Fine-tuning": ("fine_tune", "fine_tune_epochs", "fine_tune_learning_rate"),
    "Registry and promotion": (
        *("model_name", "mlflow_tracking_uri", "mlflow_experiment_name", "max_class_drop", "max_latency_ratio"),
        *("allow_lost_labels", "promote_if_better", "git_revision"),
    ),
    "Schedule and notifications": ("schedule", "tz", "notify_url", "notify_on", "health_max_age"),
    "Cluster": ("dask_scheduler_address",),
    "Luigi": ("luigi_scheduler_url", "luigi_config_path"),
}
TAIL = """\
## Variables of libraries

`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SHARED_CREDENTIALS_FILE`, `AWS_PROFILE`,
`AWS_DEFAULT_REGION`, `AWS_ENDPOINT_URL`, `MLFLOW_TRACKING_USERNAME`, `MLFLOW_TRACKING_PASSWORD`
and the other variables of boto3 and MLflow have their usual meaning. If there are no AWS
credentials, the bucket is read anonymously. The variables that name certificate files
(`AWS_CA_BUNDLE`, `MLFLOW_TRACKING_SERVER_CERT_PATH`, `MLFLOW_TRACKING_CLIENT_CERT_PATH`,
`REQUESTS_CA_BUNDLE`, `SSL_CERT_FILE`) are checked before anything starts. An empty one counts as
unset.

The pipeline sets these variables of libraries if they are unset:

"""


def markdown() -> str:
    """Return the content of docs/configuration.md."""
    parts = [HEAD]
    for title, names in GROUPS.items():
        rows = [_row(name, Settings.model_fields[name]) for name in names]
        table = ["| variable | default | values | meaning |", "| --- | --- | --- | --- |", *rows]
        parts += [f"## {title}\n", *([NOTES[title]] if title in NOTES else []), "\n".join(table) + "\n"]
    frozen = " (with a frozen backbone and without fine-tuning)"
    defaults = [f"- `{name}={value}`" for name, value in LIBRARY_DEFAULTS.items()]
    defaults += [f"- `{name}={value}`{frozen}" for name, value in FROZEN_DEFAULTS.items()]
    defaults.append(
        "- `OMP_NUM_THREADS`, `TF_NUM_INTRAOP_THREADS`, `TF_NUM_INTEROP_THREADS`: the CPU quota of the\n"
        "  container, rounded up, if it is smaller than the number of cores"
    )
    return "\n".join(parts) + "\n" + TAIL + "\n".join(defaults) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    return f"| `{variable(name)}` | {_default(field.default)} | {_values(name, field)} | {field.description} |"


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if isinstance(value, Path):
        return f"`{value}`" if value.parts[0] == "~" else f"`./{value}`"
    return f"`{value}`"


def _values(name: str, field: FieldInfo) -> str:
    if name == "backbone":
        return ", ".join(f"`{each}`" for each in BACKBONES)
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(field.annotation))
    is_number = {int, float, bool} & {field.annotation, *get_args(field.annotation)}
    return expected_values(field) if is_number else ""


if __name__ == "__main__":
    TARGET.write_text(markdown(), "utf-8")
