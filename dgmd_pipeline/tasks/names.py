"""The names of the step folders below DATA_DIR."""

SPLITS = ("training", "validation")
RAW = "raw"
INSPECTED = "inspected"
LABEL_MAP = "label_map"
BALANCED = "balanced"
SPLIT = "split"
TFRECORD = "tfrecord"  # one folder for each split: tfrecord_training, tfrecord_validation
FEATURES = "features"  # the same
TRAINED_MODEL = "trained_model"
EVALUATION = "evaluation"
REGISTERED_MODEL = "registered_model"
STORE = "mlflow"  # the embedded MLflow store, which is no step's

ALL = (  # that there may be, whatever the settings
    *(RAW, INSPECTED, LABEL_MAP, BALANCED, SPLIT),
    *(f"{name}_{split}" for name in (TFRECORD, FEATURES) for split in SPLITS),
    *(TRAINED_MODEL, EVALUATION, REGISTERED_MODEL, STORE),
)
