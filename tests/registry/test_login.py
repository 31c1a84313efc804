"""A real MLflow server with a login, and what each account may do."""

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from support.mlflow_server import served
from support.registry import candidate

from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.registry import login, promotion, registration, versions
from dgmd_pipeline.registry.store import NotAllowed, Store

pytest_plugins = ["support.registry"]

LOGINS = {"operator": "correct horse battery", "pipeline": "staple every night"}
SET = {login.PASSWORDS[account]: password for account, password in LOGINS.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("login")
    with served(folder, **SET) as uri:
        yield Store(uri, None)
    written = (folder / "log").read_text()
    assert not [password for password in LOGINS.values() if password in written]


@pytest.fixture
def use(monkeypatch):
    def use(account):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", account)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", LOGINS[account])

    return use


@pytest.fixture(scope="module")
def registered(server, saved_model, tmp_path_factory):
    """A version of the operator's account, which creates the model, and one of the pipeline's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)  # MLflow sets it, and other tests would see it
        for account, password in LOGINS.items():
            patch.setenv("MLFLOW_TRACKING_USERNAME", account)
            patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
            folder = tmp_path_factory.mktemp(account)
            registration.register(server, "nights", "jars", candidate(folder, saved_model, account))
    return server


def promote(store, number):
    state = versions.read(store, "jars")
    promotion.set_production(store, state, number, action="promote", user="ada@desk", reason="better")


def test_only_the_operator_s_account_changes_production(registered, use):
    use("pipeline")
    assert [version.aliases for version in versions.read(registered, "jars").versions] == [["candidate"], []]
    with pytest.raises(NotAllowed) as refused:
        promote(registered, 1)
    assert str(refused.value) == (
        f"MLflow at {registered.uri} refuses this: the account pipeline may not change which version is production; "
        "only these administrators may: operator. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an "
        "account that may do it, and repeat the command."
    )
    state = versions.read(registered, "jars")
    assert (state.production, promotion.history(state)) == (None, [])
    use("operator")
    promote(registered, 1)
    state = versions.read(registered, "jars")
    assert state.production.version == 1 and promotion.history(state)[0].done


@pytest.mark.filterwarnings("ignore::FutureWarning")  # stages are deprecated
def test_the_pipeline_s_account_changes_production_in_no_other_way(registered, use):
    use("operator")
    if versions.read(registered, "jars").production is None:
        promote(registered, 1)
    before = versions.read(registered, "jars")
    use("pipeline")
    client = mlflow.MlflowClient(registered.uri, registered.uri)
    (event,) = [tag for tag in before.tags if tag.startswith("dgmd.event.")]
    for attempt in (
        lambda: client.set_registered_model_alias("jars", "production", "2"),
        lambda: client.delete_registered_model_alias("jars", "production"),
        lambda: client.transition_model_version_stage("jars", "2", "Production"),
        lambda: client.set_model_version_tag("jars", "2", "environment", "production"),
        lambda: client.delete_model_version_tag("jars", "1", "environment"),
        lambda: client.set_registered_model_tag("jars", event, "{}"),
        lambda: client.delete_registered_model_tag("jars", event),
        lambda: client.delete_model_version("jars", "1"),
        lambda: client.rename_registered_model("jars", "bottles"),
        lambda: client.delete_registered_model("jars"),
    ):
        with pytest.raises(MlflowException, match="the account pipeline may not change which version is production"):
            attempt()
    assert versions.read(registered, "jars") == before
    client.set_registered_model_alias("jars", "candidate", "2")
    client.set_registered_model_tag("jars", "team", "spices")
    client.delete_model_version("jars", "2")
    assert [version.version for version in versions.read(registered, "jars").versions] == [1]


def test_nobody_reads_without_an_account(registered):
    assert requests.get(f"{registered.uri}/health", timeout=30).ok
    for page in ("", "/api/2.0/mlflow/registered-models/search", "/get-artifact"):
        assert requests.get(registered.uri + page, timeout=30).status_code == 401
    wrong = requests.get(registered.uri, auth=("operator", "password1234"), timeout=30)
    assert wrong.status_code == 401
    right = requests.get(registered.uri, auth=("operator", LOGINS["operator"]), timeout=30)
    assert right.ok and "<title>" in right.text


def test_a_new_password_replaces_the_old_one_at_the_next_start(tmp_path):
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    environment = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db", **SET}
    for password in ("the first of two", "the second of two"):
        changed = {**environment, "MLFLOW_PIPELINE_PASSWORD": password}
        command, variables = login.required(["mlflow", "server"], changed)
    assert command == ["mlflow", "server", "--app-name", "basic-auth"]
    assert not set(SET) & set(variables)
    store = SqlAlchemyStore()
    store.init_db(f"sqlite:///{tmp_path}/accounts.db")
    assert not store.authenticate_user("pipeline", "the first of two")
    assert store.authenticate_user("pipeline", "the second of two")
    assert [(user.username, user.is_admin) for user in store.list_users()] == [("operator", True), ("pipeline", False)]


OPERATOR, PIPELINE = login.PASSWORDS.values()


@pytest.mark.parametrize(
    ("passwords", "accounts", "expected"),
    [
        ({PIPELINE: SET[PIPELINE]}, False, f"{OPERATOR}: expected at least 12 characters, found 0"),
        ({OPERATOR: SET[OPERATOR]}, False, f"{PIPELINE}: expected at least 12 characters, found 0"),
        ({**SET, OPERATOR: "secret"}, False, f"{OPERATOR}: expected at least 12 characters, found 6"),
        (dict.fromkeys(SET, SET[PIPELINE]), False, "are equal"),
        ({}, True, "has accounts, but"),
        ({OPERATOR: "", PIPELINE: ""}, True, "has accounts, but"),
    ],
)
def test_a_server_does_not_start_with_half_a_login(passwords, accounts, expected, tmp_path):
    if accounts:
        (tmp_path / "accounts.db").touch()
    environment = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db", **passwords}
    with pytest.raises(SettingsError, match=expected) as refused:
        login.required(["mlflow", "server"], environment)
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)
    assert SET[PIPELINE] not in str(refused.value)


def test_without_passwords_there_is_no_login(tmp_path):
    environment = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db", OPERATOR: "", PIPELINE: ""}
    assert login.required(["mlflow", "server"], environment) == (["mlflow", "server"], environment)
