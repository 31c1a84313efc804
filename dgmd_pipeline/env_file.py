"""Reads a file of variables, such as `.env`. An error states the file and the line of each mistake, but no value."""

import difflib
import io
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from dotenv import parser

from dgmd_pipeline.errors import SettingsError

log = logging.getLogger(__name__)
# A name with at least this similarity to a variable of the pipeline is taken for a misspelling of this variable, for
# example EPOCS, AWS_DATA_BUCKT or MLFLOW_TRACKING_URL. No other variable of MLflow or boto3 reaches this similarity to
# a variable of the pipeline.
SIMILARITY = 0.89  # `ratio` of difflib.SequenceMatcher, 0 to 1
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # except tab, line feed and carriage return


def read(path: Path, known: Collection[str]) -> str:
    """Check a file and return its text. `known` are the names of the pipeline's variables.

    Logs a warning about each variable that is not in `known`, but is similar to a name in `known`. Raises
    FileNotFoundError if there is no file. Raises SettingsError, with one line for each mistake, if the file cannot be
    read or parsed.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{path}: expected lines NAME=value in UTF-8 ({reason}).") from None
    bindings = list(parser.parse_stream(io.StringIO(text)))
    if mistakes := [f"{path}, line {line}: {text}." for line, text in _mistakes(bindings, known)]:
        raise SettingsError("\n".join(mistakes))
    for name in {binding.key: None for binding in bindings if binding.key and binding.key not in known}:
        if similar := difflib.get_close_matches(name.upper(), known, 1, SIMILARITY):
            log.warning("%s: %s is not a variable of the pipeline. Did you mean %s?", path, name, similar[0])
    return text


def _mistakes(bindings: Iterable[parser.Binding], known: Collection[str]) -> Iterator[tuple[int, str]]:
    """Yield the line number of each mistake, counted from 1, and a text that says what is expected."""
    for name, value, original, failed in bindings:
        statement = original.string.lstrip()
        line = original.line + original.string.removesuffix(statement).count("\n")
        others = {other for other in re.findall(r"^\s*(?:export\s+)?(\w+)=", statement, re.MULTILINE) if other != name}
        if CONTROL_CHARACTER.search(statement):
            yield line, "expected text, found a control character"
        elif failed or (name and value is None and not re.fullmatch(r"\w+", name)):
            yield line, "expected NAME=value, with a quotation mark at both ends of the value or at none"
        elif name and any(other in known or other.startswith(("AWS_", "MLFLOW_")) for other in others):
            yield line, f"expected a quotation mark at the end of the value of {name}, before the next variable"
