"""Augmentation: the changes of each kind, and their seeds."""

import numpy as np
import pytest

from dgmd_pipeline.training import augmentation

HEIGHT, WIDTH = 24, 16
IMAGES = np.random.default_rng(0).integers(0, 256, (40, HEIGHT, WIDTH, 3), dtype=np.uint8)
FARTHEST = (HEIGHT // 8, WIDTH // 8)


def augment(kind, seed=(1, 2), images=IMAGES):
    return np.asarray(augmentation.augment(images, kind, np.array(seed)))


def shift_of(changed, image):
    """Return the (right, down) by which `changed` is `image` shifted with a repeated edge; None if it is not."""
    down, right = FARTHEST
    padded = np.pad(image, [(down, down), (right, right), (0, 0)], mode="edge")
    for y in range(2 * down + 1):
        for x in range(2 * right + 1):
            if np.array_equal(padded[y : y + HEIGHT, x : x + WIDTH], changed):
                return x - right, y - down
    return None


def test_none_changes_nothing():
    np.testing.assert_array_equal(augment("none"), IMAGES)


def test_shift_moves_each_image_by_whole_pixels_and_repeats_its_edge():
    shifts = [shift_of(*pair) for pair in zip(augment("shift"), IMAGES, strict=True)]
    assert None not in shifts
    assert {right for right, _ in shifts} == set(range(-FARTHEST[1], FARTHEST[1] + 1))
    assert {down for _, down in shifts} == set(range(-FARTHEST[0], FARTHEST[0] + 1))


def test_flip_mirrors_about_half_of_the_images_left_to_right():
    changed = augment("flip")
    straight = [shift_of(*pair) is not None for pair in zip(changed, IMAGES, strict=True)]
    mirrored = [shift_of(*pair) is not None for pair in zip(changed[:, :, ::-1], IMAGES, strict=True)]
    assert all(one != other for one, other in zip(straight, mirrored, strict=True))
    assert 8 < sum(mirrored) < 32


def test_strong_keeps_shape_range_and_content():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    spot = np.exp(-((y - 11.5) ** 2 + (x - 7.5) ** 2) / 20)  # in the centre, where only shifts move it
    images = np.tile((250 * spot)[None, ..., None], (40, 1, 1, 3)).astype(np.uint8)
    changed = augment("strong", images=images)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 255
    brightest = [np.unravel_index(each[..., 0].argmax(), (HEIGHT, WIDTH)) for each in changed]
    assert np.abs(np.array(brightest) - (11.5, 7.5)).max(axis=0).tolist() <= [FARTHEST[0] + 1.5, FARTHEST[1] + 1.5]
    assert changed.max(axis=(1, 2, 3)).std() > 5  # other contrast and brightness


@pytest.mark.parametrize("kind", ["shift", "flip", "strong"])
def test_changes_depend_only_on_seed_batch_and_position(kind):
    import tensorflow as tf

    same = tf.data.Dataset.from_tensors((IMAGES[0], 0)).repeat(80).batch(40)

    def changed(*seed):
        return np.stack([images.numpy() for images, _ in augmentation.augment_batches(same, kind, seed)])

    one = changed(2**32 - 1, 2)
    np.testing.assert_array_equal(one, changed(2**32 - 1, 2))
    assert not np.array_equal(one, changed(2**32 - 1, 3))
    assert not np.array_equal(one, changed(1, 2))
    assert not np.array_equal(one[0], one[1])
    assert len(np.unique(one[0], axis=0)) > 10
