"""Promotions in the embedded store and on a real MLflow server over HTTP, checked as a consumer sees them."""

import json
import warnings

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from support.mlflow_server import registered_model_requests

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import promotion, versions
from dgmd_pipeline.registry.promotion import Event

pytest_plugins = ["support.registry"]


@pytest.fixture
def name(store, request):
    """A registered model with three versions, the last one the candidate."""
    client = mlflow.MlflowClient(store.uri, store.uri)
    name = f"jars-{abs(hash(request.node.nodeid))}"
    experiment = client.create_experiment(name, artifact_location=store.artifacts)
    run = client.create_run(experiment)
    client.create_registered_model(name)
    for _ in range(3):
        tags = {"environment": "non-production"}
        client.create_model_version(name, f"runs:/{run.info.run_id}/model", run.info.run_id, tags=tags)
    client.set_registered_model_alias(name, "candidate", "3")
    return name


def promote(store, name, version, **more):
    state = versions.read(store, name)
    return promotion.set_production(store, state, version, action="promote", user="ada@desk", reason="better", **more)


def production(store, name):
    return versions.read(store, name).production.version


def history(store, name):
    return promotion.history(versions.read(store, name))


def repair(store, name):
    return promotion.repair(store, versions.read(store, name))


def seen(store, name):
    """What a consumer sees: the version of the alias, and each version's tag, stage and aliases."""
    client = mlflow.MlflowClient(store.uri, store.uri)
    try:
        alias = int(client.get_model_version_by_alias(name, "production").version)
    except MlflowException:
        alias = None
    found = {}
    for version in ("1", "2", "3"):
        entry = client.get_model_version(name, version)
        found[int(version)] = entry.tags["environment"], entry.current_stage, sorted(entry.aliases)
    return alias, found


OTHER = ("non-production", "None", [])


def test_promotion_sets_alias_tag_and_stage_and_archives_the_previous_version(store, name):
    promote(store, name, 1)
    assert production(store, name) == 1
    it = ("production", "Production", ["production"])
    assert seen(store, name) == (1, {1: it, 2: OTHER, 3: ("non-production", "None", ["candidate"])})
    promote(store, name, 3)
    assert seen(store, name) == (3, {1: ("non-production", "Archived", []), 2: OTHER, 3: it})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client = mlflow.MlflowClient(store.uri, store.uri)
        assert [found.version for found in client.get_latest_versions(name, ["Production"])] in (["3"], [3])


def test_the_history_holds_each_change(store, name):
    gates = [("accuracy", False, "x" * 2000), ("latency", None, "nothing")]
    promote(store, name, 2, gates=gates, forced=True)
    promote(store, name, 3)
    first, second = history(store, name)
    assert first._replace(time="") == Event(
        "", "ada@desk", "promote", None, 2, "better", [["accuracy", False, "x" * 500], ["latency", None, "nothing"]],
        True, True,
    )  # fmt: skip
    assert (second.previous, second.version, second.forced, second.done) == (2, 3, False, True)
    assert first.time <= second.time
    tags = mlflow.MlflowClient(store.uri, store.uri).get_registered_model(name).tags
    assert len(tags) == 2 and all(len(value) < 5000 for value in tags.values())


def test_events_are_stored_and_printed_with_the_keys_that_they_always_had(store, name):
    promote(store, name, 2)
    (text,) = mlflow.MlflowClient(store.uri, store.uri).get_registered_model(name).tags.values()
    (event,) = history(store, name)
    assert json.loads(text) == event.as_json()
    assert list(event.as_json().items())[1:] == [
        ("who", "ada@desk"), ("action", "promote"), ("former", None), ("version", 2), ("why", "better"),
        ("gates", []), ("forced", False), ("done", True), ("automatic", False),
    ]  # fmt: skip
    assert next(iter(event.as_json())) == "when"


INTERRUPTED_AT = ["set_registered_model_alias", "set_model_version_tag", "transition_model_version_stage",
        "delete_registered_model_alias"]  # fmt: skip


@pytest.mark.parametrize("request_name", INTERRUPTED_AT)
def test_an_interrupted_promotion_is_repaired(store, name, request_name, monkeypatch):
    promote(store, name, 1)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, request_name, die)
        with pytest.raises(KeyboardInterrupt):
            promote(store, name, 3)
    carried_out = request_name != "set_registered_model_alias"
    assert history(store, name)[-1].done is None
    state, repaired = repair(store, name)
    outcome = "was carried out" if carried_out else "was not carried out"
    assert repaired[-1] == f"the interrupted promote of version 3 {outcome}"
    assert state == versions.read(store, name)
    it, former = ("production", "Production", ["production"]), ("non-production", "Archived", [])
    alias, found = seen(store, name)
    assert alias == (3 if carried_out else 1)
    assert found[alias] == it
    assert found[1] == (former if carried_out else it)
    assert history(store, name)[-1].done is carried_out
    assert repair(store, name) == (state, [])


@pytest.mark.parametrize("store", ["server"], indirect=True)
def test_a_promotion_asks_for_the_registered_model_twice(store, name):
    promote(store, name, 1)
    with registered_model_requests() as sent:
        state, repaired = promotion.repair(store, versions.read(store, name))
        promotion.set_production(store, state, 2, action="promote", user="ada@desk", reason="")
    assert repaired == []
    assert len(sent) == 2


