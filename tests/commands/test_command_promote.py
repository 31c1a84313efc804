"""The commands `promote` and `rollback` against a real MLflow server."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import mlflow
import pytest
from conftest import ROOT, environment_with
from support.mlflow_server import registered_model_requests
from support.trained_versions import NAME, register_again, run_with

from dgmd_pipeline import settings
from dgmd_pipeline.commands import promotion
from dgmd_pipeline.registry import promotion as registry_promotion
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.registry import versions
from dgmd_pipeline.tasks import lookup

pytest_plugins = ["support.trained_versions"]

TOO_SLOW = {"MAX_LATENCY_RATIO": 1e-3}  # a condition that no model meets
PAGE = (ROOT / "docs/moving.md").read_text("utf-8")
(ADOPTING,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "set_registered_model" in code)


def environments(json_of, folder, variables):
    return {row["version"]: row["environment"] for row in json_of(folder, "models", **variables)}


def test_the_first_promotion_says_that_there_is_nothing_to_compare_with(trained):
    assert trained.first_promotion.count("There is no production version to compare with.") == 1
    assert "version 1 is production" in trained.first_promotion


def test_versions_are_promoted_and_rolled_back(trained, own_model, command, json_of, listener):
    folder, name = trained.folder, own_model["MODEL_NAME"]
    url, told = listener
    own_model |= {"NOTIFY_URL": url, "NOTIFY_ON": "change"}
    slow = {**own_model, **TOO_SLOW}
    assert command(folder, "promote", "1", "--yes", "--reason", "the first one", **own_model).returncode == 0
    assert environments(json_of, folder, own_model) == {1: "production", 2: "non-production"}

    refused = command(folder, "promote", "--yes", **slow)
    assert refused.returncode == 40
    assert re.search(r"latency +FAILS", refused.stdout) and "Failed: latency (1 of " in refused.stdout
    without_terminal = command(folder, "promote", **own_model)
    assert without_terminal.returncode == 2 and "stdin is not a terminal" in without_terminal.stdout
    without_reason = command(folder, "promote", "--force", **own_model)
    assert without_reason.returncode == 2 and "--force requires a reason" in without_reason.stdout
    assert environments(json_of, folder, own_model) == {1: "production", 2: "non-production"}

    forced = json_of(folder, "promote", "2", "--yes", "--force", "--reason", "it is needed", **slow)
    assert forced["promoted"] and forced["event"]["forced"] and forced["overridden"] == ["latency"]
    assert environments(json_of, folder, own_model) == {1: "non-production", 2: "production"}
    assert "is production already" in command(folder, "promote", "@production", **own_model).stdout
    assert trained.client.get_model_version(name, "1").current_stage == "Archived"
    assert trained.client.get_model_version(name, "2").aliases == ["production"]

    back = command(folder, "rollback", "--yes", "--reason", "it was not", **own_model)
    assert back.returncode == 0 and "version 1 is production again" in back.stdout
    assert environments(json_of, folder, own_model) == {1: "production", 2: "non-production"}
    assert command(folder, "rollback", "--yes", **own_model).returncode == 40

    events = json_of(folder, "history", **own_model)
    assert [(e["action"], e["former"], e["version"], e["forced"], e["why"]) for e in events] == [
        ("promote", None, 1, False, "the first one"),
        ("promote", 1, 2, True, "it is needed"),
        ("rollback", 2, 1, False, "it was not"),
    ]
    assert ["latency", False] in [gate[:2] for gate in events[1]["gates"]]
    assert [(body["outcome"], body["version"], body["verdict"]) for body in told] == [
        ("promoted", 1, "first"),
        ("promoted", 2, forced["verdict"]),
        ("rolled back", 1, None),
    ]
    assert told[1]["text"].endswith("instead of version 1. `rollback` restores version 1. Overridden: latency.")
    table = command(folder, "history", **own_model).stdout.splitlines()
    assert len(table) == 4 and "promote (forced: latency)" in table[2]


def test_a_promotion_asks_for_the_registered_model_at_most_twice(trained, own_model, command):
    for words in (["promote", "1"], ["promote", "2"], ["rollback"]):
        with registered_model_requests() as sent:
            done = command(trained.folder, *words, "--yes", **own_model)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(sent) == 2, words


def test_an_operator_at_a_terminal_is_asked(trained, own_model, command, json_of, monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(ours, "w") as keyboard, os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        trained.client.set_registered_model_alias(own_model["MODEL_NAME"], "production", "1")
        print("n", file=keyboard, flush=True)
        refused = command(trained.folder, "promote", "2", **own_model)
        assert refused.returncode == 40, refused.stdout
        assert "version 1, although there is no significant difference? [y/N]" in refused.stderr
        assert "No reason to promote: no significant difference from version 1" in refused.stdout
        assert "Nothing was changed." in refused.stdout and "error" not in refused.stdout
        assert environments(json_of, trained.folder, own_model) == {1: "production", 2: "non-production"}
        print("y", file=keyboard, flush=True)
        assert command(trained.folder, "promote", "2", **own_model).returncode == 0
    assert environments(json_of, trained.folder, own_model) == {1: "non-production", 2: "production"}


def with_changed_file(client, known, folder, path, change):
    """Register version `known` of NAME under a new name, with a run whose file `path` is changed."""
    name = f"{NAME}-{path.partition('/')[0]}-changed"
    run = run_with(client, known, "evaluation", "split")
    file = Path(client.download_artifacts(known.run_id, path, str(folder)))
    file.write_text(change(file.read_text()))
    client.log_artifact(run.info.run_id, str(file), path.rpartition("/")[0])
    client.create_registered_model(name)
    return name, run


def test_a_label_that_production_knew_and_the_version_does_not_is_refused(trained, tmp_path, json_of, command):
    client = trained.client
    first, second = (client.get_model_version(NAME, number) for number in ("1", "2"))
    more = "sage/1.png,sage,9,00,\n"
    name, run = with_changed_file(client, first, tmp_path, "split/training.csv", lambda rows: rows + more)
    register_again(client, name, first, run)
    register_again(client, name, second)
    client.set_registered_model_alias(name, "production", "1")
    variables = {**trained.variables, "MODEL_NAME": name, "DATA_DIR": tmp_path / "nothing"}
    for allowed in (False, True):
        words = ("promote", "2", "--yes", "--json")
        refused = command(trained.folder, *words, **variables, ALLOW_LOST_LABELS=str(allowed).lower())
        gates = {gate["name"]: gate for gate in json.loads(refused.stdout)["gates"]}
        assert gates["labels"]["passed"] is allowed
        assert gates["labels"]["text"].startswith("This version cannot predict these labels any more: sage.")


def test_a_version_is_promoted_by_itself_only_if_it_is_better_and_never_the_first(
    trained, own_model, tmp_path, json_of, command
):
    assert "Version 1 is not promoted: an operator promotes the first version." in trained.first_run
    client, folder = trained.client, trained.folder
    first, second = (client.get_model_version(NAME, number) for number in ("1", "2"))

    def better(text):
        found = {"difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.001}
        return json.dumps({**json.loads(text), **found})

    name, run = with_changed_file(client, second, tmp_path, "evaluation/comparison.json", better)
    register_again(client, name, first)
    register_again(client, name, second, run)
    register_again(client, name, second)
    client.set_registered_model_alias(name, "production", "1")
    variables = {**trained.variables, "MODEL_NAME": name}
    assert len(environments(json_of, folder, variables)) == 3  # this sets the variables
    values = settings.load()
    assert promotion.promote_if_better(values, 3).startswith("Version 3 is not promoted: ")
    assert promotion.promote_if_better(values.model_copy(update={"max_latency_ratio": 1e-3}), 2).startswith(
        "Version 2 is not promoted: better than version 1 (+20.0 points). Failed: latency"
    )
    assert promotion.promote_if_better(values, 2).startswith("Version 2 is production now: better than version 1 (")
    assert environments(json_of, folder, variables) == {1: "non-production", 2: "production", 3: "non-production"}
    (event,) = json_of(folder, "history", **variables)
    assert (event["automatic"], event["forced"], event["why"]) == (True, False, "better than version 1 (+20.0 points)")
    assert "promote (automatic)" in command(folder, "history", **variables).stdout
    assert command(folder, "rollback", "--yes", **variables).returncode == 0
    assert "was production before" in promotion.promote_if_better(values, 2)


def test_the_best_version_that_was_production_before_is_fetched_to_compare_or_else_named(
    trained, own_model, tmp_path, command, json_of
):
    client, name = trained.client, own_model["MODEL_NAME"]
    register_again(client, name, client.get_model_version(NAME, "2"))
    client.set_model_version_tag(name, "1", "dgmd.validation_accuracy", "0.9900")
    store = registry_store.at(own_model["MLFLOW_TRACKING_URI"])
    for version in (1, 2):
        state = versions.read(store, name)
        registry_promotion.set_production(store, state, version, action="promote", user="ada@desk", reason="")
    assert environments(json_of, trained.folder, own_model)[2] == "production"  # this sets the variables
    found = lookup.production(settings.load(), tmp_path)
    assert (found.production.version, found.best.version) == (2, 1)
    assert found.best.path.is_file() and found.best.trained_labels
    values = settings.load().model_copy(update={"mlflow_experiment_name": NAME})
    first, *others = lookup.versions_so_far(values, "a new training")
    assert (first.version, first.accuracy, [row.version for row in others]) == (1, 0.99, [2, 3])
    assert first.images > 1 < first.labels and first.left_out is not None
    training = client.get_model_version(name, "2").tags["dgmd.training_id"]
    assert lookup.versions_so_far(values, training) == [first]
    unreachable = values.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    assert lookup.versions_so_far(unreachable, "a new training") == []
    refused = command(tmp_path, "promote", "3", **{**own_model, "DATA_DIR": tmp_path / "nothing"})
    assert refused.returncode == 40
    assert "Version 1, which was production before, had an accuracy of 99 % on the images of its" in refused.stdout


def test_a_review_of_another_production_version_is_repeated_if_the_validation_records_exist(
    trained, own_model, tmp_path, command
):
    trained.client.set_registered_model_alias(own_model["MODEL_NAME"], "production", "2")  # 1 was not compared with it
    refused = command(tmp_path, "promote", "1", "--yes", **{**own_model, "DATA_DIR": tmp_path / "nothing"})
    assert refused.returncode == 40, refused.stdout
    assert "there are no validation records" in refused.stdout
    promoted = command(trained.folder, "promote", "1", "--yes", **own_model)
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    assert "Comparing with version 2 (production)" in promoted.stdout


def test_promote_benchmarks_a_version_whose_run_could_not(trained, tmp_path, command):
    client, name = trained.client, f"{NAME}-without-benchmark"
    known = client.get_model_version(NAME, "2")
    run = run_with(client, known, "evaluation", "split")
    (tmp_path / "assessment.json").write_text('{"missing": "It died."}')
    client.log_artifact(run.info.run_id, tmp_path / "assessment.json", "evaluation")
    client.create_registered_model(name)
    register_again(client, name, known, run)
    variables = {**trained.variables, "MODEL_NAME": name}
    refused = command(tmp_path, "promote", "1", "--yes", **{**variables, "DATA_DIR": tmp_path})
    assert refused.returncode == 40 and "It died." in refused.stdout
    promoted = command(trained.folder, "promote", "1", "--yes", **variables)
    assert promoted.returncode == 0, promoted.stdout
    assert "Benchmarking the model in a clean process ..." in promoted.stdout


@pytest.mark.parametrize(
    ("damaged", "commands"),
    [
        ("model/data/model.keras", [["promote", "1", "--yes"], ["predict", "jar.jpeg", "--version", "1"]]),
        ("split/training.csv", [["promote", "1", "--yes"], ["predict", "jar.jpeg", "--version", "1"]]),
        ("evaluation/assessment.json", [["promote", "1", "--yes"]]),
    ],
)
def test_a_damaged_file_in_the_registry_is_reported(trained, tmp_path, command, damaged, commands):
    file = Path(damaged)
    client, name = trained.client, f"{NAME}-damaged-{file.stem}"
    known = client.get_model_version(NAME, "2")
    run = run_with(client, known, "split", "evaluation")
    uri = trained.variables["MLFLOW_TRACKING_URI"]
    source = client.get_model_version_download_uri(NAME, "2")
    model = mlflow.artifacts.download_artifacts(source, tracking_uri=uri, dst_path=str(tmp_path))
    client.log_artifacts(run.info.run_id, model, "model")
    (tmp_path / file.name).write_bytes(b"PK damaged")
    client.log_artifact(run.info.run_id, tmp_path / file.name, str(file.parent))
    client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    for words in commands:
        refused = command(trained.folder, *words, **{**trained.variables, "MODEL_NAME": name})
        assert refused.returncode == 30, refused.stdout + refused.stderr
        assert f"Version 1 is damaged in the registry ({file.name}: " in refused.stdout + refused.stderr
        assert "dgmd-" not in refused.stdout + refused.stderr


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("9", "has no version 9. Newest versions: 2, 1; aliases: @candidate, @production."),
        ("@nobody", "has no version @nobody. Newest"),
    ],
)
def test_a_version_that_does_not_exist_is_reported(trained, command, version, message):
    result = command(trained.folder, "promote", version, **trained.variables)
    assert result.returncode == 20
    assert message in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_version_of_an_older_pipeline_is_replaced_and_restored(trained, command, json_of):
    folder, client, name = trained.folder, trained.client, "jars-of-before"
    run = client.create_run(client.get_experiment_by_name(NAME).experiment_id)
    Path("MLmodel").write_text("flavors:\n  keras: {}\n")
    client.log_artifact(run.info.run_id, "MLmodel", "model")
    client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    register_again(client, name, client.get_model_version(NAME, "2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage(name, "1", "Production")
    variables = {**trained.variables, "MODEL_NAME": name}
    ignored = command(folder, "promote", "2", **{**variables, **TOO_SLOW})
    assert "version 1 has the stage Production but not the alias" in ignored.stdout
    code = [sys.executable, "-c", ADOPTING]
    subprocess.run(code, cwd=folder, env=environment_with({**variables, "VERSION": 1}), check=True)
    assert environments(json_of, folder, variables) == {2: "non-production", 1: "production"}
    refused = command(folder, "promote", "2", "--yes", "--json", **variables)
    assert refused.returncode == 40
    gates = {gate["name"]: gate for gate in json.loads(refused.stdout)["gates"]}
    assert "was not made by this pipeline" in gates["assessment"]["text"] and not gates["assessment"]["passed"]
    forced = command(folder, "promote", "2", "--yes", "--force", "--reason", "the first of ours", **variables)
    assert "version 2 is production instead of version 1." in forced.stdout
    assert "Overridden: labels, assessment." in forced.stdout
    back = command(folder, "rollback", "--yes", **variables)
    assert back.returncode == 0, back.stdout + back.stderr
    assert "version 1 is production again" in back.stdout
    assert "Rolling back without checking that it can be loaded." in back.stdout
    assert client.get_model_version(name, "1").current_stage == "Production"
