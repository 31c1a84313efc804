"""Against the embedded store and a real MLflow server over HTTP, and what is there looked at as a consumer would."""

import warnings

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import promotion, versions
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.registry.promotion import Event


@pytest.fixture(params=["embedded", "server"])
def store(request, tmp_path):
    if request.param == "embedded":
        (tmp_path / "mlflow").mkdir()
        registry_store.create(tmp_path / "mlflow")
        return registry_store.embedded(tmp_path / "mlflow")
    return registry_store.Store(request.getfixturevalue("mlflow_server"), None)


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
    now = promotion.current(store, name)
    return promotion.set_production(store, name, version, now, action="promote", who="ada@desk", why="better", **more)


def seen(store, name):
    """What a consumer sees: the version of the alias, and each one's tag, stage and aliases."""
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


def test_the_promoted_version_is_production_by_alias_tag_and_stage_and_the_former_one_is_archived(store, name):
    promote(store, name, 1)
    assert promotion.current(store, name) == versions.production(store, name).version == 1
    it = ("production", "Production", ["production"])
    assert seen(store, name) == (1, {1: it, 2: OTHER, 3: ("non-production", "None", ["candidate"])})
    promote(store, name, 3)
    assert seen(store, name) == (3, {1: ("non-production", "Archived", []), 2: OTHER, 3: it})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client = mlflow.MlflowClient(store.uri, store.uri)
        assert [found.version for found in client.get_latest_versions(name, ["Production"])] in (["3"], [3])


def test_each_change_is_in_the_history_whoever_asks_from_wherever(store, name):
    gates = [["accuracy", False, "x" * 2000], ["latency", None, "nothing"]]
    promote(store, name, 2, gates=gates, forced=True)
    promote(store, name, 3)
    first, second = promotion.history(store, name)
    assert first._replace(when="") == Event(
        "", "ada@desk", "promote", None, 2, "better", [["accuracy", False, "x" * 500], ["latency", None, "nothing"]],
        True, True,
    )  # fmt: skip
    assert (second.former, second.version, second.forced, second.done) == (2, 3, False, True)
    assert first.when <= second.when
    tags = mlflow.MlflowClient(store.uri, store.uri).get_registered_model(name).tags
    assert len(tags) == 2 and all(len(value) < 5000 for value in tags.values())


CUTS = ["set_registered_model_alias", "set_model_version_tag", "transition_model_version_stage",
        "delete_registered_model_alias"]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_a_promotion_that_is_cut_off_is_repaired(store, name, cut, monkeypatch):
    promote(store, name, 1)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, cut, die)
        with pytest.raises(KeyboardInterrupt):
            promote(store, name, 3)
    carried_out = cut != "set_registered_model_alias"
    assert promotion.history(store, name)[-1].done is None
    mended = promotion.repair(store, name)
    assert f"that was cut off was {'' if carried_out else 'not '}carried out" in mended[-1]
    it, former = ("production", "Production", ["production"]), ("non-production", "Archived", [])
    alias, found = seen(store, name)
    assert alias == (3 if carried_out else 1)
    assert found[alias] == it
    assert found[1] == (former if carried_out else it)
    assert promotion.history(store, name)[-1].done is carried_out
    assert promotion.repair(store, name) == []


def test_whoever_asks_for_the_stage_finds_a_version_all_the_while(store, name, monkeypatch):
    promote(store, name, 1)
    promote(store, name, 3)
    move, in_stage = mlflow.MlflowClient.transition_model_version_stage, []

    def watched(client, *words, **more):
        found = move(client, *words, **more)
        in_stage.append([version for version, (_, stage, _) in seen(store, name)[1].items() if stage == "Production"])
        return found

    monkeypatch.setattr(mlflow.MlflowClient, "transition_model_version_stage", watched)
    promotion.set_production(store, name, 1, 3, action="rollback", who="ada@desk", why="")
    assert in_stage == [[1, 3], [1]]


def test_an_alias_that_somebody_moved_by_hand_is_the_truth(store, name):
    promote(store, name, 1)
    client = mlflow.MlflowClient(store.uri, store.uri)
    client.set_registered_model_alias(name, "production", "2")
    assert promotion.repair(store, name)
    assert seen(store, name)[1][2] == ("production", "Production", ["production"])
    promote(store, name, 3)
    events = promotion.history(store, name)
    assert [event.former for event in events] == [None, 2]
    assert promotion.previous_versions(events, 3) == [1, 2]


def test_a_stage_that_was_set_before_there_was_an_alias_stays(store, name):
    client = mlflow.MlflowClient(store.uri, store.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage(name, "2", "Production")
    assert promotion.repair(store, name) == []
    assert seen(store, name)[1][2] == ("non-production", "Production", [])
    promote(store, name, 1)
    assert seen(store, name)[1][2] == ("non-production", "Archived", [])


def test_who_looked_at_another_production_version_has_to_look_again(store, name):
    promote(store, name, 1)
    with pytest.raises(PipelineError, match="Version 1 is production by now: look again"):
        promotion.set_production(store, name, 3, None, action="promote", who="bob@desk", why="")
    assert promotion.current(store, name) == 1
    assert len(promotion.history(store, name)) == 1


def test_a_model_that_is_not_there_is_said(store):
    with pytest.raises(PipelineError, match="There is no model nobody in the registry"):
        promotion.current(store, "nobody")
    assert versions.entries(store, "nobody") == []
    assert versions.production(store, "nobody") is None


def test_a_history_that_was_edited_is_said(store, name):
    mlflow.MlflowClient(store.uri, store.uri).set_registered_model_tag(name, "dgmd.event.1", "{}")
    with pytest.raises(PipelineError, match=r"dgmd.event.1 .* correct or delete it"):
        promotion.history(store, name)


def event(action, former, version, done=True):
    return Event("", "", action, former, version, "", [], False, done)


@pytest.mark.parametrize(
    ("events", "now", "expected"),
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
def test_a_rollback_leads_back_by_the_history(events, now, expected):
    assert promotion.previous_versions(events, now) == expected
