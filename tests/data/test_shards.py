import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import encode_with_orientation, put_image, upright

from dgmd_pipeline.data import shards, tfrecord
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import Example, read_shard_index
from dgmd_pipeline.training import dataset
from dgmd_pipeline.workflow.executors import ProcessExecutor
from dgmd_pipeline.workflow.worker import reserve_memory

WIDTH, HEIGHT = 24, 16


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def rows(raw: Path) -> list[Example]:
    return [
        put_image(raw, f"{label}/{label} {number}.png", index)
        for index, label in enumerate(["allspice", "anise", "bay leaf"])
        for number in range(20)
    ]


def write(rows, raw: Path, folder: Path, count: int = 4, **options) -> Path:
    folder.mkdir()
    shards.write(rows, raw, folder, "training", count, WIDTH, HEIGHT, "stretch", **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def expected_pixels(raw: Path, row: Example) -> np.ndarray:
    with Image.open(raw / row.path) as image:
        return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


def test_records_are_read_with_the_key_label_and_pixels_that_were_written(rows, raw, tmp_path):
    folder = write(rows, raw, tmp_path / "records")
    keys = dataset.keys(folder)
    read = list(dataset.read(folder).as_numpy_iterator())
    assert sorted(keys) == sorted(row.path for row in rows)
    assert keys == [row.path for row in shards.record_order(reversed(rows))]
    assert len(read) == len(rows) == dataset.read(folder).cardinality().numpy()
    by_path = {row.path: row for row in rows}
    for key, (pixels, label) in zip(keys, read, strict=True):
        assert label == by_path[key].class_index
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - expected_pixels(raw, by_path[key])).max() <= 1  # Pillow rounds twice


def test_batches_have_a_known_shape(rows, raw, tmp_path):
    images, labels = dataset.read(write(rows, raw, tmp_path / "records")).batch(7).element_spec
    assert images.shape.as_list() == [None, HEIGHT, WIDTH, 3]
    assert images.dtype.name == "uint8"
    assert labels.dtype.name == "int64"


def test_autotuning_is_off_because_it_delays_the_end_of_a_dataset(rows, raw, tmp_path):
    folder = write(rows, raw, tmp_path / "records")
    assert dataset.read(folder).batch(4).options().autotune.enabled is False
    assert dataset.read(folder, 1, 2).batch(4).options().autotune.enabled is False


def test_tensorflow_reads_the_records_and_serialises_them_to_the_same_bytes(rows, raw, tmp_path):
    import tensorflow as tf

    folder = write(rows, raw, tmp_path / "records", count=1)
    by_path = {row.path: row for row in rows}
    for record in tf.data.TFRecordDataset(str(folder / "training-00000-of-00001.tfrecord")).as_numpy_iterator():
        example = tf.train.Example.FromString(record)
        assert example.SerializeToString(deterministic=True) == record
        features = example.features.feature
        assert sorted(features) == ["height", "image", "key", "label", "width"]
        assert list(features["width"].int64_list.value) == [WIDTH]
        assert list(features["height"].int64_list.value) == [HEIGHT]
        path = features["key"].bytes_list.value[0].decode()
        pixels = tf.io.decode_webp(features["image"].bytes_list.value[0], channels=3)[0].numpy()
        assert np.abs(pixels.astype(int) - expected_pixels(raw, by_path[path])).max() <= 1
        assert list(features["label"].int64_list.value) == [by_path[path].class_index]


def test_large_numbers_and_long_values_are_serialised_as_by_tensorflow():
    import tensorflow as tf

    numbers = {"label": 300, "large": 2**40, "zero": 0}
    texts = {"empty": b"", "long": b"x" * 70_000}
    feature = {name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value])) for name, value in numbers.items()}
    feature |= {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for name, value in texts.items()}
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    assert tfrecord.serialize_example(numbers | texts) == example.SerializeToString(deterministic=True)


