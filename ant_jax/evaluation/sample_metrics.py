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
        the number of samples, so compare only equal numbers.
      group_frechet_distance: Mean distance of groups of as many samples as there are held-out
        images: the figure to compare with `real_floor`. Absent where there are fewer samples.
      label_accuracy: Share of the labelled samples that the classifier gives their label; absent
        where no sample has a label.
      classifier_test_accuracy: The same share for held-out real images: the best to hope for.
      num_samples: Number of generated images.

    Raises:
      ValueError: If there are fewer than two samples, or labels don't match their images.
    """
    real = moments(model.train_features)
    group_size = len(model.held_out_features)
    total: Moments | None = None
    waiting = model.train_features[:0]
    groups = []
    correct = labelled = 0
    for images, labels in batches:
        features = model.features(images)
        part = moments(features)
        total = part if total is None else merge(total, part)
        waiting = np.concatenate([waiting, features])
        while len(waiting) >= group_size:
            groups.append(_distance(moments(waiting[:group_size]), real))
            waiting = waiting[group_size:]
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
    return metrics | {
        "classifier_test_accuracy": model.test_accuracy,
        "num_samples": total.count,
    }


def real_floor(model: Extractor) -> dict[str, float]:
    """What real images score: the scale on which to read ``group_frechet_distance``.

    A perfect generator is a source of further held-out images. Their distance to the training
    images is above zero because they are few; so is that of as many samples. A model that has
    learnt its training images by heart scores below the floor.

    Args:
      model: From `extractor`.

    Returns:
      frechet_distance: Distance of the held-out images to the training images.
      num_samples: Number of held-out images.
    """
    held_out = moments(model.held_out_features)
    return {
        "frechet_distance": _distance(held_out, moments(model.train_features)),
        "num_samples": held_out.count,
    }


def _distance(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, covariance(a), b.mean, covariance(b))
