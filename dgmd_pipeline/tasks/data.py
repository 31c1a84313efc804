"""The steps that prepare the data, from the bucket to TFRecords."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from dgmd_pipeline import manifest
from dgmd_pipeline.data import corrections
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.tasks import names
from dgmd_pipeline.tasks.resources import Resources, start_network_after_download
from dgmd_pipeline.workflow import folders
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.step import Step, StepResult, UpstreamChange
from dgmd_pipeline.workflow.success_file import Json, StepRecord, digest, read_record
from dgmd_pipeline.workflow.worker import reserve_memory

if TYPE_CHECKING:
    from dgmd_pipeline.s3.client import Client
    from dgmd_pipeline.s3.listing import Listing

log = logging.getLogger(__name__)
SOURCE = ("aws_data_bucket", "aws_data_path")  # the settings that say where the images come from


class DownloadImages(Step):
    """Objects in the bucket -> files under `raw/`."""

    name, verb = names.RAW, "download"
    params = SOURCE
    runtime_params = ("refresh", "max_rejected_pcnt")
    accepts_external_data = True
    resumable = True

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.s3 import client, sync

        s3, record, resources = client.connect(), read_record(self.path), self.context.shared(Resources)
        if record:
            sync.check_untracked_files(self.path)
        listed, resources.listing = resources.listing or self._list(s3), None
        previous = self.path if self.settings.refresh and record and not self.outdated(record, {}) else None
        limit = self.settings.max_rejected_pcnt
        options = draft / folders.RESUME, previous, self.folder, limit, self.progress, self._fetch()
        result = sync.download_folder(s3, listed, draft, *options)
        start_network_after_download(self.context)
        _warn_of_rejected(Counter(row.reason for row in result.rejected), "objects", self.path)
        return StepResult(
            counts=result.counts,
            images=len(result.objects),
            images_processed=len(result.fetched),
            bytes_processed=sync.total_bytes(result.fetched),
            summary=result.summary,
        )

    def _fetch(self) -> Callable[..., Any]:
        from dgmd_pipeline.s3 import download

        executor = self.context.executor
        return partial(download.download_in_chunks, map=executor.map) if executor.is_cluster else download.download

    def _list(self, s3: "Client") -> "Listing":
        from dgmd_pipeline.s3 import listing

        source = self.settings.aws_data_bucket, self.settings.aws_data_path
        return listing.list_objects(s3, *source, listing.ignores_case(self.path.parent))

    def check_upstream(self, record: StepRecord | None) -> UpstreamChange | None:
        """If REFRESH is set, compare the folder with a new listing of the bucket."""
        from dgmd_pipeline.s3 import client, sync

        if record is None and (self.settings.refresh or self.name in self.context.forced):
            raise NoUsableInput(
                f"{self.path} was not downloaded by this version of the pipeline, so it cannot be updated from the "
                "bucket. To download the images, delete it or move it away. To use it as it is, unset REFRESH and omit "
                "--refresh and --force download."
            )
        if record is None or not self.settings.refresh:
            return None
        resources = self.context.shared(Resources)
        resources.listing = resources.listing or self._list(client.connect())
        changes = sync.compare_folder(folders.current_path(self.path), resources.listing.objects)
        return changes and UpstreamChange(*changes)

    def expected_fingerprint(self, inputs: Mapping[str, str]) -> str | None:
        return None

    def fingerprint_of(self, folder: Path, inputs: Mapping[str, str]) -> str:
        """Return the fingerprint of the listing."""
        from dgmd_pipeline.s3 import sync

        return sync.fingerprint(sync.stored_rows(folder))


def _warn_of_rejected(reasons: Mapping[str, int], what: str, folder: Path) -> None:
    if reasons:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in Counter(reasons).most_common())
        log.warning("%s left out: %s; see %s", what, listed, folder / manifest.REJECTED)


class InspectImages(Step):
    """Files under `raw/` -> rows in `images.csv` (usable images) and `rejected.csv` (other files, with the reason)."""

    name, verb, format_version = names.INSPECTED, "inspect", 3
    keeps_pieces = True

    def requires(self) -> dict[str, Step]:
        return {"raw": DownloadImages()}

    @cached_property
    def _corrections(self) -> dict[str, str]:
        """The operator's corrections. They are read once: if the file changes during a run, the run does not notice."""
        return corrections.read(self.path.with_name(corrections.NAME))

    def extra_inputs(self) -> dict[str, str]:
        return {corrections.NAME: digest(self._corrections)} if self._corrections else {}

    def expected_reuse(self, upstream: Sequence[StepPlan]) -> str:
        """Return how many images are new and how many results are reused; "" if this is unknown.

        The last inspection is compared with a listing of the bucket. This is the new listing if the planning has made
        one, or else the listing in `raw/`. If the operator has put the images into `raw/`, there is no listing. In this
        case, the last inspection is compared with the files in `raw/`.
        """
        previous, raw = next(iter(self.reusable_folders()), None), folders.current_path(DownloadImages().path)
        listing, objects = self.context.shared(Resources).listing, None
        if previous is None or (upstream[0].state != "done" and not listing):
            return ""
        from dgmd_pipeline.data import inspection

        if listing or read_record(raw):
            objects = listing.objects if listing else manifest.read(raw / manifest.LISTING, manifest.SourceObject)
        new, reused = inspection.expect(raw, objects, self._corrections, previous)
        return f"{new:,} new, {reused:,} reused"

    def _map(self, function: Callable[..., Any], files: Any) -> Any:
        from dgmd_pipeline.data import inspection

        executor = self.context.executor
        # A Dask scheduler processes 400 pieces a second, and a worker inspects 450 files a second. With 64 files in a
        # piece (CHUNK), the scheduler could hand out 25,600 files a second, which is enough for only about 60 workers.
        # So a cluster gets larger pieces.
        chunk = inspection.PIECE_FILES if executor.is_cluster else inspection.CHUNK
        return self.progress(executor.map(function, files, chunk), len(files), "images")

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import inspection

        raw: Path = self.input()["raw"].path
        record = read_record(raw)

        options = self._map, reserve_memory, self.reusable_folders(), draft / folders.RESUME
        counts = inspection.inspect_folder(raw, record is not None, self._corrections, draft, *options)
        rejected = {reason: count for reason, count in counts["rejected"].items() if reason != manifest.EXCLUDED}
        _warn_of_rejected(rejected, "files", self.path)  # files that corrections.csv excludes cause no warning
        return StepResult(
            counts={name: value for name, value in counts.items() if name != "new"},
            images=counts["images"],
            images_processed=counts["new"],
            bytes_processed=record.counts.get("bytes") if record and counts["new"] == counts["files"] else None,
            summary=inspection.summary(counts),
        )


