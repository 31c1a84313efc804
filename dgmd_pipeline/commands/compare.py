"""The command `compare`."""

import logging
from typing import TYPE_CHECKING

from dgmd_pipeline import settings
from dgmd_pipeline.commands import output, versions
from dgmd_pipeline.errors import NoUsableInput, PipelineError
from dgmd_pipeline.evaluation import gates
from dgmd_pipeline.tasks import lookup

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.review import Review
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def compare(values: "Settings", one: str, other: str, as_json: bool) -> None:
    """Compare two versions on those validation images in DATA_DIR that neither version was trained on."""
    from dgmd_pipeline.evaluation import review, serving_benchmark
    from dgmd_pipeline.training import runtime

    store, state = versions.read_registry(values)
    entries = [versions.select_version(state, word) for word in (one, other)]
    images = lookup.validation_images(values)
    if images is None:
        raise NoUsableInput(
            f"There are no validation records in {values.data_dir}: run the command where the pipeline runs."
        )
    starting = serving_benchmark.start_process(settings.serving_environment())
    with output.temporary_folder() as folder, starting as process:
        log.info("Loading versions %d and %d from the registry ...", *(entry.version for entry in entries))
        runtime.start_tensorflow()
        first, second = (
            lookup.candidate_model(store, values.model_name, entry, folder / str(entry.version)) for entry in entries
        )
        first = first._replace(answers=review.predict(first, images))
        reviewed = review.review(first, review.Rivals(second), images, folder, process)
    if reviewed.comparison is None:
        raise PipelineError(reviewed.comparison_error)
    decision = gates.decide(reviewed, lookup.promotion_limits(values))
    if as_json:
        decided = {"verdict": decision.verdict, "gates": [gate._asdict() for gate in decision.gates]}
        numbers = {"version": entries[0].version, "other_version": entries[1].version}
        output.print_json({**numbers, **decided, **_as_json(reviewed)})
        return
    output.print_review(values.model_name, entries[0], entries[1].version, reviewed, decision)


def _as_json(reviewed: "Review") -> dict[str, object]:
    """Return the comparison and the serving benchmark of a review as JSON values.

    If a value belongs to the second version, its key begins with `other_`.
    """
    from dgmd_pipeline.evaluation import comparison, serving_benchmark

    compared, benchmark = reviewed.comparison, reviewed.serving_benchmark
    return {
        "comparison": _neutral(comparison.to_json(compared)) if compared else None,
        "assessment": _neutral(serving_benchmark.to_json(benchmark)) if benchmark else None,
    }


def _neutral(value: object) -> object:
    """Rename keys, because the second version need not be production.

    For example, `production_accuracy` becomes `other_accuracy`.
    """
    if isinstance(value, dict):
        return {
            f"other_{name.removeprefix('production_')}" if name.startswith("production_") else name: _neutral(item)
            for name, item in value.items()
        }
    return [_neutral(item) for item in value] if isinstance(value, list) else value
