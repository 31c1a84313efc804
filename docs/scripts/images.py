"""The demo -> docs/images/: a run in a terminal as SVG, and the top of the report as PNG. `make pictures` runs it.

The demo prepares the data. A version that was trained for two epochs is promoted. The images show a run with more
epochs: its plan has steps that are done, and its report has a comparison with production.

It needs the extra `docs` of setup.py and Chromium or Chrome.
"""

import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "images"
COLUMNS, ROWS = 80, 50
REPORT_SIZE = 1000, 1150  # pixels
EPOCHS = re.compile(r"\n\S+ +epoch 3/.*(?=\n\S+ +epoch 20/)", re.DOTALL)


def run(folder: Path, *arguments: str, **variables: str) -> str:
    """Run the pipeline in `folder`, in a terminal of 80 columns, and return what it leaves on the screen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    command = [sys.executable, str(ROOT / "pipeline.py"), *arguments]
    environment = {**os.environ, "NO_COLOR": "1", **variables}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = bytearray()
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # Linux: the other end is closed
        pass
    if code := process.wait():
        sys.exit(f"{' '.join(arguments)} ended with exit code {code}:\n{output.decode()}")
    # A progress bar overwrites its line, and is cleared at its end.
    lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in output.decode().split("\n")]
    return "\n".join(lines)


def save_terminal(prompt: str, output: str, folder: Path) -> None:
    """Write the output, without most of the epochs, as `run.svg`."""
    text = EPOCHS.sub("\n  ...", output.rstrip()).replace(f"{folder}/", "")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    console.print(Text(prompt, style="bold"))
    for line in text.split("\n"):
        console.print(Text(line, style="yellow" if line.startswith("warning:") else ""))
    console.save_svg(str(TARGET / "run.svg"), title="Plan, run and times", unique_id="run")


def save_report(report: Path, folder: Path) -> None:
    """Write the top of the report as `report.png`, with a palette of 256 colours."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("Chromium or Chrome is needed for the image of the report: neither is on PATH.")
    shot = folder / "report.png"
    size = ",".join(map(str, REPORT_SIZE))
    options = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}", f"--screenshot={shot}")
    subprocess.run([browser, *options, report.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        image.convert("RGB").quantize(256).save(TARGET / "report.png", optimize=True)


def main() -> None:
    """Run the demo and write both images."""
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        run(folder, "demo")
        arguments = ("--env-file", "demo.env")
        run(folder, *arguments, EPOCHS="2")
        run(folder, "promote", "--yes", *arguments)
        output = run(folder, *arguments, EPOCHS="20")
        save_terminal(f"$ EPOCHS=20 python pipeline.py {' '.join(arguments)}", output, folder)
        save_report(folder / "demo-data" / "evaluation" / "report.html", folder)


if __name__ == "__main__":
    main()
