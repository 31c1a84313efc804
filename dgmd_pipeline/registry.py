"""A trained model and its measurements -> a run and a version in the MLflow registry. The only door to MLflow."""

import base64
import contextlib
import http.client
import logging
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.settings import redact

if TYPE_CHECKING:
    import keras
    from mlflow import MlflowClient
    from mlflow.models import Model

log = logging.getLogger(__name__)
TRAINING = "dgmd.training_id"
CANDIDATE, PRODUCTION = "candidate", "production"  # aliases; the latter also a value of the tag
ENVIRONMENT = "environment"
NON_PRODUCTION = "non-production"
SERVER_MAJOR = 3
REGISTERED = "did not take the model: {}. The training is kept; the next run only registers."
ASKED = "did not answer as expected: {}. See to the server and give the command again."
LOADER = "dgmd_served"  # the name of served.py among a registered model's files, and in the consumer's process
EMBEDDED_BYTES = 2_000_000  # of an embedded store beside its models: its database has 0.96 MB after the first


class Store(NamedTuple):
    """Where runs and versions go."""

    uri: str  # tracking and registry
    artifacts: str | None  # where a new experiment keeps files; None: where the server says


class Foreign(PipelineError):
    """A version was not made by this pipeline."""


class Version(NamedTuple):
    """A version in the registry."""

    name: str
    version: int
    run_id: str
    new: bool  # created just now, and not found from an earlier try


class Entry(NamedTuple):
    """What the registry says of a version."""

    version: int
    run_id: str
    created: float  # seconds since 1970
    tags: Mapping[str, str]
    aliases: Sequence[str]
    stage: str


class Fetched(NamedTuple):
    """A version's files, here."""

    version: int
    path: Path  # of the Keras model
    labels: Sequence[str]  # of its outputs, in their order
    trained_on: frozenset[str]  # SHA-256 of each training image's file


class Candidate(NamedTuple):
    """What is logged and registered."""

    training_id: str  # a version with this tag is this training's
    model: Callable[[], "keras.Model"]  # called if needed; uint8 [n, height, width, 3] -> float32 [n, classes]
    labels: Sequence[str]  # of the outputs, in their order
    params: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]  # metrics of each epoch, the first one is epoch 1
    metrics: Mapping[str, float]  # of the evaluation, data counts and the like
    times: Mapping[str, float]  # metrics of the run's steps, which say nothing about the model
    tags: Mapping[str, str]
    source: str  # URI of the data, s3://...
    source_digest: str  # identity of the data
    files: Mapping[Path, str]  # a file or folder -> the artifact folder it goes to, "" for the top


def embedded(folder: Path) -> Store:
    """Return the store that `create` made: an SQLite database and artifact files."""
    folder = folder.resolve()
    return Store(f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri())


def create(folder: Path) -> None:
    """Make an embedded store in an empty folder, which may be moved before it is used."""
    from mlflow import MlflowClient

    (folder / "artifacts").mkdir()
    store = embedded(folder)
    with explained(store):
        MlflowClient(store.uri).search_experiments()


