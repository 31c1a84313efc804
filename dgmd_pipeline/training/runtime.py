"""Imports TensorFlow without its log output, sets random seeds, and limits threads."""

import functools
import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from threadpoolctl import threadpool_limits

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_importing = threading.Lock()


def one_blas_thread(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Limit `function` to one BLAS thread.

    BLAS threads wait for each other in a busy loop. With two threads on a busy machine with two cores, fits that
    usually take a second did not end within minutes.
    """

    @functools.wraps(function)
    def limited(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        import scipy.optimize  # noqa: F401 - SciPy's own BLAS can be limited only after it is loaded

        with threadpool_limits(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited


def one_executor_thread(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run the operations of `function`, which `tf.function` returned, one after another in one thread.

    TensorFlow's default executor distributes operations to threads. Idle threads wait in a busy loop, and short
    operations leave them idle often. On a machine with a GPU, `function` keeps the default executor, because the other
    one cannot transfer data between devices.
    """
    import tensorflow as tf
    from tensorflow.python.eager import context

    if tf.config.list_logical_devices("GPU"):
        return function

    @functools.wraps(function)
    def limited(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with context.function_executor_type("SINGLE_THREADED_EXECUTOR"):
            return function(*args, **kwargs)

    return limited


def start_tensorflow() -> None:
    """Import TensorFlow if it is not imported yet. If another thread is importing it, wait for that thread."""
    with _importing:
        if "tensorflow" not in sys.modules:
            _import_tensorflow()


def _import_tensorflow() -> None:
    """Import TensorFlow and discard what its libraries write to standard error during the import.

    Scikit-learn is hidden from Keras. Otherwise, Keras would import it for unused wrappers, in 0.6 s of CPU time. The
    garbage collector is off during the import, because it would take a fifth of the import's time. The import creates a
    million objects, which are needed until the process ends. After the import, the collector ignores these objects.
    Otherwise, a full collection would take 0.35 s longer.
    """
    hides = "sklearn" not in sys.modules
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    gc.disable()
    try:
        os.dup2(devnull, 2)
        if hides:
            sys.modules["sklearn"] = None  # type: ignore[assignment]  # an import of it raises ImportError
        import tensorflow  # noqa: F401

        gc.freeze()
    finally:
        gc.enable()
        if hides:
            sys.modules.pop("sklearn", None)
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


def set_seed(seed: int) -> None:
    """Set the seed of Keras, which determines the initial weights of a network."""
    import keras

    keras.utils.set_random_seed(seed)
