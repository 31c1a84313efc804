"""Times two implementations of the same work alternately, and reports claims: ratios with their spread and goals."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
WORK = Path(os.environ.get("BENCHMARK_DIR", ROOT / ".benchmarks"))  # data sets that are generated once
CLAIMS = "BENCHMARK_CLAIMS"  # variable with the path of a file; claims are appended to it for RESULTS.md


class Claim(NamedTuple):
    """A ratio and its goal."""

    what: str
    ratios: list[float]  # one for each repeat; the median decides
    goal: float | None  # None: reported only
    at_least: bool = True  # False: at most
    figures: str = ""  # numerator / denominator

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def holds(self) -> bool:
        return self.goal is None or (self.ratio >= self.goal if self.at_least else self.ratio <= self.goal)

    def row(self) -> str:
        goal = "" if self.goal is None else f"{'>=' if self.at_least else '<='} {self.goal:g}"
        spread = f" ({min(self.ratios):.2f} to {max(self.ratios):.2f}, {len(self.ratios)})" if self.ratios[1:] else ""
        verdict = "" if self.goal is None else "yes" if self.holds else "**no**"
        return f"| {self.what} | {goal} | **{self.ratio:.2f}**{spread} | {verdict} | {self.figures} |"


HEAD = "| what | goal | measured: median (lowest to highest, repeats) | holds | of |\n| --- | --- | --- | --- | --- |"


def arguments(doc: str | None, **numbers: int) -> argparse.Namespace:
    """Parse a script's command line: an option `--<name>` for each number, which is its default."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def interleave(repeats: int, **functions: Callable[[], float]) -> dict[str, list[float]]:
    """Call all functions `repeats` times, in alternating order; return their results by name."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            found[name].append(functions[name]())
            print(f"  {number + 1}/{repeats} {name}: {found[name][-1]:.4g}", file=sys.stderr, flush=True)
    return found


def images_per_second(
    what: str,
    goal: float | None,
    images: int,
    ours: Callable[[], int],
    theirs: Callable[[], int],
    of: str,
    repeats: int,
) -> Claim:
    """Time two functions that process the same images and return how many. The first calls are not measured."""

    def speed(function: Callable[[], int]) -> float:
        start = time.perf_counter()
        assert function() == images
        return images / (time.perf_counter() - start)

    ours(), theirs()  # start processes, fill the file cache
    found = interleave(repeats, ours=lambda: speed(ours), theirs=lambda: speed(theirs))
    figures = f"{median(found['ours'])} images/s / {median(found['theirs'])} of {of}"
    return Claim(what, ratios(found["ours"], found["theirs"]), goal, figures=figures)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(over, under, strict=True)]


def show(*claims: Claim) -> None:
    """Print the claims as a table, and append them to the file that CLAIMS names."""
    print(HEAD, *(claim.row() for claim in claims), sep="\n", flush=True)
    if CLAIMS in os.environ:
        with Path(os.environ[CLAIMS]).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(claim._asdict()) + "\n" for claim in claims)


def median(values: Sequence[float], unit: str = "") -> str:
    return f"{statistics.median(values):,.3g}{unit}"


def folder() -> AbstractContextManager[str]:
    """Provide a temporary folder on the disk of the data sets."""
    WORK.mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(dir=WORK)


class ProcessResult(NamedTuple):
    """The cost and the output of a process and its children."""

    seconds: float  # of CPU time
    output: str


def run(*words: object, says: str = "", **variables: object) -> ProcessResult:
    """Run a command. Exit unless it succeeds and its output contains `says`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [*map(str, words)]
    result = subprocess.run(
        command, check=False, env=environment(**variables), capture_output=True, text=True, cwd=ROOT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode or says not in result.stdout:
        raise SystemExit(f"{command} ended with {result.returncode}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return ProcessResult(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stdout)


def environment(**variables: object) -> dict[str, str]:
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def variables(**more: Any) -> dict[str, Any]:
    """Return an environment for a reproducible run of the pipeline."""
    return {"BACKBONE_WEIGHTS": "none", "BALANCE_LIMIT": 1.15, "SEED": 1, **more}
