import os
from typing import get_args

import pytest

from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.settings import Settings, load, variable

DEFAULTS = {
    "DATA_DIR": "data",
    "AWS_DATA_BUCKET": "dgmd-s17-assets",
    "AWS_DATA_PATH": "train/downloaded-images",
    "NUM_SHARDS": 10,
    "VALIDATION_PCNT": 0.2,
    "BATCH_SIZE": 128,
    "EPOCHS": 15,
    "DECAY_RATE": 0.5,
    "LEARNING_RATE": 0.01,
    "MODEL_NAME": "dgmd_model",
    "IMAGE_WIDTH": 256,
    "IMAGE_HEIGHT": 192,
    "IMAGE_FIT": "stretch",
}


def test_the_names_and_defaults_that_deployments_rely_on():
    values = {variable(name): value for name, value in load().public().items()}
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS


def test_the_environment_sets_them(monkeypatch):
    monkeypatch.setenv("EPOCHS", "3")
    monkeypatch.setenv("AWS_DATA_PATH", "/train/images/")
    monkeypatch.setenv("BACKBONE", "CNN")
    settings = load()
    assert (settings.epochs, settings.aws_data_path, settings.backbone) == (3, "train/images", "cnn")


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("EPOCHS", "")
    assert load().epochs == 15


def test_a_dotenv_file_is_read_and_the_environment_wins(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("EPOCHS=3\nBATCH_SIZE=7\nAWS_PROFILE='my team'\n")
    monkeypatch.setenv("BATCH_SIZE", "9")
    settings = load()
    assert (settings.epochs, settings.batch_size) == (3, 9)
    assert os.environ["AWS_PROFILE"] == "my team"  # for boto3


def test_a_missing_env_file_that_was_named_is_a_mistake():
    with pytest.raises(SettingsError, match="--env-file nowhere.env: there is no such file"):
        load("nowhere.env")


def test_all_mistakes_come_in_one_message(monkeypatch):
    wrong = {
        "EPOCHS": "many",
        "VALIDATION_PCNT": "20",
        "BATCH_SIZE": "0",
        "LEARNING_RATE": "-1",
        "BACKBONE": "resnet",
        "OPTIMIZER": "best",
        "MODEL_NAME": "team/model",
        "CLASS_WEIGHTS": "perhaps",
        "AWS_DATA_BUCKET": "s3://bucket",
        "BACKBONE_WEIGHTS": "/nowhere.weights.h5",
        "MLFLOW_TRACKING_URI": "127.0.0.1:5000",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    lines = str(caught.value).splitlines()
    assert len(lines) == len(wrong)
    for name, value in wrong.items():
        assert any(line.startswith(f"{name}={value}: expected ") for line in lines)
    text = str(caught.value)
    assert "VALIDATION_PCNT=20: expected a number above 0 and below 1. It is a fraction: did you mean 0.2?" in text
    assert "EPOCHS=many: expected a whole number of at least 1 and at most 1,000,000." in text
    assert "OPTIMIZER=best: expected one of adam, " in text
    assert "CLASS_WEIGHTS=perhaps: expected true or false." in text


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.0", "100", "nan", "inf"])
def test_the_validation_share_lies_strictly_between_0_and_1(monkeypatch, value):
    monkeypatch.setenv("VALIDATION_PCNT", value)
    with pytest.raises(SettingsError, match=f"VALIDATION_PCNT={value}: expected a number above 0 and below 1"):
        load()


@pytest.mark.parametrize("uri", ["foo://bar", "http://", "/data/mlruns", "mlflow:5000", " "])
def test_what_is_no_address_of_an_mlflow_store_is_refused(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SettingsError, match=r"MLFLOW_TRACKING_URI=.*: expected http://host:port, "):
        load()


@pytest.mark.parametrize(
    "uri", ["http://dgmd_mlflow:5000/", "https://u:p@host/x", "sqlite:////data/mlflow.db", "databricks"]
)
def test_what_is_one_is_taken(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert load().mlflow_tracking_uri == uri


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# mine\n\nAWS_DATA_BUCKET: s3cr3t\n", 3),
        ("EPOCHS=3\nAWS_DATA_BUCKET:s3cr3t\n", 2),
        ("AWS_DATA_BUCKET s3cr3t\n", 1),
        ("set EPOCHS=3\n", 1),
        ("=s3cr3t\n", 1),
        ("AWS_PROFILE='s3cr3t\nAWS_DATA_BUCKET=mine\n", 1),
        ("\r\nAWS_PROFILE='s3cr3t\r\nAWS_DATA_BUCKET=mine\r\nAWS_REGION='x'\n", 2),
        ("AWS_PROFILE='s3cr3t\nAWS_DATA_BUCKET=mine\nAWS_REGION='\n", 1),
        ('AWS_PROFILE="s3cr3t" x\n', 1),
        ("EPOCHS=3\nAWS_PROFILE=s3cr\0t\n", 2),
        ("AWS_PROFILE='s3cr3t'\nE\0P\0O\0C\0H\0S\0=\0003\0", 2),
    ],
)
def test_a_line_that_cannot_be_parsed_is_a_mistake_and_is_not_shown(monkeypatch, tmp_path, text, line):
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    (tmp_path / ".env").write_bytes(text.encode())
    with pytest.raises(SettingsError, match=rf"\A\.env, line {line}: expected [^\n]*\.\Z") as caught:
        load()
    assert "s3cr" not in str(caught.value)
    assert "AWS_PROFILE" not in os.environ


def test_all_lines_that_cannot_be_parsed_are_listed(tmp_path):
    (tmp_path / ".env").write_text("EPOCHS: 3\nSEED=1\nBATCH_SIZE: 7\n")
    with pytest.raises(SettingsError, match=r"\A\.env, line 1: .*\n\.env, line 3: .*\Z"):
        load()


def test_what_a_file_of_variables_may_contain(monkeypatch, tmp_path):
    key = "-----BEGIN KEY-----\nQUJDRA==\n-----END KEY-----"
    lines = ["\ufeff# comment = here", "export EPOCHS = 3 # few", "MODEL_NAME='a b'", "SEED", "", f'MY_KEY="{key}"']
    (tmp_path / ".env").write_bytes("\r\n".join([*lines, "MLFLOW_TRACKING_URI=http://${MY_HOST}:5000"]).encode())
    monkeypatch.setenv("MY_HOST", "mlflow")
    settings = load()
    assert (settings.epochs, settings.model_name, settings.seed) == (3, "a b", None)
    assert settings.mlflow_tracking_uri == "http://mlflow:5000"
    assert os.environ["MY_KEY"] == key


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "Is a directory"), (b"NAME=M\xfcller\n", "UTF-8"), (b"\xff\xfeE\0", "UTF-8")],
)
def test_a_file_of_variables_that_cannot_be_read_is_a_mistake(tmp_path, content, reason):
    if content is None:  # Docker makes a folder where the file to mount is missing
        (tmp_path / ".env").mkdir()
    else:
        (tmp_path / ".env").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"\.env: expected lines NAME=value in UTF-8 \(.*{reason}\)"):
        load()


