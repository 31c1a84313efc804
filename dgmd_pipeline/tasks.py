"""The graph, to be read from top to bottom. A task wires: it reads what came before, calls a function or a few, writes.

The only file that names step folders. What needs TensorFlow, MLflow, Pillow or boto3 is imported in `work`, so that a
run with nothing to do starts without them.
"""

import json
import logging
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import luigi

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.data import corrections
from dgmd_pipeline.errors import NoUsableInput, PipelineError
from dgmd_pipeline.workflow import disk, folders, timing
from dgmd_pipeline.workflow.planning import StepPlan, upstream_steps
from dgmd_pipeline.workflow.progress import progress
from dgmd_pipeline.workflow.provenance import StepRecord, digest, read_record
from dgmd_pipeline.workflow.step import Job, Step, UpstreamChange, reasons

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.review import CandidateModel, Review

log = logging.getLogger(__name__)
SIDES = ("training", "validation")
SOURCE = ("aws_data_bucket", "aws_data_path")  # settings: where the pictures come from
LISTING = "listing.csv"  # in raw/: the objects that it holds
STORE = "mlflow"  # the folder of the embedded store
FINE_TUNING = ("fine_tune", "fine_tune_epochs", "fine_tune_learning_rate")  # settings
ASSESSED = ("load_seconds", "latency_p50_ms", "latency_p95_ms", "images_per_second", "bytes", "peak_memory_bytes",
    "parameters")  # fmt: skip  # tags of a version
MOST_NAMED = 10  # in a warning


class DownloadImages(Step):
    """An object in the bucket -> a file under `raw/`."""

    name = "raw"
    verb = "download"
    uses = SOURCE
    reads = ("refresh",)
    data_is_welcome = True
    resumes = True
    _fetched: Sequence[manifest.SourceObject] = ()  # by this run; the others were there

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.s3 import client as s3_client
        from dgmd_pipeline.s3 import download, sync
        from dgmd_pipeline.s3 import listing as s3_listing

        client = s3_client.connect()
        name, prefix = self.settings.aws_data_bucket, self.settings.aws_data_path
        self._check_for_strangers()
        objects, rejected = self.job.listing or s3_listing.list_objects(client, name, prefix)
        self.job.listing = None
        if not objects:
            raise self._nothing_usable(rejected)
        with disk.disk_errors_explained(self.path.parent, self.folder, _on_disk(objects)):
            notes = draft / folders.RESUME / LISTING
            arrived, missing = sync.reuse(objects, draft, notes, self.path, self._known())
            if arrived:
                log.info("  %s of %s objects are there already", f"{len(arrived):,}", f"{len(objects):,}")
            disk.check_space(draft, self.folder, _on_disk(missing))
            kept = len(arrived)
            with closing(download.download(client, name, missing, draft)) as items:
                for item in progress(items, "download", len(missing), "objects", size=_size):
                    if isinstance(item, manifest.SourceObject):
                        arrived.append(item)
                    else:
                        rejected.append(item)
        self._fetched = arrived[kept:]
        if not arrived:
            raise self._nothing_usable(rejected)
        manifest.write(draft / LISTING, manifest.SourceObject, sorted(arrived, key=lambda item: item.path))
        manifest.write(draft / "rejected.csv", manifest.Rejected, sorted(rejected))
        _warn_of_rejected(rejected, "objects", self.path)
        return {"objects": len(arrived), "bytes": sum(item.size for item in arrived), "left out": len(rejected)}

    def _nothing_usable(self, rejected: list[manifest.Rejected]) -> NoUsableInput:
        name, prefix = self.settings.aws_data_bucket, self.settings.aws_data_path
        return NoUsableInput(
            f"None of the {len(rejected):,} objects in s3://{name}/{prefix} can be used; the first one is "
            f"{rejected[0].path}: {rejected[0].detail}. Upload pictures as {prefix}/<label>/<file>."
        )

    def _check_for_strangers(self) -> None:
        """Refuse to replace a folder that somebody has put pictures of their own into."""
        from dgmd_pipeline.s3 import sync

        if read_record(self.path) is None:
            return
        found = sync.untracked_files(self.path, manifest.read(self.path / LISTING, manifest.SourceObject))
        if found:
            raise NoUsableInput(
                f"{self.path} holds {len(found):,} files that were not downloaded and would be lost, the first one is "
                f"{found[0]}. Upload them to the bucket or move them away, and run again."
            )

    def _known(self) -> Iterator[manifest.SourceObject]:
        """Yield what the folder holds of the same bucket and prefix, if it is to be brought up to date."""
        record = read_record(self.path)
        if self.settings.refresh and record and not reasons(self, record, {}):
            yield from manifest.read(self.path / LISTING, manifest.SourceObject)

    def news(self, record: StepRecord | None) -> UpstreamChange | None:
        """List the bucket, if that is wanted, and compare."""
        from dgmd_pipeline.s3 import client as s3_client
        from dgmd_pipeline.s3 import listing as s3_listing
        from dgmd_pipeline.s3 import sync

        if record is None and (self.settings.refresh or self.name in self.job.forced):
            raise NoUsableInput(
                f"{self.path} was put there by hand or by an older version: it cannot be brought up to date from the "
                "bucket. Delete it (or move it away) to download, or unset REFRESH and leave --force download out."
            )
        if record is None or not self.settings.refresh:
            return None
        path = folders.current_path(self.path)
        known = list(manifest.read(path / LISTING, manifest.SourceObject))
        left_out = {row.path for row in manifest.read(path / "rejected.csv", manifest.Rejected)}
        name, prefix = self.settings.aws_data_bucket, self.settings.aws_data_path
        objects, rejected = s3_listing.list_objects(s3_client.connect(), name, prefix)
        usable = [item for item in objects if item.key not in left_out]
        words = [f"{count:,} {word}" for word, count in sync.changes(known, usable)._asdict().items() if count]
        identity = sync.fingerprint(usable) if words else None
        for count, word in (
            (len(objects) - len(usable), "left out before"),  # archived ones may have been restored
            (sync.missing_files(path, known), "lost in the folder"),
        ):
            if count:
                words.append(f"{count:,} {word}")
        if not words:
            return None
        self.job.listing = objects, rejected
        return UpstreamChange(", ".join(words), identity, len(objects), sum(item.size for item in objects))

    def images(self, counts: dict[str, Any]) -> int | None:
        return counts["objects"]

    def worked(self, counts: dict[str, Any]) -> int | None:
        return len(self._fetched)

    def volume(self, counts: dict[str, Any]) -> int | None:
        return sum(item.size for item in self._fetched)

    def summary(self, counts: dict[str, Any]) -> str:
        left_out = f", {counts['left out']:,} left out" if counts["left out"] else ""
        return f"{counts['objects']:,} objects, {formatting.format_bytes(counts['bytes'])}{left_out}"

    def expected(self, _: dict[str, str]) -> str | None:
        return None

    def identify(self, folder: Path, _: dict[str, str]) -> str:
        """Return the listing's identity."""
        from dgmd_pipeline.s3 import sync

        return sync.fingerprint(manifest.read(folder / LISTING, manifest.SourceObject))


