"""From an empty DATA_DIR to a registered version, and training again: against a plain script of the usual kind.

EfficientNetV2-B1 with random weights, frozen, 15 epochs, as many pictures as the first deployment has. `plain.py` runs
once; it waits after some of its epochs, and in these pauses the pipeline runs as a whole: both see the same machine.
What the script has no counterpart for (inspection, evaluation, checkpoints) is in the pipeline's time. Its training
again is its training: the same work once more, and it is not charged for starting Python and TensorFlow.

    python -m benchmarks.whole_run [--repeats 3]
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import endpoint, measure, pictures

EPOCHS = 15
REGISTERED = "non-production"


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=3).repeats
    raw = pictures.make(measure.WORK / "spice")
    turns = {EPOCHS * (2 * turn + 1) // (2 * repeats) for turn in range(repeats)}
    with measure.folder() as scratch, endpoint.serving(raw) as url:
        where = endpoint.VARIABLES | {"AWS_ENDPOINT_URL": url}
        settings = measure.variables(**where, EPOCHS=EPOCHS, PATIENCE=EPOCHS, DATA_DIR=Path(scratch, "data"))
        plain = Path(scratch, "plain")
        plain.mkdir()
        command = [sys.executable, "-m", "benchmarks.plain", str(plain)]
        environment = measure.environment(**where)
        found: dict[str, list[float]] = {"whole": [], "again": []}
        parts: dict[str, float] = {}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, cwd=measure.ROOT, env=environment,
        ) as script:  # fmt: skip
            assert script.stdin and script.stdout
            for line in script.stdout:
                said = json.loads(line) if line.startswith("{") else {}
                if said.get("epoch") in turns:
                    for name, seconds in found.items():
                        seconds.append(one_run(settings, name, len(seconds)))
                        print(f"  epoch {said['epoch']}, {name}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
                parts |= said.get("parts", {})
                if said:
                    script.stdin.write("\n")
                    script.stdin.flush()
        if not parts or script.returncode:
            raise SystemExit(f"the plain script ended with {script.returncode}")
    listed = ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())
    measure.show(
        measure.Claim(
            "whole run, times faster", [sum(parts.values()) / ours for ours in found["whole"]], 10,
            figures=f"{sum(parts.values()):.0f} s ({listed}) / {statistics.median(found['whole']):.1f} s",
        ),
        measure.Claim(
            "training again, times faster", [parts["train"] / ours for ours in found["again"]], 20,
            figures=f"{parts['train']:.0f} s / {statistics.median(found['again']):.1f} s",
        ),
    )  # fmt: skip


def one_run(settings: dict, name: str, number: int) -> float:
    """Return the seconds of a run on an empty folder, or of one whose training was deleted."""
    folder = settings["DATA_DIR"]
    shutil.rmtree(folder / "trained_model" if name == "again" else folder, ignore_errors=True)
    rate = 0.02 + number / 1000 if name == "again" else 0.01
    start = time.monotonic()
    measure.run(sys.executable, "pipeline.py", says=REGISTERED, **settings, LEARNING_RATE=rate)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
