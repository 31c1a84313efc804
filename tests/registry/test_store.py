"""Which registries a setting can name, and what an operator reads when one fails."""

import pytest
from mlflow.exceptions import MlflowException

from dgmd_pipeline.errors import PipelineError, SettingsError
from dgmd_pipeline.registry.store import REQUEST_FAILED, Store, errors_explained
from dgmd_pipeline.settings import load


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("postgresql://me:pa55word@db/jars", r"driver is installed \(psycopg\[binary\] is not\)"),
        ("mysql://me:pa55word@db/jars", r"driver is installed \(mysqlclient is not\)"),
        ("mssql://me:pa55word@db/jars", r"driver is installed \(pyodbc is not\)"),
        ("postgresql+unknown://me:pa55word@db/jars", "a driver that SQLAlchemy knows"),
        ("sqlite:///:memory:", "a database like sqlite:////data/mlflow.db"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_before_anything_starts(uri, said, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SettingsError, match=rf"^MLFLOW_TRACKING_URI=.*{said}") as caught:
        load()
    assert "pa55word" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one line.\n[SQL: SELECT 1]", "did not answer as expected: one line. Correct this"),
        (
            "These files failed:\n##### MLmodel #####\nNo such file",
            "These files failed: ##### MLmodel ##### No such file. C",
        ),
        ("word " * 200, "word word [...]. Correct this and repeat the command."),
    ],
)
def test_the_reason_of_mlflow_is_shown_up_to_the_end_of_a_word(text, said):
    with pytest.raises(PipelineError) as caught, errors_explained(Store("sqlite:////jars.db", None), REQUEST_FAILED):
        raise MlflowException(text)
    assert said in str(caught.value)
    assert "server" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_failed_registration_says_what_the_next_run_does():
    message = "could not register the model: no space. The training is kept: the next run with the same images"
    with pytest.raises(PipelineError, match=message), errors_explained(Store("sqlite:////jars.db", None)):
        raise MlflowException("no space")
