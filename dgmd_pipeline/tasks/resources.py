"""Objects that a run keeps between steps: listing, frozen network, trained model, process of the serving benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmd_pipeline.tasks import names
from dgmd_pipeline.workflow.executors import Executor, ProcessExecutor
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.run_context import RunContext

if TYPE_CHECKING:
    import keras

    from dgmd_pipeline.evaluation.serving_benchmark import Process
    from dgmd_pipeline.s3.listing import Listing

HEAVY = (names.RAW, names.INSPECTED, names.TFRECORD, names.FEATURES)  # steps that work on images


@dataclass
class Resources:
    """Objects that a run keeps in memory between steps."""

    listing: "Listing | None" = None  # of the bucket, if planning needed it
    network: "Callable[[], keras.Model] | None" = None  # waits for the frozen backbone's network and returns it
    start_network: Callable[[], None] | None = None  # to be called after the download
    trained: "tuple[str, keras.Model] | None" = None  # fingerprint and model, if this run trained it
    serving: "Process | None" = None  # process of the serving benchmark, if it was started before the evaluation


def executor(settings: Any) -> Executor:
    """Return the executor of a run: a Dask cluster if its address is set, else processes on this machine."""
    if settings.dask_scheduler_address is None:
        return ProcessExecutor()
    from dgmd_pipeline.settings import provide_worker_defaults
    from dgmd_pipeline.workflow.cluster import ClusterExecutor

    return ClusterExecutor(settings.dask_scheduler_address, settings.data_dir, provide_worker_defaults)


def connect_early(context: RunContext, plans: Sequence[StepPlan]) -> None:
    """Check a cluster before the first step, if the run will need it."""
    if any(plan.state != "done" and plan.step.startswith(HEAVY) for plan in plans):
        context.executor.connect()


def start_network_early(context: RunContext, plans: Sequence[StepPlan]) -> None:
    """If this run will need the frozen network, build it in a background thread while earlier steps run.

    The thread uses one core for about 10 s. It imports TensorFlow and creates the layers. If features are extracted,
    the thread also traces the forward pass.

    If this run downloads all images, the thread starts after the download. The thread holds Python's global lock most
    of the time, and a download needs the lock several times for each object. At the same time, both took as long as one
    after the other, and used 1.2 of two cores.
    """
    due, missing = _due(context, plans)
    # If the folder of features exists, most features are reused. In this case, the forward pass is not traced early.
    extracts = any(name.startswith(names.FEATURES) for name in missing) and not context.executor.is_cluster
    if extracts or names.TRAINED_MODEL in due:
        start = partial(_start_network, context, extracts)
        if names.RAW in missing:
            context.shared(Resources).start_network = start
        else:
            start()


def start_network_after_download(context: RunContext) -> None:
    """Start the thread that `start_network_early` has postponed, if there is one."""
    if start := context.shared(Resources).start_network:
        start()


def start_serving_if_idle(context: RunContext, plans: Sequence[StepPlan]) -> None:
    """Start the serving benchmark's process if this run will train or evaluate, and has little work before that.

    Such a run does not need all cores at its start.
    """
    due, missing = _due(context, plans)
    if due & {names.TRAINED_MODEL, names.EVALUATION} and not any(name.startswith(HEAVY) for name in missing):
        start_serving_early(context)


def _due(context: RunContext, plans: Sequence[StepPlan]) -> tuple[set[str], set[str]]:
    """Return two sets: the steps that will run, and those of these steps that have no folder yet."""
    # If the planning has listed the bucket, a step with the state "maybe" very likely runs.
    listed = context.shared(Resources).listing is not None
    due = {plan.step for plan in plans if plan.state == "run" or (listed and plan.state == "maybe")}
    return due, {name for name in due if not (context.settings.data_dir / name).exists()}


def _start_network(context: RunContext, extracts: bool) -> None:
    from dgmd_pipeline.training import backbones, networks
    from dgmd_pipeline.workflow import executors

    settings: Any = context.settings
    if backbones.is_frozen(settings.backbone):
        size = (settings.image_height, settings.image_width)
        given = (settings.backbone, settings.backbone_weights, *size, settings.keras_home)
        build = partial(networks.build_frozen, *given, extracts=extracts)
        context.shared(Resources).network = executors.submit_in_background(build)


def network(context: RunContext) -> "Callable[[], keras.Model] | None":
    """Return a function that waits for the frozen network of this run and returns it; None for `cnn`.

    A background thread builds the network.
    """
    resources = context.shared(Resources)
    if resources.network is None:
        _start_network(context, extracts=False)
    return resources.network


def trained_model(context: RunContext, folder: Path) -> "keras.Model":
    """Return the trained model of a folder. Loading takes 3 to 5 s, so a run keeps the model that it trained."""
    from dgmd_pipeline.training import networks, runtime, train

    trained = context.shared(Resources).trained
    if trained and trained[0] == context.result.fingerprints.get(names.TRAINED_MODEL):
        return trained[1]
    runtime.start_tensorflow()
    return networks.load(folder / train.MODEL)


def model_file(folder: Path) -> Path:
    """Return the file of a trained model, and import Keras, which MLflow needs to log the file.

    Raises PipelineError if the file is missing or was changed.
    """
    from dgmd_pipeline.training import networks, runtime, train

    networks.check_file(folder / train.MODEL)
    runtime.start_tensorflow()
    return folder / train.MODEL


def start_serving_early(context: RunContext) -> None:
    """Start the serving benchmark's process if it is not running yet, so that it is ready after the training.

    A run that does not evaluate does not start the process. The start takes 2 CPU seconds. While the process waits, it
    uses 200 MB of unshared memory. If memory runs out, Linux kills this process before any other process of the run.
    Then `serving_process` starts a new one.
    """
    resources = context.shared(Resources)
    all_here = context.holds_lock and names.EVALUATION in context.result.planned  # all steps run in this process
    if all_here and resources.serving is None:
        resources.serving = _start_serving()


def serving_process(context: RunContext) -> "Process":
    """Return the serving benchmark's process: the one that was started early, or a new one. The caller ends it."""
    resources = context.shared(Resources)
    early, resources.serving = resources.serving, None
    if early is None or early.poll() is None:
        return early or _start_serving()
    early.end()  # it was killed while it waited
    return _start_serving()


def _start_serving() -> "Process":
    from dgmd_pipeline.evaluation import serving_benchmark
    from dgmd_pipeline.settings import serving_environment

    return serving_benchmark.start_process(serving_environment())


def close(context: RunContext) -> None:
    """End the serving benchmark's process, if no step has taken it."""
    resources = context.shared(Resources)
    early, resources.serving = resources.serving, None
    if early:
        early.end()