def _on_disk(objects: list[manifest.SourceObject]) -> int:
    return sum(disk.allocated_bytes(item.size) for item in objects)


def _size(item: manifest.SourceObject | manifest.Rejected) -> int:
    return item.size if isinstance(item, manifest.SourceObject) else 0


def _warn_of_rejected(rejected: list[manifest.Rejected], what: str, folder: Path) -> None:
    reasons = Counter(row.reason for row in rejected)
    if reasons:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        log.warning("%s left out: %s; see %s", what, listed, folder / "rejected.csv")


def _warn_of_corrections(found: corrections.Corrected) -> None:
    for names, what in (
        (found.unknown, f"keys in {corrections.NAME} for which there is no file below raw/"),
        (found.new, f"labels that only {corrections.NAME} has; check their spelling"),
    ):
        if names:
            more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            log.warning("%s: %s%s", what, ", ".join(map(repr, names[:MOST_NAMED])), more)


class InspectImages(Step):
    """A file under `raw/` -> a row in `images.csv`, or in `rejected.csv` with the reason."""

    name = "inspected"
    verb = "inspect"
    format = 2

    def requires(self) -> Step:
        return DownloadImages(job=self.job)

    @cached_property
    def _corrections(self) -> dict[str, str]:
        """The operator's corrections. They are read once in a run, so that what is recorded is what was applied."""
        return corrections.read(self.path.with_name(corrections.NAME))

    def others(self) -> dict[str, str]:
        return {corrections.NAME: digest(self._corrections)} if self._corrections else {}

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import inspection

        raw: Step = self.requires()
        files = list(_raw_files(raw.path))
        if not files:
            raise NoUsableInput(
                f"{raw.path} holds no label folders with pictures: put them there as <label>/<file>, or delete the "
                "folder to have it downloaded."
            )
        corrected = corrections.apply(files, self._corrections)
        _warn_of_corrections(corrected)
        usable, rejected = inspection.inspect(
            corrected.files,
            raw.path,
            draft,
            lambda function, pieces: progress(
                self.job.pool.map(function, pieces), "inspect", len(corrected.files), "images", count=len
            ),
        )
        usable, copies = corrections.without_copies(usable, corrected.excluded, raw.path)
        rejected = sorted(rejected + corrected.excluded + copies)
        manifest.write(draft / "images.csv", manifest.Image, usable)
        manifest.write(draft / "rejected.csv", manifest.Rejected, [*_left_out_before(raw.path), *rejected])
        _warn_of_rejected(rejected, "files", self.path)
        groups = Counter(row.group for row in usable)
        alike = sum(count for count in groups.values() if count > 1)
        return {
            "files": len(files),
            "images": len(usable),
            "rejected": dict(Counter(row.reason for row in rejected)),
            "near-duplicates": alike,
            "relabelled": corrected.relabelled,
        }

    def worked(self, counts: dict[str, Any]) -> int | None:
        return counts["files"] - counts["rejected"].get(manifest.EXCLUDED, 0)

    def volume(self, counts: dict[str, Any]) -> int | None:
        raw: Step = self.requires()
        record = read_record(raw.path)
        # What was put there by hand has no record; planning has walked it.
        return record.counts.get("bytes") if record else self.job.outlooks[raw.folder].bytes

    def summary(self, counts: dict[str, Any]) -> str:
        left_out = sum(counts["rejected"].values())
        alike = f", {counts['near-duplicates']:,} of them near-duplicates" if counts["near-duplicates"] else ""
        corrected = [(counts["relabelled"], "relabelled"), (counts["rejected"].get(manifest.EXCLUDED, 0), "excluded")]
        listed = ", ".join(f"{count:,} {word}" for count, word in corrected if count)
        by_operator = f"; {corrections.NAME}: {listed}" if listed else ""
        return f"{counts['files']:,} files -> {counts['images']:,} images{alike}; {left_out:,} left out{by_operator}"


def _raw_files(raw: Path) -> Iterator[manifest.RawFile]:
    """Yield what was downloaded; of a folder put there by hand what is found in it."""
    from dgmd_pipeline.data import inspection

    if read_record(raw) is None:
        yield from inspection.find(raw)
        return
    for source in manifest.read(raw / LISTING, manifest.SourceObject):
        yield manifest.RawFile(source.path, source.path.split("/", 1)[0])


