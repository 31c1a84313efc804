"""The command `predict`."""

import csv
import io
import logging
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from dgmd_pipeline import manifest
from dgmd_pipeline.commands import output, versions
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.formatting import counted
from dgmd_pipeline.manifest import to_cell
from dgmd_pipeline.registry import versions as registry_versions
from dgmd_pipeline.workflow.progress import progress

if TYPE_CHECKING:
    from dgmd_pipeline.registry.versions import DownloadedVersion, ModelVersion
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)
Format = Literal["table", "csv", "json"]


class Prediction(TypedDict):
    """The most probable label of an image file."""

    file: str
    label: str
    probability: float


def predict(values: "Settings", files: Sequence[Path], version: str, form: Format) -> None:
    """Classify image files, and the files in folders, with a registered version. Print labels and probabilities.

    For each file or folder that cannot be read, a warning gives the reason. If there was a warning, raises
    NoUsableInput after printing the predictions.
    """
    paths, unreadable = _find(files)
    if not paths and not unreadable:
        raise NoUsableInput(f"There are no files in {', '.join(map(str, files))}: name image files, or folders.")
    predictions: list[Prediction] = []
    if paths:
        store, state = versions.read_registry(values, repair=False)
        selected = versions.select_version(state, version)
        log.info("Loading %s version %d from the registry ...", values.model_name, selected.version)
        with output.temporary_folder() as folder:
            fetched = registry_versions.fetch(store, values.model_name, selected, folder)
            predictions, damaged = _predict_files(paths, fetched, selected)
            unreadable += damaged
        _print_predictions(predictions, form)
    if unreadable:
        total = counted(len(predictions) + len(unreadable), "file")
        raise NoUsableInput(f"{len(unreadable):,} of {total} could not be read: the warnings give the reasons.")


def _predict_files(
    paths: Sequence[Path], fetched: "DownloadedVersion", selected: "ModelVersion"
) -> tuple[list[Prediction], list[Path]]:
    """Return the predictions for the readable files, and the unreadable files. Warn about each unreadable file."""
    import numpy as np

    from dgmd_pipeline.data import limits
    from dgmd_pipeline.serving import inputs
    from dgmd_pipeline.training import runtime

    runtime.start_tensorflow()
    network = versions.load_network(fetched.path, selected)
    predictions: list[Prediction] = []
    unreadable: list[Path] = []
    for path in progress(paths, "predict", len(paths), "images"):
        try:
            if (size := path.stat().st_size) > limits.MAX_BYTES:  # checked before the file is read
                raise inputs.InvalidImage(f"{size:,} bytes, expected at most {limits.MAX_BYTES:,}")
            image = inputs.read(path.read_bytes(), network)
        except (OSError, inputs.InvalidImage) as error:
            _warn(unreadable, path, error)
            continue
        probabilities = network.predict_on_batch(image[np.newaxis])[0]
        best = int(probabilities.argmax())
        predictions.append(
            {"file": str(path), "label": fetched.labels[best], "probability": float(probabilities[best])}
        )
    return predictions, unreadable


def _warn(unreadable: list[Path], path: Path, error: Exception) -> None:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    log.warning("%s cannot be read: %s", path, reason)
    unreadable.append(path)


def _print_predictions(predictions: list[Prediction], form: Format) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 are printed as they are
    if form == "json":
        output.print_json(predictions)
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["file", "label", "probability"])
        writer.writerows(map(to_cell, row.values()) for row in predictions)
    else:
        table = [(row["label"], f"{row['probability']:.4f}", row["file"]) for row in predictions]
        output.print_table([("label", "probability", "file"), *table])


def _find(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files to classify, and the unreadable paths. Warn about each unreadable path.

    Each of `paths` is a file, or a folder that contains files.
    """
    files: list[Path] = []
    unreadable: list[Path] = []
    for path in paths:
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            _warn(unreadable, path, error)
            continue
        if not stat.S_ISDIR(mode):
            if stat.S_ISREG(mode):
                files.append(path)
            else:  # for example a pipe or a device, which can be endless
                _warn(unreadable, path, ValueError("neither a file nor a folder"))
            continue
        walked = os.walk(path, onerror=lambda error: _warn(unreadable, Path(os.fsdecode(error.filename)), error))
        found = (Path(folder, name) for folder, _, names in walked for name in names)
        files += sorted(
            each for each in found if each.is_file() and not manifest.is_system_file(str(each.relative_to(path)))
        )
    return files, unreadable
