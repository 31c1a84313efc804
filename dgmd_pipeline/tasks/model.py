"""The steps that train, evaluate and register a model."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import percent
from dgmd_pipeline.tasks import attempts, lookup, names, resources
from dgmd_pipeline.tasks.data import (
    SOURCE,
    BalanceClasses,
    DownloadImages,
    InspectImages,
    MapLabels,
    SplitImages,
    WriteTFRecords,
)
from dgmd_pipeline.tasks.resources import Resources
from dgmd_pipeline.tasks.training_inputs import ExtractFeatures, training_inputs
from dgmd_pipeline.workflow import disk, folders, signals, timing
from dgmd_pipeline.workflow.planning import StepPlan, upstream_steps
from dgmd_pipeline.workflow.step import Step, StepResult, UpstreamChange
from dgmd_pipeline.workflow.success_file import Json, StepRecord, read_record

if TYPE_CHECKING:
    import keras

    from dgmd_pipeline.evaluation.evaluate import EvaluationData
    from dgmd_pipeline.evaluation.summary import Summary
    from dgmd_pipeline.registry.live_run import LiveRun
    from dgmd_pipeline.registry.logged_run import Candidate
    from dgmd_pipeline.registry.registration import RegisteredVersion
    from dgmd_pipeline.registry.store import Store
    from dgmd_pipeline.training.config import Epoch
    from dgmd_pipeline.training.train import TrainingData

log = logging.getLogger(__name__)
# Metric in MLflow -> key in the record of `balanced`. Under this key, the record has a number of images for each label.
# The metric is the sum of these numbers.
BALANCED_COUNTS = {"images_inspected": "before", "images_balanced": "after"}
FINE_TUNING = ("fine_tune", "fine_tune_epochs", "fine_tune_learning_rate")  # settings


class TrainModel(Step):
    """Features or records -> a trained model. Every training gets a new id, even if nothing has changed."""

    name, verb, format_version = names.TRAINED_MODEL, "train", 2
    resumable = True
    params = (
        *("backbone", "head", "batch_size", "epochs", "learning_rate", "decay_rate", "patience", "optimizer"),
        *("dropout", "weight_decay", "augmentation", "class_weights", "seed", *FINE_TUNING),
    )
    runtime_params = (
        *("backbone_weights", "keras_home", "image_width", "image_height", "image_fit", "data_dir"),
        *("model_name", "mlflow_experiment_name", "mlflow_tracking_uri"),  # they locate the MLflow run of the training
    )

    def requires(self) -> dict[str, Step]:
        records = (
            {f"records_{split}": WriteTFRecords(split=split) for split in names.SPLITS} if self._fine_tunes() else {}
        )
        needed = {"label_map": MapLabels(), "balanced": BalanceClasses(), "split": SplitImages()}
        return {**training_inputs(self.settings.backbone), **needed, **records}

    def _fine_tunes(self) -> bool:
        from dgmd_pipeline.training import backbones

        return self.settings.fine_tune != "none" and backbones.is_frozen(self.settings.backbone)

    def declared_settings(self) -> Json:
        """Return the settings that this kind of training uses."""
        from dgmd_pipeline.training import backbones

        # A frozen backbone has no use for augmentation, because its features are computed from unchanged images. `cnn`
        # has no choice of head.
        unused = {"augmentation" if backbones.is_frozen(self.settings.backbone) else "head"}
        if not self._fine_tunes():
            unused |= set(FINE_TUNING)
        return {name: value for name, value in super().declared_settings().items() if name not in unused}

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.training import train
        from dgmd_pipeline.workflow.executors import in_threads

        backbone = self._backbone()
        data, options = self._data(), train.TrainingOptions.from_settings(self.settings)
        epochs: list[Epoch] = []  # of this run only; a stopped run may have completed earlier epochs
        name = _run_name(self.settings.model_name, formatting.utc_now())
        with signals.deferred():
            shown = attempts.begin(self.settings, draft / folders.RESUME, name)
        ended = partial(self._epoch_ended, epochs, shown)
        trained = train.train(data, options, backbone, draft / folders.RESUME, ended, in_threads)
        disk.check_space(draft, self.folder, trained.estimated_bytes)
        train.write(trained, draft)
        self.context.shared(Resources).trained = trained.id, trained.model
        processed = len(data.groups) * len(epochs)
        return StepResult(counts=trained.counts, images_processed=processed, summary=trained.summary)

    def _backbone(self) -> "Callable[[], keras.Model] | None":
        """Return a function that waits for the frozen network and returns it; None for `cnn`.

        Also start the process of the serving benchmark: for `cnn` at once, otherwise when the function is called. The
        training calls it after the cross-validation of logistic regressions, which uses all cores. The rest of the
        training mostly uses one core, so the serving benchmark's process has a core of its own.
        """
        network = resources.network(self.context)
        if network is None:
            resources.start_serving_early(self.context)
            return None

        def wait() -> "keras.Model":
            resources.start_serving_early(self.context)
            return network()

        return wait

    def _data(self) -> "TrainingData":
        """Collect the data for the training, and check the records that the training reads."""
        from dgmd_pipeline.data import labels, shards
        from dgmd_pipeline.training.train import TrainingData

        paths: dict[str, Path] = {name: target.path for name, target in self.input().items()}
        folders_of_records = [task.path for task in self.deps() if isinstance(task, WriteTFRecords)]
        for folder in folders_of_records:
            shards.check(folder)
        rows = shards.record_order(manifest.read(paths["split"] / "training.csv", manifest.Example))
        weights = manifest.read_json(paths["balanced"] / "class_weights.json") if self.settings.class_weights else {}
        return TrainingData(
            training=paths["training"],
            validation=paths["validation"],
            groups=[row.group for row in rows],
            classes=len(labels.read_mapping(paths["label_map"] / "mapping.json")),
            class_weights={int(index): weight for index, weight in weights.items()},
            records=folders_of_records,
        )

    def _epoch_ended(self, epochs: "list[Epoch]", shown: "LiveRun | None", row: "Epoch") -> None:
        if shown:
            with signals.deferred():
                shown.log_epoch(row.epoch + 1, _metrics(row))
        self.context.check_stopped()
        epochs.append(row)
        text = f"epoch {row.epoch + 1}: loss {row.loss:.4f}, validation accuracy {percent(row.val_accuracy)}"
        self.report(min(99, 100 * len(epochs) // self.settings.epochs), text)

    def describe_draft(self, kept: Path) -> str:
        from dgmd_pipeline.training import train

        return train.describe_checkpoints(kept)

    def expected_fingerprint(self, inputs: Mapping[str, str]) -> str | None:
        return "a training like no other"  # equals no fingerprint, so the plan says that later steps will run

    def fingerprint_of(self, folder: Path, inputs: Mapping[str, str]) -> str:
        """Return the training's own id."""
        return manifest.read_json(folder / "training.json")["id"]


