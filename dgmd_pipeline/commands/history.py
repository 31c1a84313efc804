"""The command `history`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgmd_pipeline.commands import output, versions
from dgmd_pipeline.registry import promotion

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings


def history(values: "Settings", as_json: bool) -> None:
    """Show who made which version production, when and why."""
    _, state = versions.read_registry(values)
    events = promotion.history(state)
    if as_json:
        output.print_json([event.as_json() for event in events])
        return
    if not events:
        print(f"No version of {state.name} has been promoted yet.")
        return
    rows: list[Sequence[str]] = [("when (UTC)", "what", "from", "to", "who", "why")]
    for event in events:
        overridden = ", ".join(name for name, passed, _ in event.gates if passed is False)
        how = f"forced: {overridden}" if event.forced else "automatic" if event.automatic else ""
        what = event.action + (f" ({how})" if how else "") + ("" if event.done else " (not carried out)")
        change = (str(event.previous or ""), str(event.version))
        rows.append((output.minute(event.time), what, *change, event.user, event.reason))
    output.print_table(rows)