def check_server(uri: str, login: str | None = None, timeout: float = 5) -> str | None:
    """Ask an MLflow server for its version, without importing MLflow; return a warning where that is not possible.

    `login` is "user:password"; one in the URI goes first.

    Raises PipelineError where the server is older than MLflow 3, which this client cannot be trusted to speak to.
    """
    if not uri.startswith(("http://", "https://")):
        return None
    parts = urllib.parse.urlsplit(uri.rstrip("/"))
    login_in_uri, _, host = parts.netloc.rpartition("@")
    shown = parts._replace(netloc=host).geturl()
    login = urllib.parse.unquote(login_in_uri) or login
    later = "The run goes on; the registration at its end tries again."
    request = urllib.request.Request(f"{shown}/version", headers=_authorization(login) if login else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            found = answer.read(100).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        hint = {
            401: "It wants a user and a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. ",
            403: "It may not know the host name it was called by: set MLFLOW_SERVER_ALLOWED_HOSTS on the server. ",
        }.get(error.code, "")
        return f"The MLflow server at {shown} answers {error.code} {error.reason}. {hint}{later}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"The MLflow server at {shown} cannot be reached ({getattr(error, 'reason', error)}). {later}"
    major = re.match(r"(\d+)\.\d", found)
    if major is None:
        return f"What answers at {shown} does not say that it is an MLflow server. {later}"
    if int(major[1]) < SERVER_MAJOR:
        raise PipelineError(
            f"The MLflow server at {shown} is version {found}, this pipeline speaks to version {SERVER_MAJOR} and "
            "later: upgrade the server."
        )
    return None


def _authorization(login: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def git_revision(path: Path) -> str | None:
    """Return the commit of the checkout that `path` is in, or None outside of one."""
    from mlflow.utils.git_utils import get_git_commit

    return get_git_commit(str(path))


def register(store: Store, experiment: str, name: str, candidate: Candidate) -> Version:
    """Log a run and create a non-production version with alias `candidate`, or find the one of this training.

    The version is created with its tags in one call, so that whoever is stopped after it finds it by the training's
    id. A run of this training that was cut off is deleted and made anew, one that is complete is used.

    Raises PipelineError where MLflow cannot be reached or refuses; the client has retried by then.
    """
    import mlflow
    from mlflow import MlflowClient

    with explained(store):
        mlflow.set_tracking_uri(store.uri)
        client = MlflowClient()
        found = _find(client, name, candidate.training_id)
        if found is None:
            experiment_id = _experiment(client, experiment, store.artifacts)
            logged = _logged(client, experiment_id, candidate.training_id)
            run_id, model_uri = logged or _log(client, experiment_id, candidate)
            found = _create(client, name, model_uri, run_id, candidate)
        _mark_as_candidate(client, found)
        return found


def add_metrics(store: Store, version: Version, metrics: Mapping[str, float]) -> None:
    """Log metrics to the run of a version that is registered.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with explained(store):
        _log_metrics(MlflowClient(store.uri), version.run_id, [metrics])


def entries(store: Store, name: str) -> list[Entry]:
    """Return the versions of a model, the newest first; none where there is no such model.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with explained(store, ASKED):
        client = MlflowClient(store.uri)
        model = registered_model(client, name)
        if model is None:
            return []
        aliases = model.aliases  # a search for versions does not return them
        found = []
        for version in _versions(client, name):
            number = int(version.version)
            its = [alias for alias, other in sorted(aliases.items()) if int(other) == number]
            stage, created = version.current_stage or "None", version.creation_timestamp / 1000
            found.append(Entry(number, version.run_id or "", created, version.tags, its, stage))
    return sorted(found, key=lambda entry: -entry.version)


def registered_model(client: "MlflowClient", name: str) -> Any:
    """Return MLflow's `RegisteredModel`; None where there is none of this name."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def production(store: Store, name: str) -> Entry | None:
    """Return the version that has the alias `production`; None where there is none.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    return next((entry for entry in entries(store, name) if PRODUCTION in entry.aliases), None)


def fetch(store: Store, name: str, entry: Entry, folder: Path) -> Fetched:
    """Download a version's model and what its run says of it into `folder`.

    Raises PipelineError where MLflow cannot be reached or refuses, Foreign where the version was not made by this
    pipeline.
    """
    import mlflow
    from mlflow.models import Model

    with explained(store, ASKED):
        mlflow.set_tracking_uri(store.uri)
        mlflow.artifacts.download_artifacts(f"models:/{name}/{entry.version}", dst_path=str(folder / "model"))
        about = Model.load(str(folder / "model")).metadata or {}
    path, labels = folder / "model" / "data" / "model.keras", about.get("labels")
    rows = artifact(store, entry, "split/training.csv", folder)
    if not path.is_file() or not labels or not rows:
        raise Foreign(
            f"{name} version {entry.version} was not made by this pipeline: its model, its labels or the list of its "
            "training images is missing."
        )
    trained_on = frozenset(row.sha256 for row in manifest.read(rows, manifest.Example))
    return Fetched(entry.version, path, labels, trained_on)


def artifact(store: Store, entry: Entry, name: str, folder: Path) -> Path | None:
    """Download a file of a version's run to `folder / name` and return its path; None where the run has no such file.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with explained(store, ASKED):
        client = MlflowClient(store.uri)
        above = name.rpartition("/")[0]
        if name not in (file.path for file in client.list_artifacts(entry.run_id, above or None)):
            return None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # some stores keep the folders above, others do not
            Path(client.download_artifacts(entry.run_id, name, scratch)).replace(path)
        return path


@contextlib.contextmanager
def explained(store: Store, what: str = REGISTERED) -> Iterator[None]:
    """Turn what MLflow raises into a PipelineError, and keep it from talking.

    `what` has a place for the reason.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        # Behind MLflow are HTTP, databases and artifact stores, whose clients' errors have no class in common. What
        # Python itself raises is a fault of ours, save for the disk's errors and a database driver that is missing.
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | ModuleNotFoundError):
            raise
        reason = str(error).strip().split("\n")[0][:300].rstrip(".")
        # It is stored, too: in reports, the history and MLflow.
        raise PipelineError(redact(f"MLflow at {store.uri} {what.format(reason)}")) from error


def _find(client: "MlflowClient", name: str, training_id: str) -> Version | None:
    for version in client.search_model_versions(f"name = '{name}' and tags.`{TRAINING}` = '{training_id}'"):
        return Version(name, int(version.version), version.run_id or "", new=False)
    return None


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=artifacts)
    if experiment.lifecycle_stage != "active":
        raise PipelineError(
            f"The MLflow experiment {name} has been deleted. Restore it (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}), or set MLFLOW_EXPERIMENT_NAME to another one."
        )
    return experiment.experiment_id