def test_a_version_has_the_stage_production_at_any_time(store, name, monkeypatch):
    promote(store, name, 1)
    promote(store, name, 3)
    move, in_stage = mlflow.MlflowClient.transition_model_version_stage, []

    def watched(client, *words, **more):
        found = move(client, *words, **more)
        in_stage.append([version for version, (_, stage, _) in seen(store, name)[1].items() if stage == "Production"])
        return found

    monkeypatch.setattr(mlflow.MlflowClient, "transition_model_version_stage", watched)
    state = versions.read(store, name)
    promotion.set_production(store, state, 1, action="rollback", user="ada@desk", reason="")
    assert in_stage == [[1, 3], [1]]


def test_tags_and_history_follow_an_alias_that_was_moved_by_hand(store, name):
    promote(store, name, 1)
    client = mlflow.MlflowClient(store.uri, store.uri)
    client.set_registered_model_alias(name, "production", "2")
    _, repaired = repair(store, name)
    assert "version 2 is tagged production" in repaired
    assert seen(store, name)[1][2] == ("production", "Production", ["production"])
    promote(store, name, 3)
    events = history(store, name)
    assert [event.previous for event in events] == [None, 2]
    assert promotion.previous_versions(events, 3) == [1, 2]


def test_a_stage_without_the_alias_stays_until_the_first_promotion(store, name):
    client = mlflow.MlflowClient(store.uri, store.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage(name, "2", "Production")
    assert repair(store, name)[1] == []
    assert seen(store, name)[1][2] == ("non-production", "Production", [])
    promote(store, name, 1)
    assert seen(store, name)[1][2] == ("non-production", "Archived", [])


def test_the_best_former_version_is_one_that_was_production_and_has_a_higher_accuracy(store, name):
    client = mlflow.MlflowClient(store.uri, store.uri)
    for version, accuracy in (("1", "0.93"), ("2", "0.92"), ("3", "0.99")):
        client.set_model_version_tag(name, version, "dgmd.validation_accuracy", accuracy)
    promote(store, name, 1)
    assert promotion.best_former(versions.read(store, name)) is None
    promote(store, name, 2)
    state = versions.read(store, name)
    assert promotion.best_former(state).version == 1  # 3 never was production
    assert promotion.best_former(state, candidate=state.versions[-1]) is None
    promote(store, name, 3)
    assert promotion.best_former(versions.read(store, name)) is None


def test_a_promotion_is_refused_if_production_has_changed_since_it_was_read(store, name):
    state = versions.read(store, name)
    promote(store, name, 1)
    with pytest.raises(PipelineError, match="Version 1 is production now: another change was made meanwhile"):
        promotion.set_production(store, state, 3, action="promote", user="bob@desk", reason="")
    state = versions.read(store, name)
    mlflow.MlflowClient(store.uri, store.uri).delete_registered_model_alias(name, "production")
    with pytest.raises(PipelineError, match="No version is production any more"):
        promotion.set_production(store, state, 3, action="promote", user="bob@desk", reason="")
    assert len(history(store, name)) == 1


def test_a_version_that_is_registered_during_a_promotion_stays_the_candidate(store, name):
    state = versions.read(store, name)
    client = mlflow.MlflowClient(store.uri, store.uri)
    run_id = client.get_model_version(name, "1").run_id
    client.create_model_version(name, f"runs:/{run_id}/model", run_id, tags={"environment": "non-production"})
    client.set_registered_model_alias(name, "candidate", "4")
    promotion.set_production(store, state, 3, action="promote", user="ada@desk", reason="")
    assert client.get_model_version(name, "4").aliases == ["candidate"]


def test_a_model_that_does_not_exist_has_no_versions(store):
    state = versions.read(store, "nobody")
    assert (state.versions, state.production, promotion.history(state)) == ([], None, [])
    assert promotion.repair(store, state) == (state, [])


def test_an_event_that_was_edited_is_reported(store, name):
    mlflow.MlflowClient(store.uri, store.uri).set_registered_model_tag(name, "dgmd.event.1", "{}")
    state = versions.read(store, name)
    with pytest.raises(PipelineError, match=r"dgmd.event.1 .* correct or delete it"):
        promotion.history(state)
    with pytest.raises(PipelineError, match=r"dgmd.event.1 .* correct or delete it"):
        promotion.repair(store, state)


def event(action, previous, version, done=True):
    return Event("", "", action, previous, version, "", [], False, done)


@pytest.mark.parametrize(
    ("events", "current", "expected"),
    [
        ([], None, []),
        ([], 4, []),
        ([event("promote", None, 1)], 1, []),
        ([event("promote", None, 1), event("promote", 1, 2), event("promote", 2, 3)], 3, [1, 2]),
        ([event("promote", None, 1), event("promote", 1, 2), event("rollback", 2, 1)], 1, []),
        (
            [event("promote", None, 1), event("promote", 1, 2), event("promote", 2, 3), event("rollback", 3, 2)],
            2,
            [1],
        ),
        ([event("promote", None, 1), event("promote", 1, 2, done=False)], 1, []),
        ([event("promote", 5, 6)], 6, [5]),
        ([event("promote", None, 1), event("promote", 1, 2), event("promote", 2, 1)], 1, [1, 2]),
        ([event("promote", None, 1)], 9, [1]),
    ],
)
def test_rollbacks_restore_the_versions_of_the_history(events, current, expected):
    assert promotion.previous_versions(events, current) == expected
