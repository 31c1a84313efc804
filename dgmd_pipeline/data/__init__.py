"""Turns image files into rows, splits and TFRecord shards, with NumPy and Pillow and without TensorFlow."""