def test_a_name_in_the_file_that_is_almost_ours_is_a_warning(monkeypatch, tmp_path, caplog):
    almost = {"EPOCS": "EPOCHS", "aws_data_bucket": "AWS_DATA_BUCKET", "MLFLOW_TRACKING_URL": "MLFLOW_TRACKING_URI"}
    library = [
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_EXPERIMENT_ID",
        "AWS_PROFILE",
        "PIPELINE_DATA",
    ]
    (tmp_path / ".env").write_text("".join(f"{name}=\n" for name in [*almost, *library, "EPOCHS"]))
    monkeypatch.setenv("BATCHSIZE", "7")  # the environment belongs to other programs, too
    load()
    assert caplog.messages == [
        f".env: {name} is not a variable of the pipeline. Did you mean {meant}?" for name, meant in almost.items()
    ]


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load().epochs = 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:s3cr3t@host:5000/path", "http://host:5000/path"),
        (
            "failed: postgresql+psycopg2://u:p%40w@db/mlflow?password=s3cr3t, retrying",
            "failed: postgresql+psycopg2://db/mlflow retrying",
        ),
        ("http://user:with@sign@host/", "http://host/"),
        ("https://token@host and http://a:b@c", "https://host and http://c"),
        ("postgresql://u:se/cr'et@host/db", "postgresql://host/db"),
        ("s3://bucket/train/me@home.jpeg", "s3://bucket/train/me@home.jpeg"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_users_passwords_and_queries_are_taken_out_of_uris(text, shown):
    assert redact(text) == shown


def test_a_login_without_a_scheme_is_not_shown_either(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "admin:hunter2@mlflow:5000")
    with pytest.raises(SettingsError) as caught:
        load()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["BALANCE_LIMIT", "LEARNING_RATE", "DECAY_RATE"])
def test_infinity_is_not_a_number_here(monkeypatch, name):
    monkeypatch.setenv(name, "inf")
    with pytest.raises(SettingsError, match=f"{name}=inf: expected a number"):
        load()


NUMBERS = [
    name
    for name, field in Settings.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
]


@pytest.mark.parametrize("value", ["nan", "-inf", f"1{'0' * 30}", "1e308", f"1{'0' * 5000}"])
def test_every_number_has_a_largest_value(monkeypatch, value):
    for name in NUMBERS:
        monkeypatch.setenv(variable(name), value)
    with pytest.raises(SettingsError) as caught:
        load()
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == [variable(name) for name in NUMBERS]
    assert max(map(len, lines)) < 400