def _logged(client: "MlflowClient", experiment_id: str, training_id: str) -> tuple[str, str] | None:
    """Return run id and model URI of this training where they are complete; delete runs that were cut off."""
    complete = None
    for found in client.search_runs([experiment_id], f"tags.`{TRAINING}` = '{training_id}'"):
        run = client.get_run(found.info.run_id)
        models = run.outputs.model_outputs if run.outputs else []
        if run.info.status == "FINISHED" and models:
            complete = run.info.run_id, f"models:/{models[0].model_id}"
        else:
            client.delete_run(run.info.run_id)
    return complete


def _log(client: "MlflowClient", experiment_id: str, candidate: Candidate) -> tuple[str, str]:
    """Log everything about a training as one run and return the run's id and the model's URI."""
    import mlflow
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.models import Model

    model = candidate.model()
    tags = {**candidate.tags, TRAINING: candidate.training_id}
    with mlflow.start_run(experiment_id=experiment_id, tags=tags) as run:
        mlflow.log_params(dict(candidate.params), synchronous=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a folder MLflow says that it may be a folder
            source = resolve_dataset_source(candidate.source)
        dataset = MetaDataset(source, name=candidate.source, digest=candidate.source_digest[:16])  # type: ignore[abstract]
        mlflow.log_input(dataset, context="training")
        _log_metrics(client, run.info.run_id, [candidate.metrics, *candidate.history])
        for path, folder in candidate.files.items():
            if path.is_dir():
                mlflow.log_artifacts(str(path), folder)
            else:
                mlflow.log_artifact(str(path), folder)
        info = Model.log(
            artifact_path=None,
            flavor=_QuietKeras,
            name="model",
            model=model,
            signature=_signature(len(candidate.labels)),
            pip_requirements=_requirements(),
            metadata={"labels": list(candidate.labels)},
        )
        mapping = next(path for path in candidate.files if path.name == "mapping.json")
        client.log_model_artifact(info.model_id, str(mapping))
        _log_metrics(client, run.info.run_id, [candidate.times])  # what is there before the model becomes the model's
    return run.info.run_id, info.model_uri


class _QuietKeras:
    """MLflow's Keras flavour, whose Python function is that of `served.py`."""

    @staticmethod
    def save_model(path: str, mlflow_model: "Model", **options: Any) -> None:
        import mlflow.keras

        mlflow.keras.save_model(path=path, mlflow_model=mlflow_model, **options)
        code = Path(path) / "code"
        code.mkdir()
        shutil.copyfile(Path(__file__).with_name("served.py"), code / f"{LOADER}.py")
        mlflow_model.flavors["python_function"] |= {"loader_module": LOADER, "code": code.name}
        mlflow_model.save(str(Path(path) / "MLmodel"))


def _log_metrics(client: "MlflowClient", run_id: str, steps: Iterable[Mapping[str, float]]) -> None:
    """Log metrics of MLflow's steps 0, 1, ... in as few requests as possible: the client puts 1,000 into each."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [Metric(name, value, now, step) for step, metrics in enumerate(steps) for name, value in metrics.items()]
    client.log_batch(run_id, points, synchronous=True)  # the process ends without waiting for a queue


def _signature(classes: int) -> Any:
    """Pictures as uint8 on purpose: MLflow then refuses those that a caller has scaled already."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    pictures = TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3))
    probabilities = TensorSpec(np.dtype("float32"), (-1, classes))
    return ModelSignature(Schema([pictures]), Schema([probabilities]))


def _requirements() -> list[str]:
    """Name what loading the model needs: `tensorflow`, not `tensorflow-cpu`, which has wheels for x86-64 only."""
    import tensorflow as tf

    return [f"tensorflow=={tf.__version__}", *(f"{name}=={installed(name)}" for name in ("keras", "numpy"))]


def _create(client: "MlflowClient", name: str, model_uri: str, run_id: str, candidate: Candidate) -> Version:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {**candidate.tags, TRAINING: candidate.training_id, ENVIRONMENT: NON_PRODUCTION}
    created = client.create_model_version(
        name, model_uri, run_id, tags=tags, model_id=model_uri.removeprefix("models:/")
    )
    return Version(name, int(created.version), run_id, new=True)


def _mark_as_candidate(client: "MlflowClient", version: Version) -> None:
    """Give the version the alias `candidate`, unless it is production by now or not the newest."""
    now = client.get_model_version(version.name, str(version.version))
    newest = max(int(other.version) for other in _versions(client, version.name))
    promoted = PRODUCTION in now.aliases or now.tags.get(ENVIRONMENT) != NON_PRODUCTION
    if not promoted and newest == version.version and CANDIDATE not in now.aliases:
        client.set_registered_model_alias(version.name, CANDIDATE, str(version.version))


def _versions(client: "MlflowClient", name: str) -> Iterable[Any]:
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return