def _left_out_before(raw: Path) -> Iterator[manifest.Rejected]:
    """Yield the objects that were not downloaded; of a folder put there by hand the files that have no label."""
    if read_record(raw) is not None:
        yield from manifest.read(raw / "rejected.csv", manifest.Rejected)
        return
    for path in sorted(raw.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield manifest.Rejected(path.name, "", "no label", "it lies directly in raw/, in no label's folder")


class MapLabels(Step):
    """A row -> its label's class index. The map is append-only within one bucket and prefix."""

    name = "label_map"
    verb = "label"
    uses = (*SOURCE, "max_rejected_pcnt", "min_images_per_label")

    def requires(self) -> Step:
        return InspectImages(job=self.job)

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import inspection, labels

        inspected: Step = self.requires()
        usable = list(manifest.read(inspected.path / "images.csv", manifest.Image))
        report = inspected.path / "rejected.csv"
        rejected = manifest.read(report, manifest.Rejected)
        inspection.check_rejected(usable, rejected, self.settings.max_rejected_pcnt, report)
        rows = labels.assign(usable, self._known(), self.settings.min_images_per_label)
        names = [row.label for row in rows if row.class_index >= 0]
        labels.write_mapping(draft / "mapping.json", names)
        manifest.write(draft / "labels.csv", labels.LabelRow, rows)
        for state, meaning in (
            ("too few", f"fewer than {self.settings.min_images_per_label} usable images, left out"),
            ("gone", "no images any more, kept as an output"),
        ):
            if found := [row.label for row in rows if row.state == state]:
                log.warning("labels with %s: %s", meaning, ", ".join(found))
        for group in labels.confusable_labels(row.label for row in rows if row.state == "used"):
            log.warning("labels that look alike: %s; are they the same?", ", ".join(map(repr, group)))
        return {"labels": sum(row.state == "used" for row in rows), "outputs": len(names)}

    def worked(self, counts: dict[str, Any]) -> int | None:
        inspected = read_record(self.requires().path)
        return inspected.images if inspected else None

    def declared(self) -> dict[str, Any]:
        """Return the settings; a `raw/` that was put there by hand comes from no bucket."""
        declared, raw = super().declared(), DownloadImages(job=self.job).path
        by_hand = raw.exists() and read_record(raw) is None
        return {name: value for name, value in declared.items() if not (by_hand and name in SOURCE)}

    def _known(self) -> list[str]:
        from dgmd_pipeline.data import labels

        record, mapping = read_record(self.path), self.path / "mapping.json"
        now = self.declared()
        if not mapping.exists() or (record and any(record.settings.get(name) != now.get(name) for name in SOURCE)):
            return []
        return labels.read_mapping(mapping)

    def expected(self, _: dict[str, str]) -> str | None:
        return None

    def identify(self, folder: Path, _: dict[str, str]) -> str:
        """Return the identity of the content: which label has which index, and which ones are used."""
        from dgmd_pipeline.data.labels import LabelRow

        rows = manifest.read(folder / "labels.csv", LabelRow)
        return digest([[row.label, row.class_index, row.state == "used"] for row in rows if row.class_index >= 0])


class BalanceClasses(Step):
    """A row -> fewer rows, and class weights for the imbalance that remains."""

    name = "balanced"
    verb = "balance"
    format = 2
    uses = ("balance_limit",)

    def requires(self) -> list[Step]:
        return [InspectImages(job=self.job), MapLabels(job=self.job)]

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import balance, labels

        inspected, label_map = self.requires()
        rows = manifest.read(label_map.path / "labels.csv", labels.LabelRow)
        used = {row.label: row.class_index for row in rows if row.state == "used"}
        before = [row for row in manifest.read(inspected.path / "images.csv", manifest.Image) if row.label in used]
        after = balance.balance(before, used, self.settings.balance_limit)
        manifest.write(draft / "images.csv", manifest.Example, after)
        weights = balance.class_weights(after)
        (draft / "class_weights.json").write_text(json.dumps(weights, indent=1) + "\n", "utf-8")
        counts = Counter(row.label for row in after)
        return {
            "before": dict(sorted(Counter(row.label for row in before).items())),
            "after": dict(sorted(counts.items())),
            "largest weight": round(max(weights.values()), 3),
        }

    def images(self, counts: dict[str, Any]) -> int | None:
        return sum(counts["after"].values())

    def worked(self, counts: dict[str, Any]) -> int | None:
        return sum(counts["before"].values())

    def summary(self, counts: dict[str, Any]) -> str:
        before, after = counts["before"], counts["after"]
        cut = [f"'{label}' {before[label]:,} -> {after[label]:,}" for label in before if after[label] < before[label]]
        cut = cut[:5] + ([f"{len(cut) - 5} more"] if len(cut) > 5 else [])
        sizes = f"classes of {min(after.values()):,} to {max(after.values()):,}"
        return (
            f"{sum(before.values()):,} -> {sum(after.values()):,} images in {sizes}"
            + (f"; cut down: {', '.join(cut)}" if cut else "")
            + f"; largest class weight {counts['largest weight']:.2f}"
        )


class SplitImages(Step):
    """A row -> a row on one side."""

    name = "split"
    verb = "split"
    uses = ("validation_pcnt",)

    def requires(self) -> Step:
        return BalanceClasses(job=self.job)

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data.split import split

        rows = manifest.read(self.requires().path / "images.csv", manifest.Example)
        sides = split(rows, self.settings.validation_pcnt)
        manifest.write(draft / "training.csv", manifest.Example, sides.training)
        manifest.write(draft / "validation.csv", manifest.Example, sides.validation)
        if not sides.validation:
            raise NoUsableInput(
                "No label has images that can be kept for validation: each is a single group of near-duplicates. "
                "Add pictures that differ."
            )
        if sides.unvalidated:
            log.warning("labels without validation images (near-duplicates only): %s", ", ".join(sides.unvalidated))
        return {"training": len(sides.training), "validation": len(sides.validation), "across labels": sides.across}

    def images(self, counts: dict[str, Any]) -> int | None:
        return counts["training"] + counts["validation"]

    def summary(self, counts: dict[str, Any]) -> str:
        across = counts["across labels"]
        return f"{counts['training']:,} training, {counts['validation']:,} validation" + (
            f"; near-duplicate groups across labels, all in training: {across:,}" if across else ""
        )


class OneSide(Step):
    """A step that is done for each side of the split, in a folder of its own."""

    side: str = luigi.Parameter()

    @property
    def folder(self) -> str:
        return f"{self.name}_{self.side}"


class WriteTFRecords(OneSide):
    """A row with a side -> a record in one of the side's shards."""

    name = "tfrecord"
    verb = "convert"
    format = 3
    priority = 1  # Luigi's: both sides before the first features, for which the network is still being built
    uses = ("num_shards", "image_width", "image_height", "image_fit")

    def requires(self) -> list[Step]:
        return [SplitImages(job=self.job), InspectImages(job=self.job), DownloadImages(job=self.job)]

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import shards

        split, _, raw = self.requires()
        rows = list(manifest.read(split.path / f"{self.side}.csv", manifest.Example))
        counts = shards.write(
            rows,
            raw.path,
            draft,
            self.side,
            self.settings.num_shards,
            self.settings.image_width,
            self.settings.image_height,
            self.settings.image_fit,
            lambda function, pieces: progress(
                self.job.pool.map(function, pieces), self.folder, len(rows), "images", count=int
            ),
        )
        if counts["shards"] < self.settings.num_shards:
            log.warning("%s: %d images make only %d shards", self.folder, len(rows), counts["shards"])
        return counts

    def given(self, before: Sequence[StepPlan]) -> int | None:
        return before[0].counts.get(self.side, before[0].images)

    def needs(self) -> int | None:
        from dgmd_pipeline.data import shards

        split = read_record(self.requires()[0].path)
        size = (self.settings.image_width, self.settings.image_height)
        return shards.estimate_bytes(split.counts[self.side], *size) if split else None

    def volume(self, counts: dict[str, Any]) -> int | None:
        return counts["bytes"]

    def summary(self, counts: dict[str, Any]) -> str:
        return f"{counts['images']:,} images in {counts['shards']:,} shards, {counts['bytes'] / 1e6:,.1f} MB"


class ExtractFeatures(OneSide):
    """A record -> the frozen backbone's feature vector, computed once for all epochs and trainings."""

    name = "features"
    verb = "extract"
    uses = ("backbone", "image_width", "image_height")
    reads = ("backbone_weights", "keras_home")

    def requires(self) -> Step:
        return WriteTFRecords(job=self.job, side=self.side)

    def others(self) -> dict[str, str]:
        from dgmd_pipeline.training import backbones

        return {"weights": backbones.weights_fingerprint(self.settings.backbone_weights)}

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import shards
        from dgmd_pipeline.training import dataset, features
        from dgmd_pipeline.workflow.executors import in_threads

        source = self.requires().path
        shards.check(source)
        network = _network(self)
        dimensions = int(network.output_shape[-1])
        pictures = dataset.read(source)
        count = len(pictures)
        disk.check_space(draft, self.folder, features.estimate_bytes(count, dimensions))
        batches = pictures.batch(features.BATCH).prefetch(2)
        extracted = features.extract(batches, count, network, draft, in_threads)
        for _ in progress(extracted, self.folder, count, "images", count=int):
            pass
        return {"images": count, "dimensions": dimensions}

    def volume(self, counts: dict[str, Any]) -> int | None:
        written = read_record(self.requires().path)
        return written.counts.get("bytes") if written else None


def start_early(job: Job) -> None:
    """Build the frozen network in a thread, if this run will need one, while the steps before it do their work.

    It takes some 10 s of one core: TensorFlow's import, the layers and, where features are extracted, the forward pass.
    """
    states = ("run", "maybe") if job.listing else ("run",)  # news of the bucket: "maybe" is nearly certain
    due = {outlook.step for outlook in job.outlooks.values() if outlook.state in states}
    extracted = due & {f"{ExtractFeatures.name}_{side}" for side in SIDES}
    if extracted or TrainModel.name in due:
        _start_network(job, bool(extracted))


def _start_network(job: Job, extracted: bool) -> None:
    from dgmd_pipeline.training import backbones, networks, runtime
    from dgmd_pipeline.workflow import executors

    settings: Any = job.settings
    if not backbones.is_frozen(settings.backbone):
        return

    def build() -> Any:
        from dgmd_pipeline.training import features

        runtime.start_tensorflow()
        size = (settings.image_height, settings.image_width)
        network = networks.build_backbone(settings.backbone, settings.backbone_weights, *size, settings.keras_home)
        if extracted:
            features.freeze(network)
        return network

    job.network = executors.submit_in_background(build)


def _network(step: Step) -> Any:
    """Return the frozen network of this run; None where the backbone is trained."""
    if step.job.network is None:
        _start_network(step.job, isinstance(step, ExtractFeatures))
    return step.job.network and step.job.network()


class TrainModel(Step):
    """Features or records -> a trained model. Every training is a new one and has an id of its own."""

    name = "trained_model"
    verb = "train"
    resumes = True
    format = 2
    uses = (
        "backbone",
        "head",
        "batch_size",
        "epochs",
        "learning_rate",
        "decay_rate",
        "patience",
        "optimizer",
        "dropout",
        "weight_decay",
        "augmentation",
        "class_weights",
        "seed",
        *FINE_TUNING,
    )
    reads = ("backbone_weights", "keras_home", "image_width", "image_height", "image_fit")
    _epochs = 0  # of this run; one that was stopped may have come to the others

    def requires(self) -> list[Step]:
        job = self.job
        written = [WriteTFRecords(job=job, side=side) for side in SIDES] if self._fine_tunes() else []
        return [*learned_from(self), MapLabels(job=job), BalanceClasses(job=job), SplitImages(job=job), *written]

    def _fine_tunes(self) -> bool:
        from dgmd_pipeline.training import backbones

        return self.settings.fine_tune != "none" and backbones.is_frozen(self.settings.backbone)

    def declared(self) -> dict[str, Any]:
        """Return the settings that this kind of training uses."""
        from dgmd_pipeline.training import backbones

        # Stored features are those of the images as they are; `cnn` has one head.
        unused = {"augmentation" if backbones.is_frozen(self.settings.backbone) else "head"}
        if not self._fine_tunes():
            unused |= set(FINE_TUNING)
        return {name: value for name, value in super().declared().items() if name not in unused}

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import labels, shards
        from dgmd_pipeline.training import config, dataset, features, fine_tuning, from_scratch, head, networks, runtime

        backbone = _network(self)
        runtime.start_tensorflow()
        *sides, label_map, balanced, split = self.requires()[:5]
        classes = len(labels.read_mapping(label_map.path / "mapping.json"))
        weights = _class_weights(balanced.path / "class_weights.json") if self.settings.class_weights else {}
        recipe = config.TrainingConfig(**{name: getattr(self.settings, name) for name in config.TrainingConfig._fields})
        size, fit = (self.settings.image_height, self.settings.image_width), self.settings.image_fit
        if backbone:
            learned, rest = (features.load(side.path) for side in sides)
            rows = shards.record_order(manifest.read(split.path / "training.csv", manifest.Example))
            groups, kind = [row.group for row in rows], self.settings.head
            train: Any = partial(head.train_head, learned, rest, groups, classes, weights, recipe, kind, self._show)
        else:
            for side in sides:
                shards.check(side.path)
            shuffled, ordered = (partial(dataset.read, side.path) for side in sides)
            train = partial(
                from_scratch.train_from_scratch,
                shuffled,
                ordered(),
                size,
                classes,
                weights,
                recipe,
                self._show,
                image_fit=fit,
            )
        trained = self._go_on(train, draft / folders.RESUME)
        history, parts = trained.history, (backbone, trained.model)
        recorded: dict[str, Any] = {"fine_tuned": False}
        if self._fine_tunes():
            tuned = self._fine_tune(backbone, trained, (learned, rest), groups, draft / folders.RESUME)
            recorded = {"fine_tuned": tuned.backbone is not None, "fine_tuning": fine_tuning.about(tuned)}
            log.info("  %s", fine_tuning.sentence(recorded["fine_tuning"]))
            if tuned.backbone:
                parts = tuned.backbone, tuned.head
                history = [*history, *(row._replace(epoch=len(history) + row.epoch) for row in tuned.history)]
        whole = networks.assemble(*parts, fit) if backbone else trained.model
        disk.check_space(draft, self.folder, networks.estimate_bytes(whole))
        whole.save(draft / "model.keras")
        manifest.write(draft / "history.csv", config.Epoch, history)
        last = history[-1]
        about = {"id": uuid.uuid4().hex, "kept": last.epoch, "seed": trained.seed, "metrics": last._asdict()} | recorded
        if trained.selection:
            about["head"] = trained.selection
        (draft / "training.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        self.job.trained = about["id"], whole
        return {
            "epochs": len(history),
            "head": trained.selection["chosen"]["kind"] if trained.selection else None,
            "fine_tuned": recorded["fine_tuned"],
            "accuracy": last.accuracy,
            "val_accuracy": last.val_accuracy,
            "parameters": whole.count_params(),
        }

    def _fine_tune(self, backbone: Any, trained: Any, sides: Sequence[Any], groups: list[str], notes: Path) -> Any:
        """Fine-tune the backbone with its trained head; from the start where the notes cannot be used."""
        from dgmd_pipeline.data import shards
        from dgmd_pipeline.training import checkpoint as training_checkpoint
        from dgmd_pipeline.training import config, dataset, fine_tuning, head
        from dgmd_pipeline.workflow.executors import in_threads

        *_, balanced, _, training_records, validation_records = self.requires()
        weights = _class_weights(balanced.path / "class_weights.json") if self.settings.class_weights else {}
        by_class = config.weights_by_class(trained.model.output_shape[-1], weights)
        recipe = config.TrainingConfig(**{name: getattr(self.settings, name) for name in config.TrainingConfig._fields})
        recipe = recipe._replace(seed=trained.seed)
        for step in (training_records, validation_records):
            shards.check(step.path)
        data, validation = (
            fine_tuning.Split(indexes, partial(dataset.read, step.path))
            for (_, indexes), step in zip(sides, (training_records, validation_records), strict=True)
        )

        def fit_head(rows: Any) -> Any:
            features, indexes = sides[0]
            return head.refit((features[rows], indexes[rows]), trained.selection["chosen"], by_class, recipe)

        low = recipe._replace(
            epochs=self.settings.fine_tune_epochs,
            learning_rate=self.settings.fine_tune_learning_rate,
        )
        tune = partial(
            fine_tuning.fine_tune, self.settings.fine_tune, backbone, trained.model, fit_head, data, validation, groups,
            by_class, low, self._show, notes, in_threads,
        )  # fmt: skip
        try:
            return tune()
        except training_checkpoint.UnusableCheckpoint as error:
            log.warning("%s Fine-tuning starts again.", error)
            for path in notes.glob(f"{fine_tuning.CHECKPOINT}*"):
                path.unlink()
            return tune()

    def _go_on(self, train: Callable[[Path], Any], notes: Path) -> Any:
        """Train, from the checkpoint of a run that was stopped; from the start where it cannot be used."""
        from dgmd_pipeline.training import checkpoint as training_checkpoint

        checkpoint = notes / "training.npz"
        if checkpoint.exists():
            log.info("  Resuming training from the checkpoint")
        try:
            return train(checkpoint)
        except training_checkpoint.UnusableCheckpoint as error:
            log.warning("%s Training starts again.", error)
            for path in notes.iterdir():
                if path.name != folders.FINGERPRINT:
                    disk.remove(path)  # of fine-tuning there are folders
            return train(checkpoint)

    def _show(self, row: Any) -> None:
        self.job.check_stopped()
        self._epochs += 1

    def worked(self, counts: dict[str, Any]) -> int | None:
        learned = read_record(learned_from(self)[0].path)
        return learned.images * self._epochs if learned and learned.images else None

    def summary(self, counts: dict[str, Any]) -> str:
        how = "logistic regression" if counts["head"] == "linear" else f"{counts['epochs']} epochs"
        how += ", fine-tuned" if counts["fine_tuned"] else ""
        return (
            f"{how}: accuracy {counts['accuracy']:.4f}, validation {counts['val_accuracy']:.4f}; "
            f"{counts['parameters']:,} parameters"
        )

    def expected(self, _: dict[str, str]) -> str | None:
        return "a training like no other"

    def identify(self, folder: Path, _: dict[str, str]) -> str:
        """Return the training's own id."""
        return manifest.read_json(folder / "training.json")["id"]


def learned_from(step: Step) -> list[Step]:
    """Return the two tasks, one a side, whose folders hold what is learned from and measured on."""
    from dgmd_pipeline.training import backbones

    kind = ExtractFeatures if backbones.is_frozen(step.settings.backbone) else WriteTFRecords
    return [kind(job=step.job, side=side) for side in SIDES]


def _trained(step: Step, path: Path) -> Any:
    """Return the trained model in the folder `path`: from memory where this run has made it, loading takes 3 to 5 s."""
    from dgmd_pipeline.training import networks, runtime

    if step.job.trained and step.job.trained[0] == step.job.finished[TrainModel.name]:
        return step.job.trained[1]
    runtime.start_tensorflow()
    return networks.load(path / "model.keras")


def _class_weights(path: Path) -> dict[int, float]:
    return {int(index): weight for index, weight in manifest.read_json(path).items()}


class EvaluateModel(Step):
    """A model and the validation side -> measurements, how it compares with production, how it behaves in operation."""

    name = "evaluation"
    verb = "evaluate"
    format = 3
    uses = ("model_name", "mlflow_tracking_uri")  # whose production it is compared with
    reads = ("backbone", "data_dir", "aws_data_bucket", "aws_data_path", "max_class_drop", "max_latency_ratio")

    def requires(self) -> list[Step]:
        job = self.job
        records = WriteTFRecords(job=job, side="validation")
        return [TrainModel(job=job), *learned_from(self), records, SplitImages(job=job), MapLabels(job=job)]

    def given(self, before: Sequence[StepPlan]) -> int | None:
        return before[2].images

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import labels
        from dgmd_pipeline.evaluation import gates, leaks, metrics, predictions, report, review
        from dgmd_pipeline.training import backbones, dataset, features

        trained, _, learned, written, split, label_map = self.requires()
        names = labels.read_mapping(label_map.path / "mapping.json")
        network = _trained(self, trained.path)
        tuned = manifest.read_json(trained.path / "training.json").get("fine_tuned", False)
        if backbones.is_frozen(self.settings.backbone) and not tuned:  # or its features are those of another network
            vectors, truth = features.load(learned.path)
            probabilities = predictions.predict_head(network, vectors)
        else:
            probabilities, truth = predictions.predict(network, dataset.read(written.path))
        sides = [list(manifest.read(split.path / f"{side}.csv", manifest.Example)) for side in SIDES]
        pictures = review.validation_images(written.path, sides[1], DownloadImages(job=self.job).path)
        keys = [row.path for row in pictures.examples]
        leaked = self._leaks(sides[0], pictures.examples)
        if leaked:
            leaks.write(draft, leaked.leaks)
        positions = [leak.position for leak in leaked.leaks] if leaked else None
        measured = metrics.evaluate(probabilities, truth, names, keys, draft, positions)
        trained_on = frozenset(row.sha256 for row in sides[0])
        candidate = review.CandidateModel(trained.path / "model.keras", names, trained_on, probabilities=probabilities)
        suspects = self._suspects(sides, names, draft)
        counts = [Counter(row.label for row in rows) for rows in sides]
        content = self._content(measured, suspects, leaked, names, counts)

        found = self._reviewed(candidate, pictures, draft, partial(report.draw, draft, content))
        review.write(found, draft)
        limits = gates.Limits(self.settings.max_class_drop, self.settings.max_latency_ratio)
        report.write(draft, content, report.Outcome(gates.gates(*found, limits), *found))
        return measured.overall | ({"difference": found.comparison["difference"]} if found.comparison else {})

    def _suspects(self, sides: Sequence[Sequence[manifest.Example]], names: Sequence[str], draft: Path) -> Any:
        """Judge the labels by the stored features (`label_suspects.Found`); None with a backbone that stores none."""
        from dgmd_pipeline.data import shards
        from dgmd_pipeline.evaluation import label_suspects
        from dgmd_pipeline.training import backbones, features

        if not backbones.is_frozen(self.settings.backbone):
            return None
        rows = [row for side in sides for row in shards.record_order(side)]
        parts = [features.load(step.path)[0] for step in learned_from(self)]
        given, groups, keys = zip(*((row.class_index, row.group, row.path) for row in rows), strict=True)
        found = label_suspects.find(parts, given, groups, keys, names)
        label_suspects.write(found, draft)
        return found

    def _leaks(self, training: Sequence[manifest.Example], validation: Sequence[manifest.Example]) -> Any:
        """Look for validation images with a near-duplicate in training; None where no features are stored."""
        from dgmd_pipeline.data import shards
        from dgmd_pipeline.evaluation import leaks
        from dgmd_pipeline.training import backbones, features

        if not backbones.is_frozen(self.settings.backbone):
            return None
        sides = [shards.record_order(training), validation]
        ours, theirs = (features.load(step.path)[0] for step in learned_from(self))
        keys = [[row.path for row in rows] for rows in sides]
        labels = [[row.label for row in rows] for rows in sides]
        found = leaks.find(ours, theirs, keys, labels)
        if found.leaks:
            log.warning(
                "%s of %s validation images have a near-duplicate among the training images; see %s",
                f"{len(found.leaks):,}", f"{found.compared:,}", self.path / leaks.TABLE,
            )  # fmt: skip
        return found

    def _content(
        self, measured: Any, suspects: Any, leaked: Any, names: Sequence[str], sides: list[Counter[str]]
    ) -> Any:
        """Gather what the report says from the folders before."""
        from dgmd_pipeline.data import decoding
        from dgmd_pipeline.evaluation import label_suspects, report
        from dgmd_pipeline.training import config, fine_tuning

        *before, _ = upstream_steps(self)
        path = {step.folder: step.path for step in before}
        records = {step.folder: record for step in before if (record := read_record(step.path))}
        trained = path[TrainModel.name]
        about = manifest.read_json(trained / "training.json")

        def pictures(rows: Sequence[Any]) -> Any:
            return decoding.thumbnails(path[DownloadImages.name], {row.position: row.key for row in rows}, report.CARD)

        return report.Content(
            model_name=self.settings.model_name,
            created=formatting.utc_now(),
            source=_source(self.settings, path[DownloadImages.name]),
            settings=_params(records, {}),
            labels=names,
            measured=measured,
            thumbnails=pictures(measured.mistakes),
            suspects=suspects,
            suspect_thumbnails=pictures(suspects.suspects[: label_suspects.SHOWN]) if suspects else {},
            leaks=leaked,
            leak_thumbnails=decoding.thumbnails(path[DownloadImages.name], report.pairs(leaked), report.CARD),
            history=list(manifest.read(trained / "history.csv", config.Epoch)),
            head=about.get("head"),
            counts=_counts(records[BalanceClasses.name], sides),
            rejected=list(manifest.read(path[InspectImages.name] / "rejected.csv", manifest.Rejected)),
            seconds=[(folder, record.seconds) for folder, record in records.items()],
            fine_tuning=fine_tuning.sentence(about["fine_tuning"]) if "fine_tuning" in about else "",
        )

    def _reviewed(
        self, candidate: Any, pictures: Any, draft: Path, meanwhile: Callable[[dict[str, Any] | None], None]
    ) -> "Review":
        """Compare with production, if there is one that can be had."""
        from dgmd_pipeline.evaluation import review
        from dgmd_pipeline.registry import versions
        from dgmd_pipeline.settings import serving_environment

        with tempfile.TemporaryDirectory(dir=draft) as folder:
            there, missing = None, ""
            try:
                if (place := store(self.settings)) and (now := versions.production(place, self.settings.model_name)):
                    log.info("  version %d is production: fetching it to compare ...", now.version)
                    there = contender(place, self.settings.model_name, now, Path(folder))
            except PipelineError as error:
                missing = str(error)
            found = review.review(candidate, there, pictures, draft, serving_environment(), meanwhile)
        found = found._replace(missing=missing or found.missing)
        for problem in filter(None, (found.missing, found.untried)):
            log.warning("%s The model is registered all the same; `promote` will ask for what is missing.", problem)
        return found

    def summary(self, counts: dict[str, Any]) -> str:
        return f"accuracy {counts['accuracy']:.4f}, F1 {counts['f1']:.4f} on {counts['images']:,} validation images"


def _counts(balanced: StepRecord, sides: list[Counter[str]]) -> list[Any]:
    """Return how many images each label has: found, kept, on each side."""
    from dgmd_pipeline.evaluation import plots

    before, after = balanced.counts["before"], balanced.counts["after"]
    return [
        plots.ClassCounts(label, before[label], after.get(label, 0), *(side[label] for side in sides))
        for label in before
    ]


def _source(settings: Any, raw: Path) -> str:
    """Return where the pictures came from, as a URI."""
    by_hand = read_record(raw) is None
    return raw.resolve().as_uri() if by_hand else f"s3://{settings.aws_data_bucket}/{settings.aws_data_path}"


def registered(job: Job) -> dict[str, Any]:
    """Return version, accuracy and difference (to production's) of what this run leaves registered; {} if nothing."""
    version, measured = (read_record(job.settings.data_dir / step.name) for step in (RegisterModel, EvaluateModel))
    if RegisterModel.name not in job.finished or not version or not measured:
        return {}
    known = version.counts | measured.counts
    return {name: known.get(name) for name in ("version", "accuracy", "difference")}


def store(settings: Any) -> Any:
    """Return the registry: the server that is set, or the embedded store, or None where that is not there yet."""
    from dgmd_pipeline.registry import store as registry_store

    if settings.mlflow_tracking_uri:
        return registry_store.Store(settings.mlflow_tracking_uri, None)
    return registry_store.embedded(settings.data_dir / STORE) if (settings.data_dir / STORE).exists() else None


def contender(store: Any, name: str, entry: Any, folder: Path) -> "CandidateModel":
    """Fetch a version of the registry (`registry.Entry`) into `folder`, to be compared."""
    from dgmd_pipeline.evaluation import review
    from dgmd_pipeline.registry import versions

    fetched = versions.fetch(store, name, entry, folder)
    return review.CandidateModel(fetched.path, fetched.labels, fetched.trained_on, entry.version, run=entry.run_id)


def validation(settings: Any) -> Any:
    """Return the validation pictures (`review.Pictures`) that lie in DATA_DIR, or None."""
    from dgmd_pipeline.evaluation import review

    records = settings.data_dir / f"{WriteTFRecords.name}_validation"
    split = settings.data_dir / SplitImages.name
    made, cut = read_record(records), read_record(split)
    if made is None or cut is None or made.inputs.get(SplitImages.name) != cut.identity:
        return None  # the records of another split, while a run is on its way
    return review.validation_images(records, manifest.read(split / "validation.csv", manifest.Example))


class RegisterModel(Step):
    """Everything about a training -> a run and a version in the registry that is not production. The last task."""

    name = "registered_model"
    verb = "register"
    uses = ("model_name", "mlflow_experiment_name", "mlflow_tracking_uri")
    reads = ("data_dir", "aws_data_bucket", "aws_data_path", "backbone_weights", "git_revision")

    def requires(self) -> list[Step]:
        return [
            DownloadImages(job=self.job),
            InspectImages(job=self.job),
            MapLabels(job=self.job),
            BalanceClasses(job=self.job),
            SplitImages(job=self.job),
            TrainModel(job=self.job),
            EvaluateModel(job=self.job),
        ]

    def given(self, before: Sequence[StepPlan]) -> int | None:
        return None

    def news(self, record: StepRecord | None) -> UpstreamChange | None:
        if self.settings.mlflow_tracking_uri or (self.settings.data_dir / STORE).exists():
            return None
        return UpstreamChange(f"{STORE}/ is missing", None, None, None)

    def work(self, draft: Path) -> dict[str, Any]:
        from dgmd_pipeline.data import labels
        from dgmd_pipeline.registry import registration
        from dgmd_pipeline.training import config

        start = time.monotonic()
        raw, inspected, label_map, balanced, split, trained, evaluation = self.requires()
        about = manifest.read_json(trained.path / "training.json")
        before = upstream_steps(self)[:-1]
        records = {step.folder: record for step in before if (record := read_record(step.path))}
        history = manifest.read(trained.path / "history.csv", config.Epoch)
        metrics = manifest.read_json(evaluation.path / "metrics.json")
        candidate = registration.Candidate(
            training_id=about["id"],
            model=partial(_trained, self, trained.path),
            labels=labels.read_mapping(label_map.path / "mapping.json"),
            params=_params(records, self.declared() | {"backbone_weights": self.settings.backbone_weights})
            | {"SEED": about["seed"]},
            history=[{name: value for name, value in row._asdict().items() if name != "epoch"} for row in history],
            metrics={f"evaluation_{name}": value for name, value in metrics.items()}
            | self._served(evaluation.path)
            | _data_counts(records),
            times=timing.metrics(records.values()),
            tags=self._tags(metrics, evaluation.path),
            source=_source(self.settings, raw.path),
            source_digest=self.job.finished[raw.folder],
            files={
                label_map.path / "mapping.json": "",
                evaluation.path: "evaluation",
                split.path / "training.csv": "split",
                split.path / "validation.csv": "split",
                inspected.path / "rejected.csv": "inspected",
                balanced.path / "class_weights.json": "balanced",
            },
        )
        place = self._store(draft, disk.folder_bytes(trained.path) + disk.folder_bytes(evaluation.path))
        experiment = self.settings.mlflow_experiment_name or self.settings.model_name
        version = registration.register(place, experiment, self.settings.model_name, candidate)
        if version.new:
            try:
                registration.add_metrics(place, version, {timing.SECONDS + self.folder: time.monotonic() - start})
            except PipelineError as error:  # the version is there; a number is no reason to fail
                log.warning("how long the registration took is not noted in MLflow: %s", error)
        (draft / "version.json").write_text(json.dumps(version._asdict(), indent=1) + "\n", "utf-8")
        return {"name": version.name, "version": version.version, "run": version.run_id, "new": version.new}

    def _store(self, draft: Path, needed: int) -> Any:
        """Return where to register: the server that is set, or the embedded store, which needs room here."""
        from dgmd_pipeline.registry import store as registry_store

        if not self.settings.mlflow_tracking_uri:
            disk.check_space(draft, "the MLflow store", needed + registry_store.EMBEDDED_BYTES)
            folder = self.settings.data_dir / STORE
            if not folder.exists():  # a database that is cut off while its tables are made is lost
                with folders.draft(folder) as new:
                    registry_store.create(new)
        return store(self.settings)

    def _served(self, evaluation: Path) -> dict[str, float]:
        """Return how the answers to original files differ from those to their records, where that was measured."""
        from dgmd_pipeline.evaluation import review

        tried = review.read(evaluation).assessment or {}
        return {f"evaluation_{name}": value for name, value in tried.items() if name.startswith("served_")}

    def _tags(self, metrics: dict[str, float], evaluation: Path) -> dict[str, str]:
        from dgmd_pipeline.evaluation import review
        from dgmd_pipeline.registry import registration

        found = review.read(evaluation)
        return {
            **{f"dgmd.{name}": f"{found.assessment[name]:.6g}" for name in ASSESSED if found.assessment},
            **({"dgmd.predictions_equal": str(found.assessment["predictions_equal"])} if found.assessment else {}),
            **({"dgmd.difference": f"{found.comparison['difference']:.4f}"} if found.comparison else {}),
            **({"dgmd.compared_with": str(found.comparison["version"])} if found.comparison else {}),
            "dgmd.version": installed_version("dgmd_pipeline"),
            "dgmd.git_revision": self.settings.git_revision or registration.git_revision(Path(__file__)) or "unknown",
            "dgmd.validation_accuracy": f"{metrics['accuracy']:.4f}",
        }

    def summary(self, counts: dict[str, Any]) -> str:
        state = "non-production" if counts["new"] else "was registered already"
        return f"{counts['name']} version {counts['version']}, {state}"


def _params(records: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the folders were made with, and others, by variable name."""
    settings = [record.settings for record in records.values()] + [others]
    return {name.upper(): value for some in settings for name, value in some.items()}


def _data_counts(records: dict[str, Any]) -> dict[str, float]:
    split, balanced = records[SplitImages.name].counts, records[BalanceClasses.name].counts
    return {
        "images_inspected": sum(balanced["before"].values()),
        "images_balanced": sum(balanced["after"].values()),
        "images_training": split["training"],
        "images_validation": split["validation"],
    }


FOLDERS = [  # all that there may be under DATA_DIR, whatever the settings
    *(step.name for step in (DownloadImages, InspectImages, MapLabels, BalanceClasses, SplitImages)),
    *(f"{step.name}_{side}" for step in (WriteTFRecords, ExtractFeatures) for side in SIDES),
    *(step.name for step in (TrainModel, EvaluateModel, RegisterModel)),
    STORE,
]
