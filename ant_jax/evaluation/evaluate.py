"""Metrics of generated images against real ones."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ant_jax.data import sources
from ant_jax.evaluation import digits
from ant_jax.evaluation.frechet import Moments, covariance, frechet_distance, merge, moments


class Extractor(NamedTuple):
    """What samples are judged by: a network, and its features of the real images.

    Attributes:
      features: uint8 images (n, height, width, channels) -> features (n, d).
      predict: The same images -> labels (n,).
      test_accuracy: Share of the held-out images that `predict` labels correctly.
      train_features: (n, d) of the real training images.
      held_out_features: (n, d) of real images that no model has seen.
    """

    features: Callable[[np.ndarray], np.ndarray]
    predict: Callable[[np.ndarray], np.ndarray]
    test_accuracy: float
    train_features: np.ndarray
    held_out_features: np.ndarray


def _digits(cache_dir: str | os.PathLike | None) -> Extractor:
    classifier = digits.load_classifier(cache_dir)
    features = functools.partial(digits.features, classifier)
    return Extractor(
        features,
        functools.partial(digits.predict, classifier),
        classifier.test_accuracy,
        features(sources.digits("train").images),
        features(sources.digits("test").images),
    )


_EXTRACTORS = {"digits": _digits}


def extractor(name: str, cache_dir: str | os.PathLike | None = None) -> Extractor:
    """Returns a feature extractor by name.

    Args:
      name: "digits".
      cache_dir: Where weights are kept; None is the user's cache directory.

    Returns:
      The extractor.

    Raises:
      ValueError: If there is no such extractor.
    """
    if name not in _EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; use one of {', '.join(_EXTRACTORS)}")
    return _EXTRACTORS[name](cache_dir)


def sample_metrics(
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]], model: Extractor
) -> dict[str, float]:
    """Judges generated images, one batch in memory at a time.

    Args:
      batches: Pairs of uint8 images (n, height, width, channels) and the labels (n,) that they
        were generated for, or None.
      model: From `extractor`.

    Returns:
      frechet_distance: Squared Frechet distance to the real training images. Its bias falls with
        the number of samples, so compare only equal numbers, and with `real_floor`.
      label_accuracy: Share of the labelled samples that the classifier gives their label; absent
        where no sample has a label.
      classifier_test_accuracy: The same share for held-out real images: the best to hope for.
      num_samples: Number of generated images.

    Raises:
      ValueError: If there are fewer than two samples, or labels don't match their images.
    """
    total: Moments | None = None
    correct = labelled = 0
    for images, labels in batches:
        part = moments(model.features(images))
        total = part if total is None else merge(total, part)
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(images),):
                raise ValueError(f"{len(images)} images came with labels of shape {labels.shape}")
            correct += int(np.sum(model.predict(images) == labels))
            labelled += len(images)
    if total is None:
        raise ValueError("no samples to judge")
    metrics = {
        "frechet_distance": _distance(total, moments(model.train_features)),
        "classifier_test_accuracy": model.test_accuracy,
        "num_samples": total.count,
    }
    if labelled:
        metrics["label_accuracy"] = correct / labelled
    return metrics


def real_floor(model: Extractor) -> dict[str, float]:
    """What real images score: the scale on which to read `sample_metrics`.

    The floor is the distance of the held-out images to the training images, for a perfect generator
    is nothing but a source of further held-out images. The estimate is biased upwards for few
    images, so a perfect generator judged by more than `num_samples` of them can score below it.

    The halves show how much of a distance is chance. Their shares of the classes differ by chance
    too, where the held-out images have exactly those of the training images: compare them with
    samples of randomly drawn labels, and the floor with samples of evenly spread ones.

    Args:
      model: From `extractor`.

    Returns:
      frechet_distance: The floor, held-out against training images.
      num_samples: Number of held-out images.
      halves_frechet_distance: Mean distance between two random halves of the training images over
        ten fixed draws.
      halves_num_samples: Number of images in a half.
    """
    train, held_out = model.train_features, model.held_out_features
    half = len(train) // 2
    rng = np.random.default_rng(0)
    halves = []
    for _ in range(10):
        order = rng.permutation(len(train))
        first, second = train[order[:half]], train[order[half : 2 * half]]
        halves.append(_distance(moments(first), moments(second)))
    return {
        "frechet_distance": _distance(moments(held_out), moments(train)),
        "num_samples": len(held_out),
        "halves_frechet_distance": float(np.mean(halves)),
        "halves_num_samples": half,
    }


def _distance(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, covariance(a), b.mean, covariance(b))
