"""Which version is production, since when and why: promotion, rollback and their history, kept in the registry.

The alias `production` is the truth: one atomic write. The tag `environment` and the stage follow it. MLflow keeps no
record of who moved an alias, so each change is written down before it is made, as a tag of the registered model, and
marked when it is through: whoever comes next sees what was cut off, and repairs it.
"""

import json
import secrets
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry.store import ASKED, CANDIDATE, ENVIRONMENT, NON_PRODUCTION, PRODUCTION, Store, explained
from dgmd_pipeline.registry.versions import entries, registered_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

EVENT = "dgmd.event."  # the tags' names begin with it; the time follows, so that names sort
STAGE, FORMER_STAGE = "Production", "Archived"
WORDS = 500  # characters of a reason or a gate: a tag holds 5,000 in MLflow's databases


class Event(NamedTuple):
    """A change of the production version."""

    when: str  # ISO 8601, UTC
    who: str
    action: str  # "promote" or "rollback"
    former: int | None  # version
    version: int | None  # that became production
    why: str
    gates: Sequence[Sequence[Any]]  # name, passed (None: does not apply), text
    forced: bool
    done: bool | None = None  # False: it was cut off before the alias moved; None: under way, or cut off


def current(store: Store, name: str) -> int | None:
    """Return the version that is production, or None. Raises PipelineError where MLflow cannot be asked."""
    from mlflow import MlflowClient

    with explained(store, ASKED):
        return _aliased(MlflowClient(store.uri), name)


def history(store: Store, name: str) -> list[Event]:
    """Return what has been changed, the oldest first. Raises PipelineError where MLflow cannot be asked."""
    from mlflow import MlflowClient

    with explained(store, ASKED):
        return [event for _, event in _events(MlflowClient(store.uri), name)]


def set_production(
    store: Store, name: str, version: int, former: int | None, *, action: str, who: str, why: str,
    gates: Sequence[Sequence[Any]] = (), forced: bool = False,
) -> Event:  # fmt: skip
    """Make a version production instead of `former`, and note who did it and why.

    Raises PipelineError where another one is production by now, and where MLflow cannot be reached or refuses; what was
    cut off then is repaired the next time.
    """
    from mlflow import MlflowClient

    with explained(store, ASKED):
        client = MlflowClient(store.uri)
        if (found := _aliased(client, name)) != former:
            by_now = "No version is production any more" if found is None else f"Version {found} is production by now"
            raise PipelineError(f"{by_now}: look again and give the command again.")
        now = datetime.now(UTC)
        short = [[name, passed, text[:WORDS]] for name, passed, text in gates]
        event = Event(now.isoformat(timespec="seconds"), who, action, former, version, why[:WORDS], short, forced)
        key = f"{EVENT}{now:%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(2)}"
        _write(client, name, key, event)
        client.set_registered_model_alias(name, PRODUCTION, str(version))
        _follow(client, name, store)
        return _write(client, name, key, event._replace(done=True))


def repair(store: Store, name: str) -> list[str]:
    """Bring to an end what was cut off, and let tags and stages follow the alias; return what was mended, in words.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with explained(store, ASKED):
        client = MlflowClient(store.uri)
        mended = _follow(client, name, store)
        for key, event in _events(client, name):
            if event.done is None:
                now = _aliased(client, name)  # asked late: the event may be under way just now
                _write(client, name, key, event._replace(done=event.version == now))
                outcome = "was carried out" if event.version == now else "was not carried out"
                mended.append(f"the {event.action} of version {event.version} that was cut off {outcome}")
        return mended


def previous_versions(events: Sequence[Event], now: int | None) -> list[int]:
    """Return the versions that a rollback leads back to, the next one last.

    A rollback takes back what it leads over: after 1, 2, 3 the first leads to 2 and the second to 1. What was made
    production by other means is known from the `former` of the event that followed.
    """
    stack: list[int] = []
    for event in events:
        if not event.done or event.version is None:
            continue
        if event.former is not None and stack[-1:] != [event.former]:
            stack.append(event.former)
        if event.action == "rollback" and event.version in stack:
            last = len(stack) - 1 - stack[::-1].index(event.version)
            del stack[last + 1 :]
        else:
            stack.append(event.version)
    if now is not None and stack[-1:] != [now]:
        stack.append(now)
    return stack[:-1]


def _aliased(client: "MlflowClient", name: str) -> int | None:
    found = _model(client, name).aliases.get(PRODUCTION)
    return None if found is None else int(found)


def _model(client: "MlflowClient", name: str) -> Any:
    found = registered_model(client, name)
    if found is None:
        raise PipelineError(f"There is no model {name} in the registry: correct MODEL_NAME, or run the pipeline first.")
    return found


def _events(client: "MlflowClient", name: str) -> list[tuple[str, Event]]:
    tags = _model(client, name).tags
    return [(key, _event(key, tags[key])) for key in sorted(tags) if key.startswith(EVENT)]


def _event(key: str, text: str) -> Event:
    try:
        values = json.loads(text)
        return Event(**{name: values[name] for name in Event._fields if name in values})  # a later version may say more
    except (ValueError, TypeError) as error:
        raise PipelineError(
            f"The tag {key} of the registered model is not the entry of the history that was written there "
            f"({error}): correct or delete it."
        ) from error


def _write(client: "MlflowClient", name: str, key: str, event: Event) -> Event:
    client.set_registered_model_tag(name, key, json.dumps(event._asdict(), ensure_ascii=False))
    return event


def _follow(client: "MlflowClient", name: str, store: Store) -> list[str]:
    """Let tags, stages and the alias `candidate` follow the alias `production`; return what differed."""
    now = _aliased(client, name)
    if now is None:  # nothing to follow: a stage that was set by other means stays until something is promoted
        return []
    mended = []
    # The new one first: those who ask for the stage find one at any time.
    for entry in sorted(entries(store, name), key=lambda entry: entry.version != now):
        is_it = entry.version == now
        environment = PRODUCTION if is_it else NON_PRODUCTION
        if entry.tags.get(ENVIRONMENT, NON_PRODUCTION) != environment:
            client.set_model_version_tag(name, str(entry.version), ENVIRONMENT, environment)
            mended.append(f"version {entry.version} is tagged {environment}")
        stage = STAGE if is_it else FORMER_STAGE if entry.stage == STAGE else entry.stage
        if entry.stage != stage:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # deprecated, but older consumers ask for the stage
                client.transition_model_version_stage(name, str(entry.version), stage)
            mended.append(f"version {entry.version} has the stage {stage}")
        if is_it and CANDIDATE in entry.aliases:
            client.delete_registered_model_alias(name, CANDIDATE)
            mended.append(f"version {entry.version} is no candidate any more")
    return mended
