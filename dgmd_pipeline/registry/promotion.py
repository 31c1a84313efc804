"""The production version: promotion, rollback and their history, kept in the registry.

The alias `production` decides which version is production. A promotion or a rollback has four parts:

1. It writes an event, because MLflow does not record who moved an alias. An event is a tag of the registered model.
2. It moves the alias with one request, which is atomic.
3. It makes the tag `environment` and the stage of each version match the alias.
4. It marks the event as done.

An event without this mark shows that the change was interrupted. `repair` then does part 3, and records in the event
whether the alias was moved. A gate is a condition for promotion.
"""

import dataclasses
import json
import secrets
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import versions
from dgmd_pipeline.registry.store import (
    ACCURACY,
    CANDIDATE,
    ENVIRONMENT,
    EVENT,
    NON_PRODUCTION,
    PRODUCTION,
    REQUEST_FAILED,
    Store,
    errors_explained,
)
from dgmd_pipeline.registry.versions import ModelState, ModelVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGE, PREVIOUS_STAGE = "Production", "Archived"
# The maximum length of a reason, and of the text of a gate. A tag contains the reason and all gates, and MLflow's
# databases limit a tag to 5,000 characters.
MAX_CHARACTERS = 500
JSON_NAMES = {"time": "when", "user": "who", "previous": "former", "reason": "why"}  # field of Event -> JSON key

GateResult = tuple[str, bool | None, str]  # name, passed (None: does not apply), text


class Event(NamedTuple):
    """A change of the production version."""

    time: str  # ISO 8601, UTC
    user: str
    action: str  # "promote" or "rollback"
    previous: int | None  # the production version before the event; None if no version was production
    version: int  # the production version after the event
    reason: str
    gates: Sequence[GateResult]
    forced: bool  # True: a gate did not pass, and --force was given
    done: bool | None = None  # whether the alias moved; None: not known yet
    automatic: bool = False  # True: a run promoted the version, because it was better

    def as_json(self) -> dict[str, object]:
        """Return the JSON object that is stored and printed."""
        return {JSON_NAMES.get(name, name): value for name, value in self._asdict().items()}


def history(state: ModelState) -> list[Event]:
    """Return the changes of the production version, the oldest first.

    Raises PipelineError if an event was edited by hand and cannot be read.
    """
    return list(_events(state).values())


def previous_versions(events: Sequence[Event], current: int | None) -> list[int]:
    """Return the versions that successive rollbacks restore. The next rollback restores the last element of the list.

    A rollback removes the restored version and all later versions from the list. For example, after promotions of 1, 2
    and 3, the first rollback restores 2, and the second rollback restores 1.

    If somebody moves the alias `production` by hand, no event records this. But the field `previous` of the next event
    names the version that had the alias, so the list contains this version, too.
    """
    stack: list[int] = []
    for event in events:
        if not event.done:
            continue
        if event.previous is not None and stack[-1:] != [event.previous]:
            stack.append(event.previous)
        if event.action == "rollback" and event.version in stack:
            last = len(stack) - 1 - stack[::-1].index(event.version)
            del stack[last + 1 :]
        else:
            stack.append(event.version)
    if current is not None and stack[-1:] != [current]:
        stack.append(current)
    return stack[:-1]


def best_former(state: ModelState, candidate: ModelVersion | None = None) -> ModelVersion | None:
    """Return the most accurate former production version other than `candidate`, if it is better than production.

    Each accuracy was measured on the validation images of the version's own run, so the accuracies of two versions are
    not strictly comparable. They only tell which version to compare with the candidate.

    Returns None if production is the best, or if no former version is still registered.
    """
    production = state.production
    events = [event for event in history(state) if event.done]
    numbers = {event.version for event in events} | {event.previous for event in events}
    former = [
        version for version in state.versions if version.version in numbers and version not in (production, candidate)
    ]
    best = max(former, key=lambda version: accuracy(version) or 0, default=None)
    return best if best and production and (accuracy(best) or 0) > (accuracy(production) or 0) else None


def accuracy(version: ModelVersion) -> float | None:
    """Return the accuracy on the validation images of the version's run, 0 to 1; None if it was not recorded."""
    return float(version.tags[ACCURACY]) if ACCURACY in version.tags else None


def set_production(
    store: Store, state: ModelState, version: int, *, action: str, user: str, reason: str,
    gates: Sequence[GateResult] = (), forced: bool = False, automatic: bool = False,
) -> Event:  # fmt: skip
    """Replace the production version of `state` by `version`, and record who did it and why.

    Raises PipelineError if the production version has changed since `state` was read, or if MLflow cannot be reached
    or refuses. `repair` completes a change that was interrupted.
    """
    from mlflow import MlflowClient

    previous = state.production.version if state.production else None
    with errors_explained(store, REQUEST_FAILED):
        client = MlflowClient(store.uri)
        if (found := _production_version(client, state.name)) != previous:
            change = "No version is production any more" if found is None else f"Version {found} is production now"
            raise PipelineError(f"{change}: another change was made meanwhile. Check it and repeat the command.")
        now = datetime.now(UTC)
        short = [(name, passed, text[:MAX_CHARACTERS]) for name, passed, text in gates]
        event = Event(
            now.isoformat(timespec="seconds"), user, action, previous, version, reason[:MAX_CHARACTERS], short, forced,
            automatic=automatic,
        )  # fmt: skip
        key = f"{EVENT}{now:%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(2)}"
        _write(client, state.name, key, event)
        client.set_registered_model_alias(state.name, PRODUCTION, str(version))
        _follow_alias(client, versions.read(store, state.name))  # read again: a run may have added a version
        done = event._replace(done=True)
        _write(client, state.name, key, done)
        return done


