"""A small classifier of the 8x8 digits, whose features evaluate generated digits.

Inception was not trained for 8x8 images. This network is trained once, in seconds, on the training
split alone, so its accuracy on the held-out images is unbiased.
"""

import functools
import itertools
import os
import pathlib
from typing import NamedTuple

import numpy as np
from absl import logging
from threadpoolctl import threadpool_limits

from ant_jax import data
from ant_jax.evaluation.features import Extractor, Network
from ant_jax.runtime import files
from ant_jax.runtime.tree_hash import tree_hash

# Part of the cache file's name: increase it whenever the recipe or the split changes.
_VERSION = 2
_SIZES = (64, 256, 64, 10)

# Training: Adam (Kingma & Ba, 2015) on the cross entropy, until it stops falling.
_RATE, _DECAY1, _DECAY2, _EPSILON = 1e-3, 0.9, 0.999, 1e-8
_BATCH, _WEIGHT_DECAY = 200, 1e-4
_EPOCHS, _PATIENCE, _TOLERANCE = 200, 10, 1e-4


class DigitsClassifier(NamedTuple):
    """A ReLU network, image (64,) -> hidden (256,) -> features (64,) -> logits (10,).

    Attributes:
      weights: Matrices (inputs, outputs), one a layer.
      biases: Vectors (outputs,), one a layer.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]


def digits() -> Extractor:
    """The classifier of the 8x8 digits; it is trained once, in seconds.

    Its outputs: "features", the 64 float64 of the last hidden layer; "labels", the digit that it
    predicts; "pixels", the uint8 image itself.
    """
    return Extractor(
        {"features": (_SIZES[-2],), "labels": (), "pixels": (8, 8, 1)}, _check, _network
    )


def _check(height, width, channels):
    if (height, width) != (8, 8) or channels not in (None, 1):
        size = f"{height}x{width} pixels" + (f" in {channels} channels" if channels else "")
        raise ValueError(f"evaluates grey images of 8x8 pixels, not of {size}")


# If no file can be written, the classifier is trained once in each process.
@functools.cache
def _network():
    classifier = load_classifier()

    def outputs(batches):
        for images in batches:
            found = features(classifier, images)
            labels = _logits(classifier, found).argmax(axis=-1)
            yield {"features": found, "labels": labels, "pixels": images}

    return Network(outputs, tree_hash(classifier._asdict()))


def load_classifier(cache_dir: str | os.PathLike | None = None) -> DigitsClassifier:
    """Reads the trained classifier from the cache, or trains it in a few seconds.

    Training is deterministic. A cache file that cannot be read is replaced. If no file can be
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
        except Exception as error:  # A damaged file can raise almost any type of error.
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
    return _logits(classifier, features(classifier, images)).argmax(axis=-1)


def _logits(classifier, found):
    return found @ classifier.weights[-1] + classifier.biases[-1]


def _inputs(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


def _train() -> DigitsClassifier:
    """Trains on the training images alone. Results differ only by the rounding of sums."""
    train = data.digits("train")
    images, wanted = _inputs(train.images), np.eye(_SIZES[-1])[train.labels]
    random = np.random.RandomState(0)
    weights, biases = [], []
    for sizes in itertools.pairwise(_SIZES):
        # Glorot & Bengio, 2010.
        bound = np.sqrt(6 / sum(sizes))
        weights.append(random.uniform(-bound, bound, sizes))
        biases.append(random.uniform(-bound, bound, sizes[1]))
    params = weights + biases
    means, squares = ([np.zeros_like(each) for each in params] for _ in range(2))
    order = np.arange(len(images))
    best, waited, step = np.inf, 0, 0
    # The matrices are small: on a busy machine, threads waiting for each other cost a factor of 20.
    with threadpool_limits(1):
        for _ in range(_EPOCHS):
            order = order[random.permutation(len(order))]
            total = 0.0
            for first in range(0, len(order), _BATCH):
                rows = order[first : first + _BATCH]
                loss, gradients = _loss(weights, biases, images[rows], wanted[rows])
                total += loss * len(rows)
                step += 1
                rate = _RATE * np.sqrt(1 - _DECAY2**step) / (1 - _DECAY1**step)
                for i, gradient in enumerate(gradients):
                    means[i] = _DECAY1 * means[i] + (1 - _DECAY1) * gradient
                    squares[i] = _DECAY2 * squares[i] + (1 - _DECAY2) * gradient**2
                    params[i] -= rate * means[i] / (np.sqrt(squares[i]) + _EPSILON)
            loss = total / len(images)
            waited = waited + 1 if loss > best - _TOLERANCE else 0
            best = min(best, loss)
            if waited > _PATIENCE:
                break
    return DigitsClassifier(tuple(weights), tuple(biases))


def _loss(weights, biases, inputs, wanted):
    """Mean cross entropy with weight decay, and its gradients for the weights and the biases."""
    layers = [inputs]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        layers.append(np.maximum(layers[-1] @ weight + bias, 0))
    logits = layers[-1] @ weights[-1] + biases[-1]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    smallest = np.finfo(np.float64).eps
    entropies = wanted * np.log(np.clip(shares, smallest, 1 - smallest))
    decay = sum(np.dot(weight.ravel(), weight.ravel()) for weight in weights)
    loss = -entropies.mean(axis=0).sum() + 0.5 * _WEIGHT_DECAY * decay / len(inputs)

    delta, by_weights, by_biases = shares - wanted, [], []
    for layer, weight in zip(reversed(layers), reversed(weights), strict=True):
        by_weights.append((layer.T @ delta + _WEIGHT_DECAY * weight) / len(inputs))
        by_biases.append(delta.sum(axis=0) / len(inputs))
        delta = (delta @ weight.T) * (layer > 0)
    return loss, by_weights[::-1] + by_biases[::-1]


def _read(path: pathlib.Path) -> DigitsClassifier:
    layers = range(len(_SIZES) - 1)
    with np.load(path, allow_pickle=False) as stored:
        return DigitsClassifier(
            tuple(stored[f"weight{i}"] for i in layers),
            tuple(stored[f"bias{i}"] for i in layers),
        )


def _write(path: pathlib.Path, classifier: DigitsClassifier) -> None:
    arrays = {}
    for i, (weight, bias) in enumerate(zip(classifier.weights, classifier.biases, strict=True)):
        arrays |= {f"weight{i}": weight, f"bias{i}": bias}
    with files.writing(path) as file:
        np.savez(file, **arrays)