def test_the_index_describes_the_shards(rows, raw, tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    counts = shards.write(rows, raw, folder, "validation", 7, WIDTH, HEIGHT, "crop").counts
    index = json.loads((folder / "index.json").read_text())
    names = [f"validation-{number:05d}-of-00007.tfrecord" for number in range(7)]
    assert sorted(contents(folder)) == ["index.json", "records.npy", *names]
    assert [entry["file"] for entry in index["files"]] == names
    assert (index["width"], index["height"], index["fit"]) == (WIDTH, HEIGHT, "crop")
    assert index["encoding"] == {"format": "WEBP", "lossless": True}
    parsed = read_shard_index(folder)
    assert (parsed.height, parsed.width, parsed.fit) == (HEIGHT, WIDTH, "crop")
    assert [shard._asdict() for shard in parsed.shards] == index["files"]
    for entry in index["files"]:
        content = (folder / entry["file"]).read_bytes()
        assert 1 <= entry["records"] <= 20
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert counts == {"images": 60, "shards": 7, "bytes": sum(entry["bytes"] for entry in index["files"])}
    assert counts == {name: index[name] for name in counts}


def test_the_bytes_do_not_depend_on_processes_pieces_or_order(rows, raw, tmp_path, monkeypatch):
    once = write(rows, raw, tmp_path / "once")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        monkeypatch.setattr(shards, "PIECE_IMAGES", 4)
        spread = write(rows[::-1], raw, tmp_path / "spread", map=pool.map)
    assert contents(once) == contents(spread)


def test_labels_are_mixed_although_the_rows_are_sorted(rows, raw, tmp_path):
    folder = write(rows, raw, tmp_path / "records")
    labels = [int(label) for _, label in dataset.read(folder).as_numpy_iterator()]
    for start in range(0, 60, 15):
        assert set(labels[start : start + 15]) == {0, 1, 2}
    changes = sum(one != other for one, other in pairwise(labels))
    assert changes > 30  # 39 in random order, 2 in the order of the rows


def test_there_are_as_many_shards_as_asked_for_and_empty_ones_are_read(rows, raw, tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    assert shards.write(rows[:3], raw, folder, "training", 10, WIDTH, HEIGHT, "stretch").counts["shards"] == 10
    assert len(contents(folder)) == 12
    assert len(dataset.keys(folder)) == len(list(dataset.read(folder, seed=1))) == 3


def test_one_image_gives_a_dataset(rows, raw, tmp_path):
    folder = write(rows[:1], raw, tmp_path / "records")
    shards.check(folder)
    assert dataset.keys(folder) == [rows[0].path]
    assert len(list(dataset.read(folder, seed=1))) == 1


def test_no_images_give_an_empty_dataset(raw, tmp_path):
    folder = write([], raw, tmp_path / "records")
    assert dataset.keys(folder) == []
    assert list(dataset.read(folder, seed=1)) == list(dataset.read(folder)) == []


def test_keys_keep_spaces_accents_and_bytes_that_are_not_utf_8(raw, tmp_path):
    paths = ["bay leaf/bay leaf 1.png", "épice/クローブ 2.png", os.fsdecode(b"anise/caf\xe9.png")]
    folder = write([put_image(raw, path, 0) for path in paths], raw, tmp_path / "records")
    assert sorted(dataset.keys(folder)) == sorted(paths)


def test_shuffled_reading_yields_each_image_once_in_the_order_of_seed_and_epoch(rows, raw, tmp_path):
    folder = write(rows, raw, tmp_path / "records")

    def order(*seed_and_epoch: int) -> list[bytes]:
        images = dataset.read(folder, *seed_and_epoch)
        once, again = ([pixels.tobytes() for pixels, _ in images.as_numpy_iterator()] for _ in range(2))
        assert once == again
        return once

    orders = [order(), order(7), order(7, 1), order(8), order(8, 1)]
    assert all(sorted(some) == sorted(orders[0]) for some in orders)
    assert all(one != other for one, other in combinations(orders, 2))
    assert [order(), order(7, 0), order(7, 1)] == orders[:3]


def test_only_chosen_images_are_read_in_order_or_shuffled(rows, raw, tmp_path):
    folder = write(rows, raw, tmp_path / "records")
    every = [pixels.tobytes() for pixels, _ in dataset.read(folder).as_numpy_iterator()]
    chosen = np.arange(len(every)) % 3 == 1
    expected = [pixels for pixels, use in zip(every, chosen, strict=True) if use]
    ordered, shuffled = dataset.read(folder, chosen=chosen), dataset.read(folder, 7, 1, chosen)
    assert len(ordered) == len(shuffled) == chosen.sum()
    assert [pixels.tobytes() for pixels, _ in ordered.as_numpy_iterator()] == expected
    found = [pixels.tobytes() for pixels, _ in shuffled.as_numpy_iterator()]
    assert sorted(found) == sorted(expected)
    assert found != expected


@pytest.mark.parametrize("step", [1, 7, 59, 100])
def test_images_at_positions_are_read_in_order(step, rows, raw, tmp_path, monkeypatch):
    folder = write(rows, raw, tmp_path / "records")
    monkeypatch.setattr(dataset, "IMAGES_AT_ONCE", 4)
    every = [pixels.tobytes() for pixels, _ in dataset.read(folder).as_numpy_iterator()]
    images = dataset.read_images(folder, np.arange(0, 60, step))
    assert len(images) == len(every[::step])
    assert images.element_spec.shape == (HEIGHT, WIDTH, 3)
    assert [pixels.tobytes() for pixels in images.as_numpy_iterator()] == every[::step]
    assert list(dataset.read_images(folder, np.empty(0, np.int64))) == []


def test_the_first_shard_differs_between_epochs(rows, raw, tmp_path, monkeypatch):
    """With more images than the shuffle buffer holds, the order of the shards mixes them."""
    folder = write(rows, raw, tmp_path / "records", count=20)
    monkeypatch.setattr(dataset, "SHUFFLE_BYTES", 0)
    monkeypatch.setattr(dataset, "SHARDS_AT_ONCE", 1)
    firsts = {next(dataset.read(folder, 7, epoch).as_numpy_iterator())[0].tobytes() for epoch in range(8)}
    assert len(firsts) > 3


def test_check_names_the_damaged_shard(rows, raw, tmp_path):
    folder = write(rows, raw, tmp_path / "records")
    shards.check(folder)
    shard = folder / "training-00002-of-00004.tfrecord"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PipelineError, match=r"training-00002-of-00004\.tfrecord does not have the checksum.*Delete"):
        shards.check(folder)
    shard.write_bytes(content[:-1])
    with pytest.raises(PipelineError, match=r"training-00002-of-00004\.tfrecord has [\d,]+ bytes, expected [\d,]+"):
        shards.check(folder)
    shard.unlink()
    with pytest.raises(PipelineError, match=r"training-00002-of-00004\.tfrecord is missing"):
        shards.check(folder)


def test_check_names_damaged_positions_of_records(rows, raw, tmp_path):
    folder = write(rows, raw, tmp_path / "records")
    content = bytearray((folder / "records.npy").read_bytes())
    content[-1] ^= 1
    (folder / "records.npy").write_bytes(content)
    with pytest.raises(PipelineError, match=r"records\.npy does not have the checksum .*Delete the folder"):
        shards.check(folder)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"schema": 0}'])
