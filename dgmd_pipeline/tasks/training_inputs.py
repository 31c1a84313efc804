"""What a model learns from: TFRecords, or features that a frozen backbone extracts from them."""

from pathlib import Path

from dgmd_pipeline.tasks import names, resources
from dgmd_pipeline.tasks.data import PerSplitStep, WriteTFRecords
from dgmd_pipeline.workflow import disk
from dgmd_pipeline.workflow.step import Step, StepResult
from dgmd_pipeline.workflow.success_file import read_record


def training_inputs(backbone: str) -> dict[str, Step]:
    """Return the tasks whose folders a model with this backbone is trained and measured on, by split."""
    from dgmd_pipeline.training import backbones

    kind = ExtractFeatures if backbones.is_frozen(backbone) else WriteTFRecords
    return {split: kind(split=split) for split in names.SPLITS}


class ExtractFeatures(PerSplitStep):
    """A record -> the frozen backbone's feature vector, computed once for all epochs and trainings."""

    name, verb = names.FEATURES, "extract"
    params = ("backbone", "image_width", "image_height")
    runtime_params = ("backbone_weights", "keras_home")

    def requires(self) -> dict[str, Step]:
        return {"records": WriteTFRecords(split=self.split)}

    def extra_inputs(self) -> dict[str, str]:
        from dgmd_pipeline.training import backbones

        return {"weights": backbones.weights_fingerprint(self.settings.backbone_weights)}

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import shards
        from dgmd_pipeline.training import dataset, features
        from dgmd_pipeline.workflow.executors import in_threads

        records: Path = self.input()["records"].path
        shards.check(records)
        network = resources.network(self.context, extracts=True)
        assert network is not None  # noqa: S101 - features are extracted for frozen backbones only
        images = dataset.read(records)
        count, dimensions = len(images), int(network.output_shape[-1])
        disk.check_space(draft, self.folder, features.estimate_bytes(count, dimensions))
        extracted = features.extract(images.batch(features.BATCH).prefetch(2), count, network, draft, in_threads)
        for _ in self.progress(extracted, count, "images", count=int):
            pass
        record, counts = read_record(records), {"images": count, "dimensions": dimensions}
        summary = f"{count:,} images, {dimensions:,} dimensions"
        volume = record.counts.get("bytes") if record else None
        return StepResult(counts=counts, images=count, bytes_processed=volume, summary=summary)