class MapLabels(Step):
    """Labels -> class indexes. As long as bucket and prefix stay the same, no label is removed from the map."""

    name, verb = names.LABEL_MAP, "label"
    params = (*SOURCE, "max_rejected_pcnt", "min_images_per_label")

    def requires(self) -> dict[str, Step]:
        return {"inspected": InspectImages()}

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import columns, inspection, labels

        inspected: Path = self.input()["inspected"].path
        usable = columns.count_labels(inspected / "images.csv")
        report = inspected / manifest.REJECTED
        rejected = manifest.read(report, manifest.Rejected)
        inspection.check_rejected(usable, rejected, self.settings.max_rejected_pcnt, report)
        counts = labels.write_label_map(usable, self._known(), self.settings.min_images_per_label, draft)
        summary = f"{counts['labels']:,} labels, {counts['outputs']:,} outputs"
        return StepResult(counts=counts, images_processed=usable.total(), summary=summary)

    def declared_settings(self) -> Json:
        """Return the settings. If `raw/` exists and was not downloaded, the bucket and the prefix are left out."""
        declared, raw = super().declared_settings(), DownloadImages().path
        by_hand = raw.exists() and read_record(raw) is None
        return {name: value for name, value in declared.items() if not (by_hand and name in SOURCE)}

    def _known(self) -> list[str]:
        """Return the existing map's labels, sorted by class index; [] if the map is missing or has another source."""
        from dgmd_pipeline.data import labels

        record, mapping, now = read_record(self.path), self.path / "mapping.json", self.declared_settings()
        if not mapping.exists() or (record and any(record.settings.get(name) != now.get(name) for name in SOURCE)):
            return []
        return labels.read_mapping(mapping)

    def expected_fingerprint(self, inputs: Mapping[str, str]) -> str | None:
        return None

    def fingerprint_of(self, folder: Path, inputs: Mapping[str, str]) -> str:
        """Return the fingerprint of the content: the class index of each label, and whether the label is used."""
        from dgmd_pipeline.data.labels import LabelRow

        rows = manifest.read(folder / "labels.csv", LabelRow)
        return digest([[row.label, row.class_index, row.state == "used"] for row in rows if row.class_index >= 0])


