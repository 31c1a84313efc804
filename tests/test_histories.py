"""Folders that were brought up to date by a random history of runs equal those of a run from nothing.

HYPOTHESIS_EXAMPLES is the number of histories.
"""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import histories
from support.histories import CONTENTS, PATHS, Kill, copy_started

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.tasks import names
from dgmd_pipeline.workflow import folders

pytest_plugins = ["support.histories"]
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "500"))


CHANGES = {
    "validation_pcnt": [0.2, 0.34, 0.5], "balance_limit": [None, 1.0, 1.3], "num_shards": [1, 2, 3],
    "image_width": [8, 9], "image_height": [8, 9], "image_fit": ["stretch", "crop"], "min_images_per_label": [2, 2, 3],
}  # fmt: skip
CORRECTIONS = [None, "anise/0,mint", "anise/1,exclude", "cumin/0,dill\ncumin/1,dill"]
VERBS = ["inspect", "label", "balance", "split", "convert", "extract", "tfrecord_training", "features_validation"]
MOMENTS = [
    *("write *", "remove *", "mkdir .draft-*", "rename .draft-* *", "rename .old-* *", "rename * .old-*"),
    *(f"rename .draft-{folder} *" for folder in ("inspected", "split", "tfrecord_training", "features_training")),
]


class Episode(NamedTuple):
    """What happens to the images and the settings, and then a run."""

    put: dict[str, int | None]  # path -> number of its content; None: the file is removed
    moves: list[tuple[str, str]]
    settings: dict[str, object]
    corrections: str | None
    force: str | None
    kill: tuple[str, int] | None


SETTINGS = st.sampled_from(sorted(CHANGES)).flatmap(
    lambda name: st.sampled_from(CHANGES[name]).map(lambda value: {name: value})
)
EPISODES = st.builds(
    Episode,
    st.dictionaries(st.sampled_from(PATHS), st.sampled_from([None, *range(len(CONTENTS))]), max_size=3),
    st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(PATHS)), max_size=2),
    st.just({}) | SETTINGS,
    st.sampled_from(CORRECTIONS),
    st.none() | st.sampled_from(VERBS),
    st.none() | st.tuples(st.just("*"), st.integers(0, 99)) | st.tuples(st.sampled_from(MOMENTS), st.integers(0, 5)),
)


@pytest.fixture(autouse=True)
def _silent():
    logging.disable()  # pytest would keep every line
    yield
    logging.disable(logging.NOTSET)


def labels_of(data_dir: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        folder = folders.current_path(data_dir / names.LABEL_MAP)
        return list(json.loads((folder / "mapping.json").read_text()).values())
    return []


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(history=st.lists(EPISODES, min_size=1, max_size=3), downloaded=st.sampled_from([False, False, False, True]))
def test_a_history_of_runs_leaves_the_folders_of_a_run_from_nothing(history, downloaded, started, served_bucket):
    with histories.folder_in_memory() as base:
        data_dir, bucket = base / "data", served_bucket if downloaded else None
        source = copy_started(started, data_dir, bucket)
        chosen, ended = histories.settings_for(data_dir, bucket), None
        for episode in history:
            for path, number in episode.put.items():
                source.put(path, number)
            for path, target in episode.moves:
                source.move(path, target)
            (data_dir / "corrections.csv").unlink(missing_ok=True)
            if episode.corrections:
                (data_dir / "corrections.csv").write_text(f"key,label\n{episode.corrections}\n")
            chosen = chosen.model_copy(update=episode.settings)
            ended = run(chosen, episode.force, episode.kill)
        if history[-1].kill:
            ended = run(chosen)
        expected = histories.run_from_nothing(chosen, base / "scratch")
        found = histories.contents(data_dir)
        steps = {name.partition("/")[0] for name in expected if name.endswith("_SUCCESS")}
        assert ended or len(steps) == (9 if downloaded else 8)
        # A run that ends before a step leaves what an earlier, killed run left of it.
        left = {name.partition("/")[0].split("-", 1)[-1] for name in found if name.startswith(".")}
        assert not left & steps if ended else not left
        for step in steps:
            kept = {name: value for name, value in found.items() if name.partition("/")[0] == step}
            assert kept == {name: value for name, value in expected.items() if name.partition("/")[0] == step}
        if ended is None:
            assert not histories.run(chosen).records  # nothing is left to do


def run(chosen: Settings, force: str | None = None, kill: tuple[str, int] | None = None) -> PipelineError | None:
    """Run, or be killed. Labels are only added to the map, in alphabetical order. Return the error that ended the run.

    It ends with an error where fewer than two labels can be used, for example.
    """
    before, ended = labels_of(chosen.data_dir), None
    with histories.killed(Kill(*kill), chosen.data_dir) if kill else contextlib.nullcontext():
        try:
            histories.run(chosen, force)
        except PipelineError as error:
            ended = error
    after = labels_of(chosen.data_dir)
    if after:
        added = after[len(before) :]
        assert after == [*before, *sorted(added)]
    return ended
