"""Importing TensorFlow without its log output."""

import os


def start_tensorflow() -> None:
    """Import TensorFlow without what its libraries write to the process's standard error while they load."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        import tensorflow  # noqa: F401
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def set_seed(seed: int) -> None:
    """Set the seed that a network's first weights come from."""
    import keras

    keras.utils.set_random_seed(seed)