class BalanceClasses(Step):
    """Rows -> the rows to use, and class weights that correct the remaining imbalance."""

    name, verb, format_version = names.BALANCED, "balance", 2
    params = ("balance_limit",)

    def requires(self) -> dict[str, Step]:
        return {"inspected": InspectImages(), "label_map": MapLabels()}

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import balance, labels

        rows = manifest.read(self.input()["label_map"].path / "labels.csv", labels.LabelRow)
        images = self.input()["inspected"].path / "images.csv"
        used = {row.label: row.class_index for row in rows if row.state == "used"}
        counts = balance.write_balanced(images, used, self.settings.balance_limit, draft)
        return StepResult(
            counts=dict(counts),
            images=sum(counts["after"].values()),
            images_processed=sum(counts["before"].values()),
            summary=balance.summary(counts),
        )


class SplitImages(Step):
    """Rows -> rows of the training split and of the validation split."""

    name, verb = names.SPLIT, "split"
    params = ("validation_pcnt",)

    def requires(self) -> dict[str, Step]:
        return {"balanced": BalanceClasses()}

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import split

        rows = self.input()["balanced"].path / "images.csv"
        counts = split.write_splits(rows, self.settings.validation_pcnt, draft)
        images = counts["training"] + counts["validation"]
        return StepResult(counts=counts, images=images, summary=split.summary(counts))


class PerSplitStep(Step):
    """A step with one task and one folder for each split."""

    split: str = luigi.ChoiceParameter(choices=names.SPLITS)
    image_params: ClassVar[tuple[str, ...]] = ()  # settings that the result for each image depends on

    @property
    def folder(self) -> str:
        return f"{self.name}_{self.split}"

    @property
    def label(self) -> str:
        return self.folder

    @property
    def _other(self) -> "PerSplitStep":
        """The same step for the other split. Its old folder may have results for images that are now in this split."""
        return type(self)(split=next(split for split in names.SPLITS if split != self.split))

    def reusable_folders(self) -> list[Path]:
        own = super().reusable_folders()
        return own and [*own, *self._other._finished_folders(), *folders.pieces(self._other.path)]

    def expected_reuse(self, upstream: Sequence[StepPlan]) -> str:
        record, now = read_record(folders.current_path(self.path)), self.declared_settings()
        if record is None or record.inputs | self.extra_inputs() != record.inputs or not self.reusable_folders():
            return ""
        same = all(record.settings.get(name) == now[name] for name in self.image_params)
        return "reuses unchanged images" if same else ""

    def keeps_replaced(self) -> bool:
        return not self._other.complete()

    def run(self) -> None:
        super().run()
        folders.discard_replaced(self._other.path)


class WriteTFRecords(PerSplitStep):
    """Rows of a split -> records in the shards of the split."""

    name, verb, format_version = names.TFRECORD, "convert", 4
    keeps_pieces = True
    # With this priority, Luigi writes the records of both splits before it extracts features. While the records are
    # written, a thread builds the backbone, which the extraction needs.
    priority = 1
    image_params = ("image_width", "image_height", "image_fit")
    params = ("num_shards", *image_params)

    def requires(self) -> dict[str, Step]:
        return {"split": SplitImages(), "inspected": InspectImages(), "raw": DownloadImages()}

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import shards

        rows = manifest.read(self.input()["split"].path / f"{self.split}.csv", manifest.Example)

        def run(function: Callable[..., Any], pieces: Any) -> Any:
            total = sum(len(piece.rows) for piece in pieces)
            done = self.context.executor.map(function, pieces)
            return self.progress(done, total, "images", count=lambda done: done if isinstance(done, int) else 0)

        given, previous, raw = self.settings, self.reusable_folders(), self.input()["raw"].path
        size, fit, pieces = (given.image_width, given.image_height), given.image_fit, draft / folders.RESUME
        target = draft, self.split, given.num_shards
        written = shards.write(rows, raw, *target, *size, fit, run, reserve_memory, previous, pieces)
        if suggested := shards.suggest_shards([shard.bytes for shard in manifest.read_shard_index(draft).shards]):
            log.warning(
                "%s has a shard of more than 1 GB. NUM_SHARDS=%d makes shards of about 200 MB.", self.folder, suggested
            )
        return StepResult(written.counts, written.counts["images"], written.new, written.new_bytes, written.summary)

    def input_images(self, upstream: Sequence[StepPlan]) -> int | None:
        return upstream[0].counts.get(self.split, upstream[0].images)

    def estimated_bytes(self) -> int | None:
        from dgmd_pipeline.data import shards

        split = read_record(self.input()["split"].path)
        size = (self.settings.image_width, self.settings.image_height)
        return shards.estimate_bytes(split.counts[self.split], *size) if split else None
