"""Changes training images at random, batch by batch, in TensorFlow. The changes keep the labels valid."""

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import tensorflow as tf

Augmentation = Literal["none", "shift", "flip", "strong"]
SHIFT = 1 / 8  # maximum shift, as a share of the width and of the height
ANGLE = math.radians(12)  # maximum rotation
ZOOM = 0.18  # the zoom factor is between exp(-ZOOM) and exp(ZOOM), which is 84 to 120 %
CONTRAST = 0.2  # the contrast factor is between exp(-CONTRAST) and exp(CONTRAST), which is 82 to 122 %
BRIGHTNESS = 25.0  # a number between -BRIGHTNESS and BRIGHTNESS is added to the pixel values, which are 0 to 255


def augment_batches(batches: "tf.data.Dataset", kind: Augmentation, seed: tuple[int, int]) -> "tf.data.Dataset":
    """Return batches (images, labels) with randomly changed images, see `augment`.

    The changes of an image depend on `seed` (two numbers of 0 to 2 ** 63 - 1), on the number of the batch, and on the
    position of the image in the batch.
    """
    import tensorflow as tf

    def change(number: "tf.Tensor", batch: "tuple[tf.Tensor, tf.Tensor]") -> "tuple[tf.Tensor, tf.Tensor]":
        images, labels = batch
        return augment(images, kind, tf.random.fold_in(tf.constant(seed, tf.int64), number)), labels

    return batches.enumerate().map(change, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def augment(images: "tf.Tensor", kind: Augmentation, seed: "tf.Tensor") -> "tf.Tensor":
    """Return randomly changed images of the shape and range of `images`: uint8, or float32 if `kind` is "strong".

    `images` are uint8 [batch, height, width, 3]. The random numbers of an image depend only on `seed` (int [2]), on the
    number of images in the batch and on the image's position in the batch. So a resumed training changes the images
    exactly as a training without an interruption does.

    - "none" changes nothing.
    - "shift" moves the image by up to an eighth of its width and height, in whole pixels.
    - "flip" also mirrors half of the images, chosen at random, left to right. Do not use it for text, digits and other
      classes that change when mirrored.
    - "strong" also rotates by up to 12 degrees, zooms by up to 20 %, and changes contrast and brightness.

    A pixel that would come from outside the original image gets the value of the nearest pixel at the edge.
    """
    import tensorflow as tf

    if kind == "none":
        return images
    affine, light = tf.unstack(tf.random.split(seed, 2))
    interpolation = "NEAREST"
    if kind == "strong":
        images, interpolation = tf.cast(images, tf.float32), "BILINEAR"
    size = tf.shape(images)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=_transforms(size, kind, affine),
        output_shape=size[1:3],
        fill_value=0.0,  # not used: the fill mode "NEAREST" needs no value
        fill_mode="NEAREST",
        interpolation=interpolation,
    )
    moved = tf.ensure_shape(moved, images.shape)
    return _change_light(moved, light) if kind == "strong" else moved


def _transforms(size: "tf.Tensor", kind: Augmentation, seed: "tf.Tensor") -> "tf.Tensor":
    """Return the transforms (float32 [batch, 8]) from a pixel of the changed image to its place in the original.

    They have the format of TensorFlow's ImageProjectiveTransformV3: (a0, a1, a2, b0, b1, b2, 0, 0), where
    x' = a0 x + a1 y + a2 and y' = b0 x + b1 y + b2. Rotation, zoom and mirroring keep the centre in place.
    """
    import tensorflow as tf

    height, width = tf.cast(size[1], tf.float32), tf.cast(size[2], tf.float32)
    right, down, mirror, angle, zoom = tf.unstack(tf.random.stateless_uniform([5, size[0]], seed, -1.0, 1.0))
    right, down = tf.round(right * SHIFT * width), tf.round(down * SHIFT * height)
    sign = tf.ones_like(mirror) if kind == "shift" else tf.where(mirror < 0, -1.0, 1.0)
    cosine, sine = tf.ones_like(angle), tf.zeros_like(angle)
    if kind == "strong":
        scale = tf.exp(zoom * ZOOM)
        cosine, sine = scale * tf.cos(angle * ANGLE), scale * tf.sin(angle * ANGLE)
    a0, a1, b0, b1 = sign * cosine, -sine, sign * sine, cosine
    x, y = (width - 1) / 2, (height - 1) / 2
    zero = tf.zeros_like(right)
    return tf.stack([a0, a1, x - a0 * x - a1 * y + right, b0, b1, y - b0 * x - b1 * y + down, zero, zero], axis=1)


def _change_light(images: "tf.Tensor", seed: "tf.Tensor") -> "tf.Tensor":
    """Return float32 images with random contrast and brightness, clipped to 0 to 255."""
    import tensorflow as tf

    contrast, brightness = tf.unstack(tf.random.stateless_uniform([2, tf.shape(images)[0], 1, 1, 1], seed, -1.0, 1.0))
    changed = (images - 127.5) * tf.exp(contrast * CONTRAST) + 127.5 + brightness * BRIGHTNESS
    return tf.clip_by_value(changed, 0.0, 255.0)
