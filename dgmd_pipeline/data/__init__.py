"""Rows, paths and pixels; NumPy and Pillow, without TensorFlow."""
