"""The steps and their dependencies. Only this package contains the names of step folders.

This command runs the pipeline with the settings of the environment:

    luigi --module dgmd_pipeline.tasks RegisterModel --local-scheduler

A task contains no algorithm: it reads its inputs, calls one or a few functions, and writes the results. Modules that
import TensorFlow, MLflow, Pillow or boto3 are imported where they are used. So a run with nothing to do starts without
them.
"""

from dgmd_pipeline.tasks import model, resources
from dgmd_pipeline.workflow import run_context, signals
from dgmd_pipeline.workflow.run_context import RunContext

LAST = model.RegisterModel


def _context_of_environment() -> RunContext:
    from dgmd_pipeline import settings

    values = settings.load()
    executor = resources.executor(values)
    return RunContext(values, executor, signals.check_stopped, name=values.model_name, holds_lock=False)


run_context.provide_default(_context_of_environment)
