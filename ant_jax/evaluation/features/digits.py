"""A small classifier of the 8x8 digits: the features and the judge of generated digits.

Inception knows nothing about 8x8 images. This network is trained once, in seconds, on the training
split alone, so that its accuracy on the held-out images is an honest one.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
from absl import logging

from ant_jax import data
from ant_jax.runtime import files
from ant_jax.runtime.extras import import_extra

# Part of the cache file's name: increase it whenever the recipe or the split changes.
_VERSION = 1
_HIDDEN = (256, 64)


class DigitsClassifier(NamedTuple):
    """A ReLU network, image (64,) -> hidden (256,) -> features (64,) -> logits (10,).

    Attributes:
      weights: Matrices (inputs, outputs), one a layer.
      biases: Vectors (outputs,), one a layer.
      test_accuracy: Share of the 300 held-out images that it classifies correctly.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    test_accuracy: float


def load_classifier(cache_dir: str | os.PathLike | None = None) -> DigitsClassifier:
    """Returns the trained classifier, from the cache or else by training it (a few seconds).

    Training is deterministic. A cache file that cannot be read is replaced; where none can be
    written, the next process trains again.

    Args:
      cache_dir: Where the weights are kept; None is `$XDG_CACHE_HOME/ant_jax`, by default
        `~/.cache/ant_jax`.

    Returns:
      The classifier.
    """
    cache_dir = files.user_cache() if cache_dir is None else pathlib.Path(cache_dir).expanduser()
    path = cache_dir and cache_dir / f"digits_classifier_v{_VERSION}.npz"
    if path is not None and os.path.exists(path):
        try:
            return _read(path)
        except Exception as error:  # Damaged bytes surface as almost any type of error.
            logging.warning("Training the digits classifier again: %s is damaged: %r", path, error)
    classifier = _train()
    if path is not None:
        with files.keeping("the digits classifier"):
            _write(path, classifier)
    return classifier


def features(classifier: DigitsClassifier, images: np.ndarray) -> np.ndarray:
    """Returns the last hidden layer, (n, 64) float64, for uint8 images (n, 8, 8, 1).

    Raises:
      ValueError: If the images have another shape or type.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (8, 8, 1):
        raise ValueError(f"need uint8 (n, 8, 8, 1), got {images.dtype} {images.shape}")
    hidden = _inputs(images)
    for weight, bias in zip(classifier.weights[:-1], classifier.biases[:-1], strict=True):
        hidden = np.maximum(hidden @ weight + bias, 0)
    return hidden


def predict(classifier: DigitsClassifier, images: np.ndarray) -> np.ndarray:
    """Returns the predicted digits, (n,) int, of uint8 images (n, 8, 8, 1).

    Raises:
      ValueError: If the images have another shape or type.
    """
    logits = features(classifier, images) @ classifier.weights[-1] + classifier.biases[-1]
    return logits.argmax(axis=-1)


def _inputs(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


def _train() -> DigitsClassifier:
    # It brings threadpoolctl.
    neural_network = import_extra("sklearn.neural_network", "experiments")
    from threadpoolctl import threadpool_limits

    train, test = data.digits("train"), data.digits("test")
    network = neural_network.MLPClassifier(_HIDDEN, random_state=0)
    # The matrices are small: on a busy machine, threads waiting for each other cost a factor of 20.
    with threadpool_limits(1):
        network.fit(_inputs(train.images), train.labels)
    classifier = DigitsClassifier(tuple(network.coefs_), tuple(network.intercepts_), np.nan)
    accuracy = np.mean(predict(classifier, test.images) == test.labels)
    return classifier._replace(test_accuracy=float(accuracy))


def _read(path: pathlib.Path) -> DigitsClassifier:
    layers = range(len(_HIDDEN) + 1)
    with np.load(path, allow_pickle=False) as stored:
        return DigitsClassifier(
            tuple(stored[f"weight{i}"] for i in layers),
            tuple(stored[f"bias{i}"] for i in layers),
            float(stored["test_accuracy"]),
        )


def _write(path: pathlib.Path, classifier: DigitsClassifier) -> None:
    arrays = {"test_accuracy": np.float64(classifier.test_accuracy)}
    for i, (weight, bias) in enumerate(zip(classifier.weights, classifier.biases, strict=True)):
        arrays |= {f"weight{i}": weight, f"bias{i}": bias}
    with files.writing(path) as file:
        np.savez(file, **arrays)