def test_zero_has_no_sign(monkeypatch):
    monkeypatch.setenv("WEIGHT_DECAY", "-0.0")
    assert str(load().weight_decay) == "0.0"  # its text is part of fingerprints


@pytest.mark.parametrize(
    "value", [" ", ".", "..", "../model", "..model", "a/b", "a:b", "a'b", 257 * "a", "a\rb", "a\x1bb"]
)
def test_a_name_that_mlflow_would_refuse_after_the_training_is_refused(monkeypatch, value):
    monkeypatch.setenv("MODEL_NAME", value)
    with pytest.raises(SettingsError, match=r"\AMODEL_NAME=[^\x00-\x1f]*: expected .*\Z"):
        load()
    monkeypatch.setenv("MODEL_NAME", " ~ spaces, 100 % and Ünicode.v2 ~")
    assert load().model_name == " ~ spaces, 100 % and Ünicode.v2 ~"


@pytest.mark.parametrize("value", [" ", 257 * "a"])
def test_the_name_of_an_experiment_is_checked_too(monkeypatch, value):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", value)
    with pytest.raises(SettingsError, match="MLFLOW_EXPERIMENT_NAME=.*: expected a name of at most 256 characters"):
        load()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"BACKBONE": "cnn", "BATCH_SIZE": "1000000"}, "BATCH_SIZE=1000000: .* 1,000,000 images .* at least 671.1 TB"),
        ({"BACKBONE": "Xception", "BATCH_SIZE": "1000000"}, None),  # of which the batch size is that of stored features
        ({"BACKBONE": "cnn", "BATCH_SIZE": "8"}, None),
    ],
)
def test_images_that_cannot_be_in_memory_at_once_are_refused(monkeypatch, variables, sentence):
    size = {"IMAGE_WIDTH": "4096", "IMAGE_HEIGHT": "4096"} if sentence else {}
    for name, value in (variables | size).items():
        monkeypatch.setenv(name, value)
    if not sentence:
        load()
        return
    with pytest.raises(SettingsError, match=rf"\AIMAGE_WIDTH=4096, IMAGE_HEIGHT=4096, {sentence} of memory, and "):
        load()


def test_a_carriage_return_at_the_end_of_a_value_is_ignored_with_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("EPOCHS", "3\r")
    monkeypatch.setenv("AWS_PROFILE", "team\r")
    monkeypatch.setenv("SCHEDULE", "\r")
    assert (load().epochs, load().schedule, os.environ["AWS_PROFILE"]) == (3, None, "team")
    (message,) = caplog.messages
    assert message == "A carriage return at the end of these variables is ignored: AWS_PROFILE, EPOCHS, SCHEDULE"


@pytest.mark.parametrize("name", ["AWS_DATA_PATH", "DATA_DIR", "AWS_DATA_BUCKET", "KERAS_HOME", "TZ", "EPOCHS"])
def test_control_characters_are_refused_and_not_shown(monkeypatch, name):
    monkeypatch.setenv(name, "3\rx\x1b[2Jy")
    with pytest.raises(SettingsError, match=rf"{name}=3\\rx\\x1b\[2Jy: expected a value without line breaks"):
        load()


def test_a_backbone_states_the_smallest_image_size_that_it_accepts(monkeypatch):
    monkeypatch.setenv("BACKBONE", "xception")
    monkeypatch.setenv("IMAGE_HEIGHT", "48")
    with pytest.raises(SettingsError, match="BACKBONE=xception: expected IMAGE_WIDTH and IMAGE_HEIGHT of at least 71"):
        load()


def test_what_is_recorded_has_no_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cr3t@mlflow.example.org/")
    assert load().public(["mlflow_tracking_uri"]) == {"mlflow_tracking_uri": "https://mlflow.example.org/"}
    assert load().mlflow_tracking_uri == "https://me:s3cr3t@mlflow.example.org/"


def test_every_setting_has_a_description_and_an_upper_case_variable():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.alias == name.upper()


@pytest.mark.parametrize("schedule", ["nonsense", "* * * * * *", "60 * * * *", "0 0 31 2 *", "@daily", ""])
def test_a_schedule_is_a_cron_expression_of_five_fields_whose_time_comes(monkeypatch, schedule):
    monkeypatch.setenv("SCHEDULE", schedule)
    if not schedule:
        assert load().schedule is None
    else:
        with pytest.raises(SettingsError, match="SCHEDULE="):
            load()
    monkeypatch.setenv("SCHEDULE", "*/5 3-5 * * MON-FRI")
    assert load().schedule
