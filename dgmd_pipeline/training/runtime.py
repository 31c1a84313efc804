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
