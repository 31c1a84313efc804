"""From an empty DATA_DIR to a registered version, training again, and 12 new images: compared with two scripts.

All use a frozen EfficientNetV2-B1 with random weights, 15 epochs, and as many images as the first deployment. The
second script (`baseline_features.py`) and the pipeline take turns, so both have the same conditions. The first script
(`baseline.py`, all epochs through the network) runs once. Times are wall times of whole processes. The pipeline also
inspects the images, selects a head by cross-validation, and writes checkpoints. To use 12 new images, the script must
run again.

    python -m benchmarks.whole_run [--repeats 3]
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import dataset, endpoint, measure, refreshing

EPOCHS = 15
REGISTERED = "non-production"


class Seconds(NamedTuple):
    """Wall time of a run."""

    whole: float
    evaluation: float  # of it, for metrics, serving benchmark and report

    @property
    def without(self) -> float:
        return self.whole - self.evaluation


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=3).repeats
    raw = dataset.make(measure.WORK / "spice")
    ours: dict[str, list[Seconds]] = {"first": [], "again": [], "refresh": []}
    theirs: dict[str, list[Seconds]] = {"first": [], "again": []}
    with measure.folder() as scratch:
        old = refreshing.without_new(raw, Path(scratch, "old"))
        with endpoint.serving(raw) as url, endpoint.serving(old / "raw") as old_url:
            for number in range(repeats):
                folder = Path(scratch, str(number))
                theirs["first"].append(script("baseline_features", folder / "script", url))
                ours["first"].append(pipeline(folder / "first", url))
                theirs["again"].append(script("baseline_features", folder / "script", url, "--again"))
                shutil.rmtree(folder / "first" / "trained_model")
                ours["again"].append(pipeline(folder / "first", url, LEARNING_RATE=0.02))
                pipeline(folder / "refresh", old_url)
                ours["refresh"].append(pipeline(folder / "refresh", url, REFRESH="true"))
                shutil.rmtree(folder)
            usual = script("baseline", Path(scratch, "usual"), url).whole
    theirs["refresh"] = theirs["first"]
    claims = []
    for name, what, without, with_evaluation in (
        ("first", "whole run", 1.3, 1),
        ("again", "training again", 1.3, 1),
        ("refresh", "12 new images", None, 4),
    ):
        script_times = [seconds.whole for seconds in theirs[name]]
        pairs = ("", without, [run.without for run in ours[name]]), (
            ", with evaluation and report", with_evaluation, [run.whole for run in ours[name]]
        )  # fmt: skip
        claims += [faster(f"{what}{suffix}", script_times, times, goal) for suffix, goal, times in pairs]
    for name, what in (("first", "whole run"), ("refresh", "12 new images")):
        times = [run.whole for run in ours[name]]
        title = f"{what}, with evaluation and report, of the script with all epochs through the network"
        claims.append(faster(title, [usual] * repeats, times, None))
    measure.show(*claims)


def faster(what: str, theirs: Sequence[float], ours: Sequence[float], goal: float | None) -> measure.Claim:
    figures = f"{measure.median(theirs, ' s')} / {measure.median(ours, ' s')}"
    return measure.Claim(f"{what}, times faster", measure.ratios(theirs, ours), goal, figures=figures)


def script(name: str, folder: Path, url: str, *options: str) -> Seconds:
    """Run a baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    variables = {**endpoint.VARIABLES, "AWS_ENDPOINT_URL": url}
    result = measure.run(sys.executable, "-m", f"benchmarks.{name}", folder, *options, **variables)
    seconds = time.monotonic() - start
    tell(f"{name} {' '.join(options)}", seconds, json.loads(result.output.splitlines()[-1]))
    return Seconds(seconds, 0)


def pipeline(folder: Path, url: str, **more: object) -> Seconds:
    """Run the pipeline."""
    where = {**endpoint.VARIABLES, "AWS_ENDPOINT_URL": url, "DATA_DIR": folder}
    variables = measure.variables(**where, EPOCHS=EPOCHS, PATIENCE=EPOCHS, **more)
    start = time.monotonic()
    measure.run(sys.executable, "pipeline.py", says=REGISTERED, **variables)
    seconds = time.monotonic() - start
    steps = {path.parent.name: json.loads(path.read_text())["seconds"] for path in sorted(folder.glob("*/_SUCCESS"))}
    tell(f"pipeline {more}", seconds, steps)
    return Seconds(seconds, steps["evaluation"])


def tell(what: str, seconds: float, parts: dict[str, float]) -> None:
    listed = ", ".join(f"{name} {part:.1f}" for name, part in parts.items())
    print(f"  {what}: {seconds:.1f} s ({listed})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
