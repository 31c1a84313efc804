"""Two ways to do the same, timed in turns -> claims: ratios with their spread, held against what was promised."""

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
WORK = Path(os.environ.get("BENCHMARK_DIR", ROOT / ".benchmarks"))  # pictures that are made once
CLAIMS = "BENCHMARK_CLAIMS"  # variable: the file that claims are added to, for RESULTS.md


class Claim(NamedTuple):
    """A ratio and what it should be."""

    what: str
    ratios: list[float]  # one for each repeat; their median is what counts
    goal: float | None  # None: reported, not promised
    at_least: bool = True  # else: at most
    figures: str = ""  # what was divided by what

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def holds(self) -> bool:
        return self.goal is None or (self.ratio >= self.goal if self.at_least else self.ratio <= self.goal)

    def row(self) -> str:
        promised = "" if self.goal is None else f"{'>=' if self.at_least else '<='} {self.goal:g}"
        spread = f" ({min(self.ratios):.2f} to {max(self.ratios):.2f}, {len(self.ratios)})" if self.ratios[1:] else ""
        verdict = "" if self.goal is None else "yes" if self.holds else "**no**"
        return f"| {self.what} | {promised} | **{self.ratio:.2f}**{spread} | {verdict} | {self.figures} |"


HEAD = (
    "| what | promised | measured: median (lowest to highest, repeats) | holds | of |\n| --- | --- | --- | --- | --- |"
)


def arguments(doc: str | None, **numbers: int) -> argparse.Namespace:
    """Read a script's command line: `--<name>` for each of its numbers, which are the defaults."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def in_turns(repeats: int, **ways: Callable[[], float]) -> dict[str, list[float]]:
    """Call each way `repeats` times, one after the other, forwards and backwards in turn; return what they returned."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            found[name].append(ways[name]())
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
    """Time two ways to work on the same images, after once unmeasured; each returns how many it did."""

    def speed(way: Callable[[], int]) -> float:
        start = time.perf_counter()
        assert way() == images
        return images / (time.perf_counter() - start)

    ours(), theirs()  # processes start, files come into memory
    found = in_turns(repeats, ours=lambda: speed(ours), theirs=lambda: speed(theirs))
    figures = f"{median(found['ours'])} images/s / {median(found['theirs'])} of {of}"
    return Claim(what, ratios(found["ours"], found["theirs"]), goal, figures=figures)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(over, under, strict=True)]


def show(*claims: Claim) -> None:
    """Print the claims as a table and hand them to whoever collects them."""
    print(HEAD, *(claim.row() for claim in claims), sep="\n", flush=True)
    if CLAIMS in os.environ:
        with Path(os.environ[CLAIMS]).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(claim._asdict()) + "\n" for claim in claims)


def median(values: Sequence[float], unit: str = "") -> str:
    return f"{statistics.median(values):,.3g}{unit}"


def folder() -> AbstractContextManager[str]:
    """Give a temporary folder on the disk where the pictures are."""
    WORK.mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(dir=WORK)


class Ran(NamedTuple):
    """What a process and its children took."""

    seconds: float  # of CPU time
    output: str


def run(*words: object, says: str = "", **variables: object) -> Ran:
    """Run a command, see that it ends well and says `says`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [*map(str, words)]
    result = subprocess.run(
        command, check=False, env=environment(**variables), capture_output=True, text=True, cwd=ROOT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode or says not in result.stdout:
        raise SystemExit(f"{command} ended with {result.returncode}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return Ran(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stdout)


def environment(**variables: object) -> dict[str, str]:
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def variables(**more: Any) -> dict[str, Any]:
    """Return an environment for the pipeline in which nothing is left to chance."""
    return {"BACKBONE_WEIGHTS": "none", "BALANCE_LIMIT": 1.15, "SEED": 1, **more}
