"""The command `predict`."""

import csv
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmd_pipeline.commands import models as commands_models
from dgmd_pipeline.commands import output
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.registry import versions
from dgmd_pipeline.workflow.progress import progress

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def predict(values: "Settings", files: Sequence[Path], version: str, form: str) -> None:
    """Print label and probability of picture files, or of all in folders, by a registered version.

    Raises NoUsableInput at the end where a file could not be read.
    """
    from PIL import Image

    from dgmd_pipeline.data import decoding
    from dgmd_pipeline.training import runtime

    paths = list(_files(files))
    if not paths:
        raise NoUsableInput(f"There are no files in {', '.join(map(str, files))}: name picture files, or folders.")
    store, found = commands_models.registered_versions(values, repair=False)
    entry = commands_models.select_version(found, version, values.model_name)
    rows, unread = [], []
    log.info("Loading %s version %d from the registry ...", values.model_name, entry.version)
    with output.temporary_folder() as folder:
        fetched = versions.fetch(store, values.model_name, entry, folder)
        runtime.start_tensorflow()
        network = output.load_network(fetched.path, values.model_name, entry)
        import numpy as np

        for path in progress(paths, "predict", len(paths), "images"):
            try:
                picture = np.asarray(decoding.open_rgb(path))[np.newaxis]
            except (*decoding.DAMAGED, Image.DecompressionBombError) as error:
                unread.append(path)
                log.warning("%s is no picture that can be read (%s)", path, type(error).__name__)
                continue
            probabilities = network.predict_on_batch(picture)[0]
            best = int(probabilities.argmax())
            rows.append({"file": str(path), "label": fetched.labels[best], "probability": float(probabilities[best])})
    _print_predictions(rows, form)
    if unread:
        raise NoUsableInput(f"{len(unread):,} of {len(paths):,} files could not be read; the first one is {unread[0]}.")


def _print_predictions(rows: list[dict[str, Any]], form: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files as they are
    if form == "json":
        output.print_json(rows)
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, ["file", "label", "probability"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        table = [(row["label"], f"{row['probability']:.4f}", row["file"]) for row in rows]
        output.print_table([("label", "probability", "file"), *table])


def _files(given: Sequence[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
        elif path.is_file():
            yield path
        else:
            raise NoUsableInput(f"There is no file or folder {path}.")