class EvaluateModel(Step):
    """A model and the validation split -> metrics, a comparison with production, and a serving benchmark."""

    name, verb, format_version = names.EVALUATION, "evaluate", 3
    params = ("model_name", "mlflow_tracking_uri")  # they locate the production version for the comparison
    runtime_params = (
        *("backbone", "data_dir", *SOURCE, "max_class_drop", "max_latency_ratio", "allow_lost_labels"),
        "mlflow_experiment_name",  # the experiment has the figures of the registered versions, for the report
    )

    def requires(self) -> dict[str, Step]:
        records = WriteTFRecords(split="validation")
        needed = {"records": records, "split": SplitImages(), "label_map": MapLabels()}
        return {"trained": TrainModel(), **training_inputs(self.settings.backbone), **needed}

    def input_images(self, upstream: Sequence[StepPlan]) -> int | None:
        return upstream[2].images

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.evaluation import evaluate

        production = partial(lookup.production, self.settings)
        network = resources.trained_model(self.context, self.input()["trained"].path)
        limits = lookup.promotion_limits(self.settings)
        with resources.serving_process(self.context) as process:
            counts = evaluate.evaluate(self._data(), network, production, limits, process, draft)
        images, accuracy, f1 = int(counts["images"]), percent(counts["accuracy"]), percent(counts["f1"])
        summary = f"accuracy {accuracy}, F1 {f1} on {images:,} validation images"
        return StepResult(counts=counts, images=images, summary=summary)

    def _data(self) -> "EvaluationData":
        """Collect the data for the evaluation and for the report."""
        from dgmd_pipeline.data import labels
        from dgmd_pipeline.evaluation.evaluate import EvaluationData

        paths: dict[str, Path] = {step.folder: step.path for step in upstream_steps(self)[:-1]}
        records = {name: record for name, path in paths.items() if (record := read_record(path))}
        features = [task.path for task in self.deps() if isinstance(task, ExtractFeatures)]
        inputs = self.input()
        return EvaluationData(
            model_name=self.settings.model_name,
            labels=labels.read_mapping(inputs["label_map"].path / "mapping.json"),
            trained_model=inputs["trained"].path,
            features=features or None,
            records=inputs["records"].path,
            split=inputs["split"].path,
            raw=paths[names.RAW],
            rejected=paths[names.INSPECTED] / manifest.REJECTED,
            balanced=records[names.BALANCED].counts,
            source=_source_uri(self.settings, paths[names.RAW]),
            settings=_recorded_settings(records),
            seconds=[(name, record.seconds) for name, record in records.items()],
            versions=lookup.versions_so_far(self.settings, str(inputs["trained"].fingerprint())),
        )


