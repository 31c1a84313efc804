"""The network and the serving benchmark's process between the steps of a run."""

import pytest

from dgmd_pipeline.settings import Settings
from dgmd_pipeline.tasks import names, resources
from dgmd_pipeline.tasks.model import TrainModel
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.run_context import RunContext, activate


@pytest.fixture
def context(tmp_path):
    """The context of a run, whose process is ended after the test."""
    context = RunContext(Settings(DATA_DIR=tmp_path))
    yield context
    resources.close(context)


def started_early(context):
    resources.start_serving_early(context)
    return context.shared(resources.Resources).serving


def test_a_run_that_evaluates_starts_the_process_with_the_training_and_hands_it_over(context):
    context.result.planned.add(names.EVALUATION)
    early = started_early(context)
    with resources.serving_process(context) as process:
        assert process is early and process.poll() is None
    assert process.poll() is not None
    assert context.shared(resources.Resources).serving is None


@pytest.mark.parametrize(("backbone", "starts_at_once"), [("cnn", True), ("MobileNetV2", False)])
def test_the_training_starts_the_process_when_it_needs_the_network(tmp_path, backbone, starts_at_once):
    context = RunContext(Settings(DATA_DIR=tmp_path, BACKBONE=backbone))
    context.result.planned.add(names.EVALUATION)
    shared = context.shared(resources.Resources)
    shared.network = None if starts_at_once else lambda: "network"
    with activate(context):
        wait = TrainModel()._backbone()
        assert (shared.serving is not None) == starts_at_once
        assert starts_at_once or wait() == "network"
    assert shared.serving is not None
    resources.close(context)


def test_a_run_without_an_evaluation_starts_no_process(context):
    context.result.planned.add(names.TRAINED_MODEL)
    assert started_early(context) is None


def test_a_step_that_runs_in_a_process_of_its_own_starts_no_process(tmp_path):
    context = RunContext(Settings(DATA_DIR=tmp_path), holds_lock=False)
    context.result.planned.add(names.EVALUATION)
    assert started_early(context) is None


def test_a_process_that_was_killed_while_it_waited_is_replaced(context):
    context.result.planned.add(names.EVALUATION)
    early = started_early(context)
    early.kill()
    early.wait()
    with resources.serving_process(context) as process:
        assert process is not early and process.poll() is None
    assert early.stdin.closed


def test_a_run_that_ends_before_the_evaluation_ends_the_process(context):
    context.result.planned.add(names.EVALUATION)
    early = started_early(context)
    resources.close(context)
    assert early.poll() is not None and early.stdin.closed


@pytest.mark.parametrize(
    ("steps", "folders", "starts"),
    [
        ((names.TRAINED_MODEL,), (), True),
        ((f"{names.TFRECORD}_training", names.TRAINED_MODEL), (f"{names.TFRECORD}_training",), True),
        ((f"{names.TFRECORD}_training", names.TRAINED_MODEL), (), False),  # all cores convert
        ((names.BALANCED,), (names.BALANCED,), False),
    ],
)
def test_the_process_starts_with_the_run_where_few_images_are_to_be_worked_on(tmp_path, steps, folders, starts):
    context = RunContext(Settings(DATA_DIR=tmp_path, BACKBONE="cnn"))
    context.result.planned |= {*steps, names.EVALUATION}
    for name in folders:
        (tmp_path / name).mkdir()
    resources.start_serving_if_idle(context, [StepPlan(step, "run", [], None) for step in steps])
    early = context.shared(resources.Resources).serving
    resources.start_serving_early(context)  # the training
    now = context.shared(resources.Resources).serving
    resources.close(context)
    assert (early is not None) == starts and (early or now) is now


@pytest.mark.parametrize("downloads", [True, False])
def test_the_network_is_built_after_a_first_download_or_at_once(tmp_path, downloads):
    values = Settings(DATA_DIR=tmp_path, BACKBONE="MobileNetV2", BACKBONE_WEIGHTS="none")
    context = RunContext(values)
    steps = [names.RAW, names.TRAINED_MODEL]
    if not downloads:
        (tmp_path / names.RAW).mkdir()  # only a few new objects will be downloaded
    resources.start_network_early(context, [StepPlan(step, "run", [], None) for step in steps])
    shared = context.shared(resources.Resources)
    assert (shared.network is None) == downloads
    resources.start_network_after_download(context)
    assert shared.network().name == "backbone"
