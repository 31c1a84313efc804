"""Requests to MLflow that create or delete something. Each takes effect once, even if answers are lost.

MLflow's own client would repeat every request whose answer is lost or is a server error. If the server had already
created something, the repetition would create it a second time.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Created = TypeVar("Created")


def create(request: Callable[[], Created], find: Callable[[], Created | None]) -> Created:
    """Send a request that creates something, and return its result.

    If the request fails, `find` looks for the result, because the server may have created it. If `find` returns None,
    the request is sent again, up to MLFLOW_HTTP_REQUEST_MAX_RETRIES times. A request that MLflow refuses is not sent
    again. Raises MlflowException if nothing is created.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR, MLFLOW_HTTP_REQUEST_MAX_RETRIES
    from mlflow.exceptions import MlflowException, RestException

    retries, factor = MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.get()
    for attempt in range(retries + 1):
        if attempt > 1:  # as in urllib3, the first repetition follows at once
            time.sleep(factor * 2 ** (attempt - 1))
        try:
            with without_repetition():
                return request()
        except MlflowException as error:
            found = find()
            if found is not None:
                return found
            refused = isinstance(error, RestException) or error.error_code != "INTERNAL_ERROR"
            if refused or attempt == retries:
                raise
    raise AssertionError("unreachable")


def delete(request: Callable[[], object]) -> None:
    """Send a request that deletes something. Ignore MLflow's error if the thing does not exist any more."""
    from mlflow.exceptions import MlflowException

    try:
        request()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


@contextlib.contextmanager
def without_repetition() -> Iterator[None]:
    """Within the block, MLflow's client sends each request once.

    The block sets an environment variable, because MLflow has no other way to change the number of repetitions.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

    before = MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
    try:
        yield
    finally:
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(before)
