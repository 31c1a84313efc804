"""Run every benchmark and write RESULTS.md: `make bench`."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import dataset, measure

SCRIPTS = (
    "whole_run",
    "refreshing",
    "noop_run",
    "downloading",
    "inspecting",
    "writing",
    "extracting",
    "cluster",
    "epochs",
    "reading",
    "evaluating",
    "scaling",
    "rows",
)
LIBRARIES = (
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "mlflow",
    "numpy",
    "pyarrow",
    "pillow",
    "boto3",
    "awscrt",
    "s5cmd",
    "simplejpeg",
    "distributed",
)
RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    """Run the scripts one after another. Exit with 1 if one fails or a claim does not hold."""
    dataset.make(measure.WORK / "spice")
    begun = time.monotonic()
    sections, all_hold = [], True
    for script in sys.argv[1:] or SCRIPTS:
        print(f"{script} ...", flush=True)
        with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as file:
            start = time.monotonic()
            code = subprocess.run(
                [sys.executable, "-m", f"benchmarks.{script}"], check=False, cwd=measure.ROOT,
                env={**os.environ, measure.CLAIMS: file.name},
            ).returncode  # fmt: skip
            minutes = (time.monotonic() - start) / 60
            claims = [measure.Claim(**json.loads(line)) for line in file]
        all_hold = all_hold and not code and all(claim.holds for claim in claims)
        rows = "\n".join([measure.HEAD, *(claim.row() for claim in claims)]) if claims else f"Exit code {code}."
        sections.append(f"## {script} ({minutes:.0f} min)\n\n{rows}\n")
        write(sections, (time.monotonic() - begun) / 60)
    sys.exit(not all_hold)


def write(sections: list[str], minutes: float) -> None:
    cpu = next((line.partition(":")[2].strip() for line in cpu_info() if line.startswith("model name")), "")
    libraries = ", ".join(f"{name} {found}" for name in LIBRARIES if (found := installed(name)))
    RESULTS.write_text(
        "# Results of `make bench`\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {minutes:.0f} minutes, {len(os.sched_getaffinity(0))} cores of "
        f"{cpu or platform.machine()}, {platform.system()}, Python {platform.python_version()}, {libraries}.\n\n"
        "Each ratio compares two measurements that alternate in the same run; the script of that name describes them. "
        "Absolute figures are those of this machine at that time.\n\n" + "\n".join(sections),
        encoding="utf-8",
    )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