class RegisterModel(Step):
    """A training and its evaluation -> an MLflow run and a registered, non-production version. The last task."""

    name, verb = names.REGISTERED_MODEL, "register"
    params = ("model_name", "mlflow_experiment_name", "mlflow_tracking_uri")
    runtime_params = ("data_dir", *SOURCE, "backbone_weights", "git_revision")

    def requires(self) -> dict[str, Step]:
        return {
            "raw": DownloadImages(),
            "inspected": InspectImages(),
            "label_map": MapLabels(),
            "balanced": BalanceClasses(),
            "split": SplitImages(),
            "trained": TrainModel(),
            "evaluation": EvaluateModel(),
        }

    def input_images(self, upstream: Sequence[StepPlan]) -> int | None:
        return None

    def check_upstream(self, record: StepRecord | None) -> UpstreamChange | None:
        if not self.settings.mlflow_tracking_uri and not (self.settings.data_dir / names.STORE).exists():
            return UpstreamChange(f"{names.STORE}/ is missing")
        missing = record and lookup.missing_version(self.settings, record)
        return UpstreamChange(missing) if missing else None

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.registry import registration

        start = time.monotonic()
        paths: dict[str, Path] = {name: target.path for name, target in self.input().items()}
        place = self._store(draft, folders.folder_bytes(paths["trained"]) + folders.folder_bytes(paths["evaluation"]))
        experiment = self.settings.mlflow_experiment_name or self.settings.model_name
        version = registration.register(place, experiment, self.settings.model_name, self._candidate(paths))
        attempts.registered(self.settings.data_dir)
        self._finish_run(place, version, start)
        manifest.write_json(draft / "version.json", version._asdict())
        state = f"non-production{self._replaced()}" if version.new else "already registered"
        return StepResult(
            counts={"name": version.name, "version": version.version, "run": version.run_id, "new": version.new},
            summary=f"{version.name} version {version.version}, {state}",
        )

    def _replaced(self) -> str:
        """Return a text if this training was registered before and its version has been deleted; otherwise ""."""
        before = read_record(self.path)
        training = self.input()["trained"].fingerprint()
        if before and before.settings == self.declared_settings() and before.inputs[names.TRAINED_MODEL] == training:
            return f", in place of version {before.counts['version']}, which is no longer in the registry"
        return ""

    def _finish_run(self, place: "Store", version: "RegisteredVersion", start: float) -> None:
        """Log the duration of the registration. On the page of a Luigi scheduler, show a link to the MLflow run."""
        from dgmd_pipeline.registry import registration

        try:
            if version.new:
                registration.add_metrics(place, version, {timing.SECONDS + self.folder: time.monotonic() - start})
            if tell := self.set_tracking_url:  # None, unless Luigi's worker runs the task
                tell(registration.run_url(place, version))
        except PipelineError as error:  # the version is registered, so the step must not fail
            log.warning("The duration of the registration could not be logged in MLflow: %s", error)

    def _store(self, draft: Path, needed: int) -> "Store":
        """Return the MLflow store in the settings, or else the embedded store. Create a missing embedded store."""
        from dgmd_pipeline.registry import store as registry_store

        if not self.settings.mlflow_tracking_uri:
            disk.check_space(draft, "the MLflow store", needed + registry_store.EMBEDDED_BYTES)
            folder = self.settings.data_dir / names.STORE
            if not folder.exists():  # a draft is used, so an interrupted creation leaves no incomplete database
                with folders.draft(folder) as new:
                    registry_store.create(new)
        found = lookup.store(self.settings)
        assert found is not None  # noqa: S101 - the settings name a store, or the embedded store exists by now
        registry_store.move_artifacts(found)
        return found

    def _candidate(self, paths: Mapping[str, Path]) -> "Candidate":
        """Collect, from the folders of the earlier steps, everything that is registered."""
        from dgmd_pipeline.data import labels
        from dgmd_pipeline.evaluation import evaluate, summary
        from dgmd_pipeline.registry import logged_run, registration
        from dgmd_pipeline.training import train

        about, history = train.read(paths["trained"])
        records = {step.folder: found for step in upstream_steps(self)[:-1] if (found := read_record(step.path))}
        mine = self.declared_settings() | {"backbone_weights": self.settings.backbone_weights, "seed": about["seed"]}
        mapping = labels.read_mapping(paths["label_map"] / "mapping.json")
        split, balanced = records[names.SPLIT].counts, records[names.BALANCED].counts
        data = {f"images_{name}": split[name] for name in names.SPLITS} | {"labels": len(mapping)}
        data |= {metric: sum(balanced[key].values()) for metric, key in BALANCED_COUNTS.items()}
        data["images_rejected"] = sum(records[names.INSPECTED].counts["rejected"].values())
        return logged_run.Candidate(
            training_id=about["id"],
            run_name=_run_name(self.settings.model_name, records[names.TRAINED_MODEL].started),
            describe=partial(_description, summary.from_counts(records[names.EVALUATION].counts)),
            model=partial(resources.model_file, paths["trained"]),
            labels=mapping,
            params=_recorded_settings(records, mine),
            history=[_metrics(row) for row in history],
            metrics=evaluate.metrics_of(paths["evaluation"]),
            of_run=timing.metrics(records.values()) | {lookup.OF_DATA + name: value for name, value in data.items()},
            tags=evaluate.tags_of(paths["evaluation"]) | registration.code_tags(self.settings.git_revision),
            attempt=attempts.current(self.settings.data_dir),
            source=_source_uri(self.settings, paths["raw"]),
            source_digest=str(self.input()["raw"].fingerprint()),
            files={
                paths["label_map"] / "mapping.json": "",
                paths["evaluation"]: "evaluation",
                paths["split"] / "training.csv": "split",
                paths["split"] / "validation.csv": "split",
                paths["inspected"] / manifest.REJECTED: "inspected",
                paths["balanced"] / "class_weights.json": "balanced",
            },
        )


def _recorded_settings(records: Mapping[str, StepRecord], others: Json | None = None) -> Json:
    """Return a dictionary: environment variable -> value, for the settings in `records` and for `others`."""
    found = [record.settings for record in records.values()] + [others or {}]
    return {name.upper(): value for each in found for name, value in each.items()}


def _metrics(row: "Epoch") -> dict[str, float]:
    return {name: value for name, value in row._asdict().items() if name != "epoch"}


def _run_name(model: str, started: str) -> str:
    """Return the name of an MLflow run: "dgmd_model 2026-11-26 03:00". `started` is ISO 8601."""
    return f"{model} {datetime.fromisoformat(started).astimezone():%Y-%m-%d %H:%M}"


def _description(found: "Summary", version: int, report: str) -> str:
    """Return the Markdown description of a version."""
    from dgmd_pipeline.evaluation import summary

    return "\n\n".join(summary.sentences(found, report, version))


def _source_uri(settings: Any, raw: Path) -> str:
    """Return where the images came from, as a URI."""
    by_hand = read_record(raw) is None
    return raw.resolve().as_uri() if by_hand else f"s3://{settings.aws_data_bucket}/{settings.aws_data_path}"
