"""The TensorFlow import without its log output, random seeds, and thread limits."""

import os
import sys

from threadpoolctl import threadpool_limits

# A decorator. BLAS threads wait for each other in a busy loop: with two of them on a busy machine of two cores, fits
# that take a second did not end within minutes.
one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")


def start_tensorflow() -> None:
    """Import TensorFlow and discard what its libraries write to the standard error of the process while they load.

    Keras imports scikit-learn where it exists, for wrappers that nothing uses: 0.6 CPU seconds. So it is hidden.
    """
    hides = "sklearn" not in sys.modules
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        if hides:
            sys.modules["sklearn"] = None  # type: ignore[assignment]  # an import of it raises ImportError
        import tensorflow  # noqa: F401
    finally:
        if hides:
            sys.modules.pop("sklearn", None)
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


def set_seed(seed: int) -> None:
    """Set the seed of Keras, which determines the initial weights of a network."""
    import keras

    keras.utils.set_random_seed(seed)
