"""From an empty DATA_DIR to a registered version, and training again: compared with a plain script.

EfficientNetV2-B1 with random weights, frozen, 15 epochs, as many images as in the first deployment. `baseline.py` runs
once. It waits after some of its epochs, and the whole pipeline runs in these pauses, so both have the same conditions.
The pipeline's time includes steps that the script does not have (inspection, checkpoints). Its evaluation (metrics,
serving benchmark, report) is reported separately. The baseline for training again is the script's training, without
the start of Python and TensorFlow.

    python -m benchmarks.whole_run [--repeats 3]
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import dataset, endpoint, measure

EPOCHS = 15
REGISTERED = "non-production"


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=3).repeats
    raw = dataset.make(measure.WORK / "spice")
    turns = {EPOCHS * (2 * turn + 1) // (2 * repeats) for turn in range(repeats)}
    with measure.folder() as scratch, endpoint.serving(raw) as url:
        where = endpoint.VARIABLES | {"AWS_ENDPOINT_URL": url}
        settings = measure.variables(**where, EPOCHS=EPOCHS, PATIENCE=EPOCHS, DATA_DIR=Path(scratch, "data"))
        baseline = Path(scratch, "baseline")
        baseline.mkdir()
        command = [sys.executable, "-m", "benchmarks.baseline", str(baseline)]
        environment = measure.environment(**where)
        found: dict[str, list[tuple[float, float]]] = {"whole": [], "again": []}
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
                        rest, evaluation = seconds[-1]
                        print(
                            f"  epoch {said['epoch']}, {name}: {rest:.1f} s + {evaluation:.1f} s",
                            file=sys.stderr, flush=True,
                        )  # fmt: skip
                parts |= said.get("parts", {})
                if said:
                    script.stdin.write("\n")
                    script.stdin.flush()
        if not parts or script.returncode:
            raise SystemExit(f"the baseline ended with exit code {script.returncode}")
    listed = ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())
    whole = sum(parts.values())
    claims = []
    for what, name, reference, goal, figure in (
        ("whole run", "whole", whole, 10, f"{whole:.0f} s ({listed})"),
        ("training again", "again", parts["train"], 20, f"{parts['train']:.0f} s"),
    ):
        ours, evaluations = zip(*found[name], strict=True)
        with_it = [sum(pair) for pair in found[name]]
        claims += [
            measure.Claim(
                f"{what}, times faster", [reference / seconds for seconds in ours], goal,
                figures=f"{figure} / {measure.median(ours, ' s')}",
            ),
            measure.Claim(
                f"{what} with evaluation and report, times faster", [reference / seconds for seconds in with_it], None,
                figures=f"the same, and {measure.median(evaluations, ' s')}",
            ),
        ]  # fmt: skip
    measure.show(*claims)


def one_run(settings: dict, name: str, number: int) -> tuple[float, float]:
    """Run on an empty folder ("whole") or without a training ("again"); return seconds without and of evaluation."""
    folder = settings["DATA_DIR"]
    shutil.rmtree(folder / "trained_model" if name == "again" else folder, ignore_errors=True)
    rate = 0.02 + number / 1000 if name == "again" else 0.01
    start = time.monotonic()
    measure.run(sys.executable, "pipeline.py", says=REGISTERED, **settings, LEARNING_RATE=rate)
    seconds = time.monotonic() - start
    evaluation = json.loads((folder / "evaluation" / "_SUCCESS").read_text())["seconds"]
    return seconds - evaluation, evaluation


if __name__ == "__main__":
    main()
