"""Sentences for operators about an evaluation: in the log, in messages and in MLflow."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dgmd_pipeline.formatting import percent, points

FIRST, BETTER, NO_DIFFERENCE, WORSE, NOT_COMPARED = "first", "better", "no difference", "worse", "not compared"
THAN = {BETTER: "better than", WORSE: "worse than", NO_DIFFERENCE: "no significant difference from"}
ALONE = {FIRST: "first version", NOT_COMPARED: "not compared"}


class Summary(NamedTuple):
    """What an operator has to know about a version. A value is None if it does not apply or was not recorded."""

    accuracy: float  # on the validation images, 0 to 1
    images: int
    verdict: str | None
    compared_with: int | None = None  # the production version
    difference: float | None = None  # accuracy minus production's accuracy, on the same images
    low: float | None = None  # lower end of the 95 % interval of the difference
    high: float | None = None  # upper end
    failed: Sequence[str] = ()  # names of the conditions for a promotion that the version does not meet

    @property
    def recommended(self) -> bool:
        """Whether the version meets all conditions for a promotion and there is a reason to promote it."""
        return self.verdict in (BETTER, FIRST) and not self.failed


def from_counts(counts: Mapping[str, Any]) -> Summary:
    """Return a summary from the counts of an evaluation's record."""
    return Summary(**{"verdict": None} | {name: counts[name] for name in Summary._fields if name in counts})


def sentences(found: Summary, report: str, version: int | None = None) -> list[str]:
    """Return sentences about the accuracy, the verdict, the next command and the report.

    `report` says where the report is. The next command promotes `version`. If `version` is None, no command is named.
    """
    lines = [f"Accuracy {percent(found.accuracy)} on {found.images:,} validation images."]
    if found.verdict:
        compared = comparison(found.verdict, found.compared_with, found.difference, found.low, found.high)
        lines.append(f"{compared[0].upper()}{compared[1:]}.")
        if found.verdict == FIRST:
            lines[-1] += " There is no production version to compare it with."
        if found.failed:
            lines[-1] += f" Failed conditions: {', '.join(found.failed)}."
    if version is not None:
        undecided = "shows each condition and refuses the version" if found.failed else "shows each condition and asks"
        purpose = "makes it production" if found.recommended else undecided
        lines.append(f"Next command: `promote {version}` {purpose}.")
    return [*lines, f"Report: {report}"]


def comparison(
    verdict: str, other: int | None, difference: float | None, low: float | None = None, high: float | None = None
) -> str:
    """Return a clause about a version's verdict and about its difference in accuracy to the version `other`."""
    if difference is None:
        return ALONE.get(verdict, verdict)
    interval = "" if low is None or high is None else f", 95 % interval {points(low)} to {points(high)}"
    return f"{THAN.get(verdict, 'compared with')} version {other}: {points(difference)} points{interval}"