def test_a_folder_without_a_valid_index_is_an_error(text, tmp_path):
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(PipelineError, match=r"index\.json .*Delete the folder"):
        shards.check(tmp_path)
    with pytest.raises(PipelineError, match=r"index\.json .*Delete the folder"):
        dataset.read(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nnothing more", b"no image"])
def test_an_image_lost_since_its_inspection_is_an_error_with_a_remedy(content, rows, raw, tmp_path):
    file = raw / rows[5].path
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PipelineError, match=r"allspice 5\.png was .*run with --force inspect"):
        write(rows, raw, tmp_path / "records")


@contextlib.contextmanager
def kill_at_the_twentieth(_):
    if next(reserved) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    yield


reserved = itertools.count(1)


def test_a_process_that_dies_is_an_error_that_names_the_image_and_how_to_exclude_it(rows, raw, tmp_path):
    pool = ProcessExecutor(1)
    last = shards.record_order(rows)[19].path
    with pytest.raises(PipelineError, match=rf"{last} cannot be converted: the process .*SIGKILL.*corrections\.csv"):
        write(rows, raw, tmp_path / "records", 1, map=pool.map, reserve_memory=kill_at_the_twentieth)
    pool.close()


def test_an_image_that_needs_more_memory_than_there_is_is_an_error_that_names_it(rows, raw, tmp_path):
    rows.append(put_image(raw, "anise/large.png", 1, (4000, 4000)))
    pool = ProcessExecutor(2, 400_000_000)  # 110 MB for images
    with pytest.raises(
        PipelineError, match=r"anise/large\.png cannot be converted: it needs 1\d\d MB.*Raise the memory"
    ):
        write(rows, raw, tmp_path / "records", 1, map=pool.map, reserve_memory=reserve_memory)
    pool.close()


