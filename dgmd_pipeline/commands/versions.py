"""The registry and the version that a command works on."""

import logging
from typing import TYPE_CHECKING

from dgmd_pipeline.errors import ChangedFile, NoUsableInput
from dgmd_pipeline.registry import promotion, versions
from dgmd_pipeline.registry.store import CANDIDATE, PRODUCTION, NotAllowed, Store
from dgmd_pipeline.registry.versions import ModelState, ModelVersion
from dgmd_pipeline.tasks import lookup

if TYPE_CHECKING:
    from pathlib import Path

    import keras

    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def read_registry(values: "Settings", repair: bool = True) -> tuple[Store, ModelState]:
    """Return the registry and the model in it. If `repair` is set, first complete interrupted promotions.

    Raises NoUsableInput if there is no registry or it holds no version of the model.
    """
    store = lookup.store(values)
    if store is None:
        raise NoUsableInput(
            f"There is no registry: MLFLOW_TRACKING_URI is not set, and {values.data_dir} holds no embedded store. Set "
            "MLFLOW_TRACKING_URI or DATA_DIR, or run the pipeline first."
        )
    state = versions.read(store, values.model_name)
    if not state.versions:
        missing = lookup.missing_registration(values)
        reason = missing or "correct MODEL_NAME, or run the pipeline first."
        raise NoUsableInput(f"There is no version of {values.model_name} in the registry: {reason}")
    return store, _repaired(store, state) if repair else state


def _repaired(store: Store, state: ModelState) -> ModelState:
    try:
        state, repaired = promotion.repair(store, state)
    except NotAllowed as error:
        log.warning("an interrupted promotion is not completed: %s", error)
        return state
    if repaired:
        log.warning("repaired the registry: %s", "; ".join(repaired))
    return state


def select_version(state: ModelState, word: str) -> ModelVersion:
    """Return the version whose number or @alias is `word`. Raises NoUsableInput if there is none."""
    for version in state.versions:
        if str(version.version) == word or (word.startswith("@") and word[1:] in version.aliases):
            return version
    if word == f"@{CANDIDATE}" and state.versions:
        raise NoUsableInput(
            f"No version of {state.name} is waiting for promotion; the newest is {state.versions[0].version}. Name a "
            "version."
        )
    numbers = ", ".join(str(version.version) for version in state.versions[:10])
    aliases = ", ".join(f"@{alias}" for version in state.versions for alias in version.aliases) or "none"
    remedy = " Promote a version, or name one of these." if word == f"@{PRODUCTION}" else ""
    raise NoUsableInput(f"{state.name} has no version {word}. Newest versions: {numbers}; aliases: {aliases}.{remedy}")


def load_network(path: "Path", version: ModelVersion) -> "keras.Model":
    """Load the model of a fetched version. Raises PipelineError if its file is damaged."""
    from dgmd_pipeline.training import networks

    try:
        return networks.load(path)
    except ChangedFile as error:
        raise error.of_version(version.version) from error
