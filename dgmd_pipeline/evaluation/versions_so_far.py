"""The part of the report that shows the registered versions and the new one over time."""

from collections.abc import Sequence
from typing import NamedTuple

from dgmd_pipeline.evaluation import charts
from dgmd_pipeline.evaluation.charts import Panel

SHOWN = 29  # maximum number of registered versions; with the new version, they make `charts.MARKED` points


class VersionSummary(NamedTuple):
    """The figures of a version. A figure is None if it was not recorded."""

    version: int
    created: float  # seconds since 1970
    accuracy: float | None  # on the validation images of its own run, 0 to 1
    images: float | None  # number of training images
    labels: float | None
    left_out: float | None  # number of rejected files


def panels(versions: Sequence[VersionSummary]) -> list[Panel]:
    """Return a curve for each figure that at least two versions have."""
    titles = {"accuracy": "Accuracy", "images": "Training images", "labels": "Labels", "left_out": "Rejected files"}
    found = []
    for name, title in titles.items():
        known = {row.version: value for row in versions if (value := getattr(row, name)) is not None}
        write, counts = (charts.percent, False) if name == "accuracy" else ("{:,.0f}".format, True)
        if len(known) > 1:
            found.append(charts.panel(title, list(known), {name: list(known.values())}, write, counts))
    return found
