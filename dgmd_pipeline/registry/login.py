"""Starts a command. If the command starts an MLflow server and passwords are set, the server requires a login.

The image of the MLflow server runs every command with this module: `python -m dgmd_pipeline.registry.login COMMAND`.
"""

import configparser
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from dgmd_pipeline.errors import PipelineError, SettingsError
from dgmd_pipeline.registry import database

OPERATOR, PIPELINE = "operator", "pipeline"  # accounts
PASSWORDS = {OPERATOR: "MLFLOW_OPERATOR_PASSWORD", PIPELINE: "MLFLOW_PIPELINE_PASSWORD"}  # variables
SHORTEST_PASSWORD = 12  # characters; MLflow refuses shorter ones
DATABASE, SETTINGS = "accounts.db", "basic_auth.ini"  # files
# Time for which MLflow caches a login. Without the cache, MLflow hashes the password several times for each request.
# One process of the server answers all requests. When a password changes, this process removes the old login from its
# cache, so the new password applies at once.
CACHE_SECONDS = 600


def required(command: list[str], environment: Mapping[str, str]) -> tuple[list[str], Mapping[str, str]]:
    """Return the command and the environment with which an MLflow server requires a login.

    Returns `command` and `environment` unchanged if no password is set. Otherwise, creates the accounts with the
    passwords in the environment. If an account exists already, only its password is changed. The accounts and
    the settings of the login are files beside the SQLite database of the server.

    Raises SettingsError if one of the passwords is missing or too short, if both are equal, or if the server has no
    SQLite database. Also raises it if there are accounts but no passwords. So a server that has accounts cannot start
    without a login.
    """
    passwords = {account: environment.get(name, "") for account, name in PASSWORDS.items()}
    store = environment.get("MLFLOW_BACKEND_STORE_URI", "")
    path = database.path_of(store)
    accounts = path.with_name(DATABASE) if path else None
    if not any(passwords.values()):
        if accounts and accounts.exists():
            raise SettingsError(
                f"{accounts} has accounts, but {' and '.join(PASSWORDS.values())} are not set: set both, or delete "
                "this file to let everyone change models."
            )
        return command, environment
    _check(passwords)
    if accounts is None:
        raise SettingsError(f"{PASSWORDS[OPERATOR]} requires an SQLite database in MLFLOW_BACKEND_STORE_URI.")
    uri = database.uri_of(accounts)
    _write_accounts(uri, passwords)
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": str(_write_settings(accounts.with_name(SETTINGS), uri)),
        "MLFLOW_AUTH_ADMIN_USERNAME": OPERATOR,
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),  # for the form that creates accounts
    }
    kept = {name: value for name, value in environment.items() if name not in PASSWORDS.values()}
    return [*command, "--app-name", "basic-auth"], kept | settings


def _check(passwords: Mapping[str, str]) -> None:
    for account, name in PASSWORDS.items():
        if len(passwords[account]) < SHORTEST_PASSWORD:
            raise SettingsError(
                f"{name}: expected at least {SHORTEST_PASSWORD} characters, found {len(passwords[account])}. A login "
                f"requires the passwords of both accounts, {OPERATOR} and {PIPELINE}."
            )
    if passwords[OPERATOR] == passwords[PIPELINE]:
        raise SettingsError(
            f"{' and '.join(PASSWORDS.values())} are equal. The pipeline could promote versions with the operator's "
            "password."
        )


def _write_accounts(uri: str, passwords: Mapping[str, str]) -> None:
    """Create the accounts or change their passwords.

    The pipeline's account may change all experiments and models, except for what the module `permissions` refuses.
    """
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(uri)
    for account, password in passwords.items():
        if store.has_user(account):
            store.update_user(account, password, is_admin=account == OPERATOR)
        else:
            store.create_user(account, password, is_admin=account == OPERATOR)
    for resource in ("experiment", "registered_model"):  # "*" includes what other accounts have created
        store.grant_user_permission(PIPELINE, resource, "*", "MANAGE")


def _write_settings(path: Path, uri: str) -> Path:
    parser = configparser.ConfigParser(interpolation=None)
    parser["mlflow"] = {
        "default_permission": "READ",
        "database_uri": uri.replace("%", "%%"),  # MLflow's parser replaces %% by %
        "authorization_function": "dgmd_pipeline.registry.permissions:authenticate",
        "auth_cache_ttl_seconds": str(CACHE_SECONDS),
    }
    with path.open("w", encoding="utf-8") as file:
        parser.write(file)
    return path


def main(command: list[str]) -> None:
    """Replace this process by the command."""
    environment: Mapping[str, str] = os.environ
    try:
        if command[:2] == ["mlflow", "server"]:
            command, environment = required(command, environment)
    except PipelineError as error:
        sys.exit(str(error))
    os.execvpe(command[0], command, environment)  # noqa: S606 - the command of the container


if __name__ == "__main__":
    main(sys.argv[1:])
