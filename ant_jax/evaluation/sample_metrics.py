"""Metrics of generated images against real ones."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ant_jax import data
from ant_jax.evaluation.features import digits
from ant_jax.evaluation.metrics.frechet import Moments, covariance, frechet_distance, merge, moments
from ant_jax.evaluation.metrics.nearest import nearest_distances


class Extractor(NamedTuple):
    """What samples are judged by: a network, and the real images as it and as pixels show them.

    Attributes:
      features: uint8 images (n, height, width, channels) -> features (n, d).
      predict: The same images -> labels (n,).
      test_accuracy: Share of the held-out images that `predict` labels correctly.
      train_features: (n, d) of the real training images.
      held_out_features: (n, d) of real images that no model has seen.
      train_images: uint8 (n, height, width, channels), the real training images.
      held_out_distances: (n,) from each held-out image to the nearest training image.
    """

    features: Callable[[np.ndarray], np.ndarray]
    predict: Callable[[np.ndarray], np.ndarray]
    test_accuracy: float
    train_features: np.ndarray
    held_out_features: np.ndarray
    train_images: np.ndarray
    held_out_distances: np.ndarray


def _digits(cache_dir: str | os.PathLike | None) -> Extractor:
    classifier = digits.load_classifier(cache_dir)
    features = functools.partial(digits.features, classifier)
    train, held_out = data.digits("train").images, data.digits("test").images
    return Extractor(
        features,
        functools.partial(digits.predict, classifier),
        classifier.test_accuracy,
        features(train),
        features(held_out),
        train,
        nearest_distances(held_out, train),
    )


_EXTRACTORS = {"digits": _digits}


@functools.cache
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
        the number of samples, so compare only equal numbers.
      group_frechet_distance: Mean distance of groups of as many samples as there are held-out
        images: the figure to compare with `real_floor`. Absent where there are fewer samples.
      label_accuracy: Share of the labelled samples that the classifier gives their label; absent
        where no sample has a label.
      classifier_test_accuracy: The same share for held-out real images: the best to hope for.
      nearest_train_distance: Mean Euclidean distance to the nearest training image, in pixel values
        scaled to [0, 1]. Below that of `real_floor` the samples are repetitions of training images
        (compare Meehan, Chaudhuri & Dasgupta, *A Non-Parametric Test to Detect Data-Copying in
        Generative Models*, 2020) or smooth, and a low Frechet distance may be no merit.
      copies: Share of the samples that are as near to a training image as only the nearest 1 % of
        the held-out images are; so about 0.01 is the figure of a perfect generator.
      num_samples: Number of generated images.

    Raises:
      ValueError: If there are fewer than two samples, or labels don't match their images.
    """
    real = moments(model.train_features)
    group_size = len(model.held_out_features)
    total: Moments | None = None
    waiting = model.train_features[:0]
    groups, distances = [], []
    correct = labelled = 0
    for images, labels in batches:
        features = model.features(images)
        part = moments(features)
        total = part if total is None else merge(total, part)
        waiting = np.concatenate([waiting, features])
        while len(waiting) >= group_size:
            groups.append(_distance(moments(waiting[:group_size]), real))
            waiting = waiting[group_size:]
        distances.append(nearest_distances(images, model.train_images))
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(images),):
                raise ValueError(f"{len(images)} images came with labels of shape {labels.shape}")
            correct += int(np.sum(model.predict(images) == labels))
            labelled += len(images)
    if total is None:
        raise ValueError("no samples to judge")
    metrics = {"frechet_distance": _distance(total, real)}
    if groups:
        metrics["group_frechet_distance"] = float(np.mean(groups))
    if labelled:
        metrics["label_accuracy"] = correct / labelled
    nearest = np.concatenate(distances)
    return metrics | {
        "classifier_test_accuracy": model.test_accuracy,
        "nearest_train_distance": float(nearest.mean()),
        # At the threshold too: exact copies count even if 1 % of the held-out images are some.
        "copies": float(np.mean(nearest <= np.percentile(model.held_out_distances, 1))),
        "num_samples": total.count,
    }


def real_floor(model: Extractor) -> dict[str, float]:
    """What real images score: the scale on which to read ``group_frechet_distance``.

    A perfect generator is a source of further held-out images. Their distance to the training
    images is above zero because they are few; so is that of as many samples. A model that has
    learnt its training images by heart scores below the floor, and so does its
    ``nearest_train_distance``.

    Args:
      model: From `extractor`.

    Returns:
      frechet_distance: Distance of the held-out images to the training images.
      nearest_train_distance: Their mean distance to the nearest of them in pixels; see
        `sample_metrics`.
      num_samples: Number of held-out images.
    """
    held_out = moments(model.held_out_features)
    return {
        "frechet_distance": _distance(held_out, moments(model.train_features)),
        "nearest_train_distance": float(model.held_out_distances.mean()),
        "num_samples": held_out.count,
    }


def _distance(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, covariance(a), b.mean, covariance(b))
