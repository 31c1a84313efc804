"""What a model learns from: TFRecords, or features that a frozen backbone extracts from them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.tasks import names, resources
from dgmd_pipeline.tasks.data import PerSplitStep, WriteTFRecords
from dgmd_pipeline.workflow import disk
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.step import Step, StepResult

if TYPE_CHECKING:
    import numpy as np

    from dgmd_pipeline.training.feature_store import Reuse


def training_inputs(backbone: str) -> dict[str, Step]:
    """Return the tasks whose folders a model with this backbone is trained and measured on, by split."""
    from dgmd_pipeline.training import backbones

    kind = ExtractFeatures if backbones.is_frozen(backbone) else WriteTFRecords
    return {split: kind(split=split) for split in names.SPLITS}


class ExtractFeatures(PerSplitStep):
    """A record -> the frozen backbone's feature vector, computed once for all epochs and trainings."""

    name, verb, format_version = names.FEATURES, "extract", 2
    params = image_params = ("backbone", "image_width", "image_height")
    runtime_params = ("backbone_weights", "keras_home")

    def requires(self) -> dict[str, Step]:
        return {"records": WriteTFRecords(split=self.split)}

    def extra_inputs(self) -> dict[str, str]:
        from dgmd_pipeline.training import backbones

        return {"weights": backbones.weights_fingerprint(self.settings.backbone_weights)}

    def expected_reuse(self, upstream: Sequence[StepPlan]) -> str:
        changed = upstream[0].state == "run" and not upstream[0].reuse  # the records, for example by IMAGE_FIT
        return "" if changed else super().expected_reuse(upstream)

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import shards
        from dgmd_pipeline.training import feature_store, features

        records: Path = self.input()["records"].path
        index = manifest.read_shard_index(records)
        origin = self.declared_settings() | self.extra_inputs() | {"fit": index.fit, "records": manifest.INDEX_SCHEMA}
        reuse = feature_store.find_reusable(records, self.reusable_folders(), origin)
        shards.check(records, reuse.shards)
        dimensions, computed = self._extract(records, reuse)
        disk.check_space(draft, self.folder, features.estimate_bytes(index.images, dimensions))
        new, images, counts = len(reuse.new), index.images, {"images": index.images, "dimensions": dimensions}
        written = feature_store.write(draft, records, reuse, origin, dimensions, computed)
        for _ in self.progress(written, new, "images", count=int):
            pass
        summary = f"{formatting.describe_reuse(images, 'images', new)}, {dimensions:,} dimensions"
        return StepResult(counts, images, new, reuse.new_bytes, summary)

    def _extract(self, records: Path, reuse: "Reuse") -> "tuple[int, Iterator[np.ndarray]]":
        """Return the number of dimensions, and the vectors that are not reused, in batches.

        Where all are reused, neither TensorFlow nor the network is needed.
        """
        if reuse.dimensions is not None and not len(reuse.new):
            return reuse.dimensions, iter(())
        from dgmd_pipeline.training import dataset, features
        from dgmd_pipeline.workflow.executors import in_threads

        network = resources.network(self.context, extracts=True)
        assert network is not None  # noqa: S101 - features are extracted for frozen backbones only
        batches = dataset.read_images(records, reuse.new).batch(features.BATCH).prefetch(2)
        return int(network.output_shape[-1]), features.extract(batches, network, in_threads)
