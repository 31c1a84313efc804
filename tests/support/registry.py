"""Model registries for tests: an embedded store and a real MLflow server."""

import pytest

from dgmd_pipeline.registry import store as registry_store


@pytest.fixture(scope="session")
def embedded_store(tmp_path_factory):
    """One store for all tests, which use different names: MLflow takes some 2 s to create its tables."""
    folder = tmp_path_factory.mktemp("embedded")
    registry_store.create(folder)
    return registry_store.embedded(folder)


@pytest.fixture(params=["embedded", "server"])
def store(request):
    if request.param == "embedded":
        return request.getfixturevalue("embedded_store")
    return registry_store.Store(request.getfixturevalue("mlflow_server"), None)
