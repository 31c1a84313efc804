"""What a run came to <-> `status.json` in DATA_DIR, by which a health check sees whether the last run succeeded."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "status.json"
SUCCEEDED, UNCHANGED, STOPPED, FAILED = "succeeded", "unchanged", "stopped", "failed"


@dataclass(frozen=True)
class Status:
    """What a run came to. What is about a model is None where the run did not end with one."""

    outcome: str  # SUCCEEDED, UNCHANGED (there was nothing to do), STOPPED (by a signal) or FAILED
    exit_code: int
    message: str  # a sentence
    ended: str  # ISO 8601, UTC
    seconds: float
    model: str
    version: int | None = None
    accuracy: float | None = None  # on the validation images, 0 to 1
    difference: float | None = None  # of it to that of production, on the same images
    step: str | None = None  # the one that failed

    @property
    def is_good(self) -> bool:
        """Whether there is nothing that somebody would have to look after."""
        return self.outcome != FAILED


def outcome(exit_code: int, changed: bool) -> str:
    """Return the word for an exit code, and for whether the run has done something."""
    if exit_code in (130, 143):
        return STOPPED
    return FAILED if exit_code else SUCCEEDED if changed else UNCHANGED


def write(status: Status, data_dir: Path) -> None:
    """Write `status.json`, whole or not at all. Raises OSError."""
    place, draft = data_dir / NAME, data_dir / f".{NAME}.part"
    text = json.dumps(asdict(status), indent=1) + "\n"
    try:
        draft.write_text(text, "utf-8")
    except OSError:
        draft.unlink(missing_ok=True)
        place.unlink(missing_ok=True)  # it is no longer true, and on a full disk its block is enough for the new one
        draft.write_text(text, "utf-8")
    draft.replace(place)


def read(data_dir: Path) -> Status | None:
    """Return what `write` wrote; None where no run has ended yet. Raises OSError where it cannot be read."""
    try:
        return Status(**json.loads((data_dir / NAME).read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):  # or another version's
        return None
