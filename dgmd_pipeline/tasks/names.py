"""The names of the step folders below DATA_DIR."""

SPLITS = ("training", "validation")
RAW = "raw"
INSPECTED = "inspected"
LABEL_MAP = "label_map"
BALANCED = "balanced"
SPLIT = "split"
TFRECORD = "tfrecord"  # one folder for each split: tfrecord_training, tfrecord_validation
FEATURES = "features"  # likewise one folder for each split
TRAINED_MODEL = "trained_model"
EVALUATION = "evaluation"
REGISTERED_MODEL = "registered_model"
STORE = "mlflow"  # the embedded MLflow store, which is not a step folder

STEPS = (  # every step folder that can exist, with any settings
    *(RAW, INSPECTED, LABEL_MAP, BALANCED, SPLIT),
    *(f"{name}_{split}" for name in (TFRECORD, FEATURES) for split in SPLITS),
    *(TRAINED_MODEL, EVALUATION, REGISTERED_MODEL),
)
ALL = (*STEPS, STORE)
