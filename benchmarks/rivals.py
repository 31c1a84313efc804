"""The methods that the pipeline is compared with: scikit-learn on the same features, Keras on the same images.

Each function trains on a training part and returns probabilities (float [n, classes]) for a test part. Labels are class
indexes (int64 [n]), and every class occurs in training. All choices use only the training part.
"""

import time
import warnings
from typing import Any

import numpy as np

FOLDS = 5
STRENGTHS = np.logspace(-3.5, 0.5, 9)  # C of logistic regression
MACHINES = [  # of a support vector machine
    {"kernel": ["rbf"], "C": [1, 3, 10]},
    {"kernel": ["linear"], "C": [0.001, 0.01, 0.1]},
]
PATIENCE = 5  # epochs without a lower loss on the hold-out


def logistic_regression(features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Logistic regression on centred features, divided by one deviation; C with the lowest log loss in 5 folds."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold

    model = LogisticRegressionCV(
        Cs=STRENGTHS, cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0), scoring="neg_log_loss", max_iter=1000,
        l1_ratios=(0.0,), use_legacy_attributes=False,
    )  # fmt: skip
    return _learned(model, *_centred(features, test), labels)


def logistic_regression_raw(features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Logistic regression with C = 1 on unchanged features."""
    from sklearn.linear_model import LogisticRegression

    return _learned(LogisticRegression(C=1.0, max_iter=1000), features, test, labels)


def support_vector_machine(features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """SVM on centred features; kernel and C with the highest accuracy in 3 folds."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC
    from threadpoolctl import threadpool_limits

    learned, asked = _centred(features, test)
    with threadpool_limits(1):
        best = GridSearchCV(SVC(), MACHINES, cv=3, refit=False).fit(learned, labels).best_params_
    return _machine(best, learned, labels, asked)


def digits_machine(values: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """SVC(gamma=0.001), scikit-learn's example for its digits (float [n, 64] of 0..16)."""
    return _machine({"gamma": 0.001}, values, labels, test)


def _machine(parameters: dict[str, Any], features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Fit one SVM for each class against the others, with probabilities by Platt's method in FOLDS folds.

    SVC's own decision by votes between pairs of classes does not suit the method: on clothing photographs the log loss
    was 0.73, with one SVM for each class 0.53.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC

    model = CalibratedClassifierCV(OneVsRestClassifier(SVC(**parameters)), cv=FOLDS, ensemble=False)
    return _learned(model, features, test, labels)


def plain_keras(images: np.ndarray, labels: np.ndarray, test: np.ndarray, seconds: float, seed: int) -> np.ndarray:
    """Train the convolutional network of TensorFlow's tutorial on images (uint8 [n, height, width, 3]).

    Adam and batches of 32 are Keras's defaults. 15 % of the images are held out. Training stops PATIENCE epochs
    after the lowest loss on them, or after `seconds` of CPU time, and keeps the best weights.
    Source: tensorflow.org/tutorials/images/cnn.
    """
    import keras
    from keras import layers
    from sklearn.model_selection import train_test_split

    keras.utils.set_random_seed(seed)
    network = keras.Sequential([
        keras.Input(images.shape[1:]), layers.Rescaling(1 / 255),
        layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"), layers.Flatten(),
        layers.Dense(64, activation="relu"), layers.Dense(int(labels.max()) + 1, activation="softmax"),
    ])  # fmt: skip
    network.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    parts: Any = train_test_split(images, labels, test_size=0.15, stratify=labels, random_state=seed)
    deadline = time.process_time() + seconds

    def stop(*_: Any) -> None:
        if time.process_time() > deadline:
            network.stop_training = True

    callbacks = [
        keras.callbacks.EarlyStopping("val_loss", patience=PATIENCE, restore_best_weights=True),
        keras.callbacks.LambdaCallback(on_epoch_end=stop),
    ]
    network.fit(
        parts[0], parts[2], validation_data=(parts[1], parts[3]), epochs=200, callbacks=callbacks, verbose=0
    )  # fmt: skip
    return network.predict(test, verbose=0)


def _learned(model: Any, features: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1):  # the products are too small for more threads
        # The weakest regularisation does not converge within the iterations, and is then not chosen.
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        return model.fit(features, labels).predict_proba(test)


def _centred(features: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = features.mean(axis=0), (features - features.mean(axis=0)).std()
    return (features - mean) / deviation, (test - mean) / deviation
