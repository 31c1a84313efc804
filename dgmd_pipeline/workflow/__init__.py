"""Luigi and the step contract; knows nothing of images, TensorFlow, S3 or MLflow."""
