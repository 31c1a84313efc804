"""The command `compare`."""

import logging
from typing import TYPE_CHECKING

from dgmd_pipeline import settings
from dgmd_pipeline.commands import output, versions
from dgmd_pipeline.errors import NoUsableInput, PipelineError
from dgmd_pipeline.evaluation import gates as evaluation_gates
from dgmd_pipeline.tasks import outputs

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def compare(values: "Settings", one: str, other: str, as_json: bool) -> None:
    """Compare two versions on the validation images in DATA_DIR that neither was trained on."""
    from dgmd_pipeline.evaluation import review
    from dgmd_pipeline.training import runtime

    store, state = versions.read_registry(values)
    entries = [versions.select_version(state, word) for word in (one, other)]
    pictures = outputs.validation_images(values)
    if pictures is None:
        raise NoUsableInput(
            f"There are no validation records in {values.data_dir}: run the command where the pipeline runs."
        )
    with output.temporary_folder() as folder:
        log.info("Loading versions %d and %d from the registry ...", *(entry.version for entry in entries))
        runtime.start_tensorflow()
        here, there = (
            outputs.candidate_model(store, values.model_name, entry, folder / str(entry.version)) for entry in entries
        )
        here = here._replace(probabilities=review.predictions(here, pictures))
        known = review.review(here, there, pictures, folder, settings.serving_environment())
    if known.comparison is None:
        raise PipelineError(known.missing)
    if as_json:
        output.print_json(
            {"version": entries[0].version, "comparison": known.comparison, "assessment": known.assessment}
        )
        return
    gates = evaluation_gates.check_gates(
        *known, evaluation_gates.Limits(values.max_class_drop, values.max_latency_ratio)
    )
    output.print_review(values.model_name, entries[0], entries[1].version, known, gates)
