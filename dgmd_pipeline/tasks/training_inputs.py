"""The data that a model is trained on: TFRecords, or features that a frozen backbone extracts from them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.tasks import names, resources
from dgmd_pipeline.tasks.data import PerSplitStep, WriteTFRecords
from dgmd_pipeline.workflow import disk, folders
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.step import Step, StepResult

if TYPE_CHECKING:
    import keras

    from dgmd_pipeline.training.extraction import Piece
    from dgmd_pipeline.training.feature_store import Origin, Reuse


def training_inputs(backbone: str) -> dict[str, Step]:
    """Return, for each split, the task that writes the data to train or evaluate a model with this backbone."""
    from dgmd_pipeline.training import backbones

    kind = ExtractFeatures if backbones.is_frozen(backbone) else WriteTFRecords
    return {split: kind(split=split) for split in names.SPLITS}


class ExtractFeatures(PerSplitStep):
    """A record -> the frozen backbone's feature vector, computed once for all epochs and trainings."""

    name, verb, format_version = names.FEATURES, "extract", 2
    keeps_pieces = True
    params = image_params = ("backbone", "image_width", "image_height")
    runtime_params = ("backbone_weights", "keras_home")

    def requires(self) -> dict[str, Step]:
        return {"records": WriteTFRecords(split=self.split)}

    def extra_inputs(self) -> dict[str, str]:
        from dgmd_pipeline.training import backbones

        return {"weights": backbones.weights_fingerprint(self.settings.backbone_weights)}

    def expected_reuse(self, upstream: Sequence[StepPlan]) -> str:
        # If no record is reused, for example because IMAGE_FIT has changed, all records change.
        changed = upstream[0].state == "run" and not upstream[0].reuse
        return "" if changed else super().expected_reuse(upstream)

    def work(self, draft: Path) -> StepResult:
        from dgmd_pipeline.data import shards
        from dgmd_pipeline.training import feature_store

        records: Path = self.input()["records"].path
        index = manifest.read_shard_index(records)
        origin = self.declared_settings() | self.extra_inputs() | {"fit": index.fit, "records": manifest.INDEX_SCHEMA}
        previous = self.reusable_folders()
        missing = reuse = feature_store.find_reusable(records, previous, origin)
        if len(missing.new):
            shards.check(records, missing.shards)
            previous += self._extract(records, missing, origin, draft / folders.RESUME)
            reuse = feature_store.find_reusable(records, previous, origin)
        dimensions = reuse.dimensions or int(self._network().output_shape[-1])  # a split without images has no vector
        feature_store.write(draft, records, reuse, origin, dimensions)
        new, images, counts = len(missing.new), index.images, {"images": index.images, "dimensions": dimensions}
        summary = f"{formatting.describe_reuse(images, 'images', new)}, {dimensions:,} dimensions"
        return StepResult(counts, images, new, missing.new_bytes, summary)

    def _extract(self, records: Path, reuse: "Reuse", origin: "Origin", folder: Path) -> list[Path]:
        """Compute the vectors that are not reused, and return the folders that contain them.

        The computation needs TensorFlow and the backbone's network.
        """
        from dgmd_pipeline.training import extraction

        given = self.settings
        size = given.image_height, given.image_width
        network = extraction.Network(given.backbone, given.backbone_weights, *size, given.keras_home)
        pieces = extraction.divide(records, reuse, folder, origin, network)
        for _ in self.progress(self._compute(pieces), len(reuse.new), "images", count=int):
            pass
        return [piece.target for piece in pieces]

    def _compute(self, pieces: "Sequence[Piece]") -> Iterator[int]:
        """Compute and write the vectors of the pieces. After each write, yield how many vectors it wrote."""
        from dgmd_pipeline.training import extraction, features
        from dgmd_pipeline.workflow.executors import in_threads

        executor = self.context.executor
        network, folder = self._network(), pieces[0].target.parent
        images = sum(len(piece.positions) for piece in pieces)
        disk.check_space(folder, self.folder, features.estimate_bytes(images, int(network.output_shape[-1])))
        if executor.is_cluster:
            return map(extraction.check, pieces, executor.map(extraction.extract_piece, pieces))
        return extraction.extract_pieces(pieces, network, in_threads)

    def _network(self) -> "keras.Model":
        network = resources.network(self.context)
        assert network is not None  # noqa: S101 - features are extracted for frozen backbones only
        return network()
