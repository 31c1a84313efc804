"""Luigi and the step contract. This package does not depend on images, TensorFlow, S3 or MLflow."""