def repair(store: Store, state: ModelState) -> tuple[ModelState, list[str]]:
    """Complete interrupted changes, and make tags and stages match the alias.

    Returns the state after the repair, and sentences about what was repaired. No request is sent if `state` needs no
    repair. Raises PipelineError if MLflow cannot be reached or refuses, or if an event cannot be read.
    """
    from mlflow import MlflowClient

    if _is_consistent(state):
        return state, []
    with errors_explained(store, REQUEST_FAILED):
        client = MlflowClient(store.uri)
        state = versions.read(store, state.name)  # read again: another process may be in the middle of a promotion
        state, repaired = _follow_alias(client, state)
        current = state.production.version if state.production else None
        for key, event in _events(state).items():
            if event.done is None:
                done = event.version == current
                text = _write(client, state.name, key, event._replace(done=done))
                state = dataclasses.replace(state, tags={**state.tags, key: text})
                outcome = "was carried out" if done else "was not carried out"
                repaired.append(f"the interrupted {event.action} of version {event.version} {outcome}")
    return state, repaired


def _production_version(client: "MlflowClient", name: str) -> int | None:
    """Return the production version. Request only the alias: the answer for the whole model would be much larger."""
    from mlflow.exceptions import MlflowException

    try:
        return int(client.get_model_version_by_alias(name, PRODUCTION).version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model or alias
            raise
        return None


def _events(state: ModelState) -> dict[str, Event]:
    """Return the events, the oldest first: name of the tag -> event."""
    return {key: _event(key, state.tags[key]) for key in sorted(state.tags) if key.startswith(EVENT)}


def _event(key: str, text: str) -> Event:
    try:
        values = json.loads(text)
        names = {name: JSON_NAMES.get(name, name) for name in Event._fields}
        # A later version of this package may have stored more fields.
        return Event(**{name: values[json_name] for name, json_name in names.items() if json_name in values})
    except (ValueError, TypeError) as error:
        raise PipelineError(
            f"The tag {key} of the registered model cannot be read as an event of the history ({error}): correct or "
            "delete it."
        ) from error


def _write(client: "MlflowClient", name: str, key: str, event: Event) -> str:
    text = json.dumps(event.as_json(), ensure_ascii=False)
    client.set_registered_model_tag(name, key, text)
    return text


def _is_consistent(state: ModelState) -> bool:
    """Return whether tags and stages match the alias, and every event is finished."""
    followed = [_as_alias_says(version, state.production) for version in state.versions]
    return followed == list(state.versions) and all(event.done is not None for event in _events(state).values())


def _as_alias_says(version: ModelVersion, production: ModelVersion | None) -> ModelVersion:
    """Return `version` with the tag, stage and aliases that it must have if `production` is the production version."""
    if production is None:  # stages that another tool has set are kept until the first promotion
        return version
    is_production = version.version == production.version
    environment = PRODUCTION if is_production else NON_PRODUCTION
    tags = version.tags
    if tags.get(ENVIRONMENT, NON_PRODUCTION) != environment:
        tags = {**tags, ENVIRONMENT: environment}
    stage = STAGE if is_production else PREVIOUS_STAGE if version.stage == STAGE else version.stage
    aliases = [alias for alias in version.aliases if not (is_production and alias == CANDIDATE)]
    return version._replace(tags=tags, stage=stage, aliases=aliases)


def _follow_alias(client: "MlflowClient", state: ModelState) -> tuple[ModelState, list[str]]:
    """Make tags, stages and the alias `candidate` match the alias `production`.

    Return the new state and a text about each change.
    """
    name, changes = state.name, []
    followed = [_as_alias_says(version, state.production) for version in state.versions]
    # The new production version gets the stage "Production" before the old one loses this stage. So a consumer that
    # loads the version with this stage always finds one.
    for old, new in sorted(zip(state.versions, followed, strict=True), key=lambda pair: pair[0] != state.production):
        number = str(new.version)
        if new.tags != old.tags:
            client.set_model_version_tag(name, number, ENVIRONMENT, new.tags[ENVIRONMENT])
            changes.append(f"version {number} is tagged {new.tags[ENVIRONMENT]}")
        if new.stage != old.stage:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # stages are deprecated, but older consumers use them
                client.transition_model_version_stage(name, number, new.stage)
            changes.append(f"version {number} has the stage {new.stage}")
        if new.aliases != old.aliases:
            client.delete_registered_model_alias(name, CANDIDATE)
            changes.append(f"version {number} is no longer the candidate")
    return dataclasses.replace(state, versions=followed), changes
