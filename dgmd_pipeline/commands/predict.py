"""The command `predict`."""

import csv
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from dgmd_pipeline import manifest
from dgmd_pipeline.commands import output, versions
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import to_cell
from dgmd_pipeline.registry import versions as registry_versions
from dgmd_pipeline.workflow.progress import progress

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)
Format = Literal["table", "csv", "json"]


class Prediction(TypedDict):
    """The most probable label of an image file."""

    file: str
    label: str
    probability: float


def predict(values: "Settings", files: Sequence[Path], version: str, form: Format) -> None:
    """Print label and probability of image files and of the files in folders, by a registered version.

    Raises NoUsableInput after printing if a file cannot be read.
    """
    from dgmd_pipeline.serving import inputs
    from dgmd_pipeline.training import runtime

    paths = list(_files(files))
    if not paths:
        raise NoUsableInput(f"There are no files in {', '.join(map(str, files))}: name image files, or folders.")
    store, state = versions.read_registry(values, repair=False)
    selected = versions.select_version(state, version)
    predictions: list[Prediction] = []
    unreadable = []
    log.info("Loading %s version %d from the registry ...", values.model_name, selected.version)
    with output.temporary_folder() as folder:
        fetched = registry_versions.fetch(store, values.model_name, selected, folder)
        runtime.start_tensorflow()
        network = versions.load_network(fetched.path, values.model_name, selected)
        import numpy as np

        for path in progress(paths, "predict", len(paths), "images"):
            try:
                image = inputs.read(path.read_bytes(), network)
            except (OSError, inputs.InvalidImage) as error:
                unreadable.append(path)
                log.warning("%s is not a readable image (%s)", path, error)
                continue
            probabilities = network.predict_on_batch(image[np.newaxis])[0]
            best = int(probabilities.argmax())
            predictions.append(
                {"file": str(path), "label": fetched.labels[best], "probability": float(probabilities[best])}
            )
    _print_predictions(predictions, form)
    if unreadable:
        raise NoUsableInput(
            f"{len(unreadable):,} of {len(paths):,} files could not be read; the first one is {unreadable[0]}."
        )


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


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = (each for each in path.rglob("*") if each.is_file())
            yield from sorted(each for each in found if not manifest.is_system_file(str(each.relative_to(path))))
        elif path.is_file():
            yield path
        else:
            raise NoUsableInput(f"There is no file or folder {path}.")
