"""An invalid setting -> one line with its name, its value and what is expected."""

from typing import Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from dgmd_pipeline import formatting

SHOWN = 200  # characters of a value, maximum


def describe(name: str, field: FieldInfo, value: object, message: str) -> str:
    """Return the line for the variable `name`, whose `value` has the fault that pydantic describes in `message`."""
    allowed = message.removeprefix("Value error, ") if message.startswith("Value error") else expected_values(field)
    shown = "***" if field.annotation == SecretStr | None else formatting.redact(str(value))
    if name.endswith("_URI"):
        shown = shown.rpartition("@")[2]  # removes user and password from a URI without a scheme
    shown = formatting.printable(shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}...")
    line = f"{name}={shown}: expected {allowed}."
    if name.endswith("_PCNT"):
        try:
            percent = float(str(value))
        except ValueError:
            return line
        if 1 < percent < 100:
            line += f" It is a fraction: did you mean {percent / 100:g}?"
    return line


def expected_values(field: FieldInfo) -> str:
    """Return the type and range of a field in words, as in "a number above 0 and below 1"."""
    kind = field.annotation
    if getattr(kind, "__origin__", None) is Literal:
        return "one of " + ", ".join(kind.__args__)  # type: ignore[union-attr]
    words: dict[object, str] = {
        int: "a whole number",
        int | None: "a whole number",
        float: "a number",
        float | None: "a number",
        bool: "true or false",
    }
    bounds = []
    for item in field.metadata:
        match item:
            case Gt(gt=low):
                bounds.append(f"above {low}")
            case Ge(ge=low):
                bounds.append(f"of at least {low}")
            case Lt(lt=high):
                bounds.append(f"below {high}")
            case Le(le=high):
                bounds.append(f"at most {high}")
    return " ".join([words.get(kind, "a non-empty text"), " and ".join(bounds)]).strip()