def test_an_error_of_the_disk_is_not_reported_as_an_unreadable_image(rows, raw, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        shards.write(rows, raw, tmp_path / "nowhere", "training", 1, WIDTH, HEIGHT, "stretch")


def test_comments_and_metadata_of_the_source_do_not_change_the_records(raw, tmp_path):
    row = put_image(raw, "allspice/1.png", 0)
    plain = write([row], raw, tmp_path / "plain")
    with Image.open(raw / row.path) as image:
        image.save(raw / row.path, "PNG", icc_profile=b"profile" * 100, dpi=(300, 300))
    assert contents(plain) == contents(write([row], raw, tmp_path / "profile"))

    with Image.open(raw / row.path) as image:
        pixels = Image.fromarray(np.asarray(image))
    pixels.save(raw / row.path, "JPEG", quality=95)
    plain = write([row], raw, tmp_path / "plain_jpeg")
    pixels.save(raw / row.path, "JPEG", quality=95, comment=b"a camera's comment", dpi=(300, 300))
    assert contents(plain) == contents(write([row], raw, tmp_path / "comment"))


def test_writing_does_not_import_tensorflow(rows, raw, tmp_path):
    (tmp_path / "records").mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from dgmd_pipeline.data import shards; from dgmd_pipeline.manifest import Example\n"
        f"rows = [Example(*{tuple(rows[0])!r})]\n"
        f"raw, folder = Path({str(raw)!r}), Path({str(tmp_path / 'records')!r})\n"
        "print(shards.write(rows, raw, folder, 'training', 1, 24, 16, 'stretch'))\n"
        "print([name for name in ('tensorflow', 'keras', 'google.protobuf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert dataset.keys(tmp_path / "records") == [rows[0].path]


def photograph(rng: np.random.Generator, source: Image.Image, size: tuple[int, int], noise: float) -> Image.Image:
    """A crop of a photograph, distorted and tinted, with sensor noise (standard deviation in levels)."""
    width, height = (int(length * rng.uniform(0.6, 0.9)) for length in source.size)
    left, top = (
        int(rng.integers(0, whole - part + 1)) for whole, part in zip(source.size, (width, height), strict=True)
    )
    corners = np.array([[left, top], [left, top + height], [left + width, top + height], [left + width, top]])
    corners = corners + rng.uniform(-0.04, 0.04, (4, 2)) * [width, height]
    crop = source.transform(size, Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop) * rng.uniform(0.8, 1.2, 3) + rng.normal(0, noise, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def assert_served(rows: list[Example], raw: Path, folder: Path, width: int, height: int) -> None:
    """Compare the records with what Keras makes of the originals: they differ by rounding only."""
    import keras

    resizing = keras.layers.Resizing(height, width, interpolation="bilinear", antialias=True)
    folder.mkdir()
    shards.write(rows, raw, folder, "validation", 2, width, height, "stretch")
    read = list(dataset.read(folder).as_numpy_iterator())
    assert len(read) == len(rows)
    for key, (pixels, _) in zip(dataset.keys(folder), read, strict=True):
        original = np.asarray(upright((raw / key).read_bytes()))
        assert np.abs(np.asarray(resizing(original[None].astype(np.float32)))[0] - pixels).max() <= 0.51


def test_the_records_of_photographs_store_what_the_model_makes_of_the_originals(raw, tmp_path):
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rows = []
    raw.mkdir()
    for number, size in enumerate([(640, 427), (800, 600), (600, 800), (1024, 768), (1200, 900)]):
        path = f"photo {number}.jpeg"
        photograph(rng, sources[number % 2], size, noise=(1, 3, 6)[number % 3]).save(raw / path, "JPEG", quality=90)
        rows.append(Example(path, "photo", 0, hashlib.sha256((raw / path).read_bytes()).hexdigest(), ""))
    assert_served(rows, raw, tmp_path / "records", 256, 192)


def test_sizes_that_do_not_halve_are_not_displaced_in_any_orientation(raw, tmp_path):
    from sklearn.datasets import load_sample_images

    raw.mkdir()
    source = Image.fromarray(load_sample_images().images[0])
    image = photograph(np.random.default_rng(0), source, (1027, 771), noise=3)
    rows = []
    for orientation in range(1, 9):
        path = f"{orientation}.jpeg"
        (raw / path).write_bytes(encode_with_orientation(image, "JPEG", orientation))
        rows.append(Example(path, "photo", 0, f"{orientation:064x}", path))
    assert_served(rows, raw, tmp_path / "records", 128, 128)


def test_the_records_of_digits_store_what_the_model_makes_of_the_originals(raw, tmp_path):
    from sklearn.datasets import load_digits

    rows = []
    raw.mkdir()
    for number, digit in enumerate(load_digits().images[:60]):
        path = f"digit {number}.png"
        image = Image.fromarray((digit * 15.9).astype(np.uint8))
        image.resize((64 + number, 64), Image.Resampling.NEAREST).save(raw / path)
        rows.append(Example(path, "digit", 0, hashlib.sha256((raw / path).read_bytes()).hexdigest(), ""))
    assert_served(rows, raw, tmp_path / "records", 32, 32)


@pytest.mark.parametrize(
    ("sizes", "suggested"), [([10**9], None), ([10**9 + 1], 5), ([30 * 10**9, 0, 10**9], 155), ([9 * 10**8] * 9, None)]
)
def test_a_number_of_shards_is_suggested_where_one_is_larger_than_1_gb(sizes, suggested):
    assert shards.suggest_shards(sizes) == suggested
