"""A rule that MLflow's permissions cannot express: only administrators may change which version is production.

In MLflow, the permission to create versions includes the permission to set aliases. If a server requires a login,
its setting `authorization_function` is the function `authenticate`. So the server calls `authenticate` for every
request.
"""

from typing import TYPE_CHECKING

from dgmd_pipeline.registry.store import CANDIDATE, ENVIRONMENT, EVENT, PRODUCTION

if TYPE_CHECKING:
    from flask import Response
    from werkzeug.datastructures import Authorization


def authenticate() -> "Authorization | Response":
    """Return the login of the current request, or a response that refuses the request."""
    from flask import Response, jsonify, request
    from mlflow.server import auth

    login = auth.authenticate_request_basic_auth()
    if isinstance(login, Response) or not _changes_production(request.method, request.path):
        return login
    administrators = [user.username for user in auth.store.list_users() if user.is_admin]
    if login.username in administrators:
        return login
    message = (
        f"the account {login.username} may not change which version is production; only these administrators may: "
        f"{', '.join(administrators)}"
    )
    answer = jsonify(error_code="PERMISSION_DENIED", message=message)
    answer.status_code = 403
    return answer


def _changes_production(method: str, path: str) -> bool:
    """Return whether only administrators may send the current request.

    Such a request does one of the following:
    - It sets an alias other than `candidate`, or deletes an alias.
    - It changes the tag `environment` or the stage of a version.
    - It changes the history of promotions.
    - It deletes the production version.
    - It deletes or renames a model.

    MLflow's own function parses the request. So this check and the server interpret it in the same way.
    """
    from mlflow.protos import model_registry_pb2 as messages
    from mlflow.server.handlers import _get_request_message

    match f"{method} {'/'.join(path.split('/')[-2:])}":
        case "POST registered-models/alias":
            return _get_request_message(messages.SetRegisteredModelAlias()).alias != CANDIDATE
        case "POST registered-models/set-tag":
            return _get_request_message(messages.SetRegisteredModelTag()).key.startswith(EVENT)
        case "DELETE registered-models/delete-tag":
            return _get_request_message(messages.DeleteRegisteredModelTag()).key.startswith(EVENT)
        case "POST model-versions/set-tag":
            return _get_request_message(messages.SetModelVersionTag()).key == ENVIRONMENT
        case "DELETE model-versions/delete-tag":
            return _get_request_message(messages.DeleteModelVersionTag()).key == ENVIRONMENT
        case "DELETE model-versions/delete":
            message = _get_request_message(messages.DeleteModelVersion())
            return _is_production(message.name, message.version)
        case (
            "DELETE registered-models/alias"
            | "DELETE registered-models/delete"
            | "POST registered-models/rename"
            | "POST model-versions/transition-stage"
        ):
            return True
    return False


def _is_production(name: str, version: str) -> bool:
    from mlflow.exceptions import MlflowException
    from mlflow.server.handlers import _get_model_registry_store

    try:
        return int(_get_model_registry_store().get_registered_model(name).aliases[PRODUCTION]) == int(version)
    except (MlflowException, KeyError, ValueError):  # no such model, no production version, or not a number
        return False
