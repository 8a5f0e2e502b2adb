"""Mean and covariance of batches of features, in NumPy and float64."""

from typing import NamedTuple

import numpy as np


class Gaussian(NamedTuple):
    """What `frechet_distance` compares: `frechet_distance(*a, *b)`.

    Attributes:
      mean: (d,) float64.
      cov: (d, d) float64, the unbiased covariance, as `covariance` gives it.
    """

    mean: np.ndarray
    cov: np.ndarray


class Moments(NamedTuple):
    """Sums that give mean and covariance, and that can be merged.

    Attributes:
      count: Number of feature vectors.
      mean: (d,) their mean.
      scatter: (d, d) sum of the outer products of their deviations from the mean.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # not that of a tuple
    mean: np.ndarray
    scatter: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Returns the moments of features of shape (n, d).

    Raises:
      ValueError: If the features are not a non-empty matrix of finite numbers.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be a non-empty (n, d) array, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite")
    mean = features.mean(axis=0)
    deviations = features - mean
    return Moments(len(features), mean, deviations.T @ deviations)


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets of features of the same width.

    Chan, Golub & LeVeque, *Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances*, 1979, eq. 2.1. Unlike raw second moments, it loses no digits when the mean is large.

    Raises:
      ValueError: If the widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"cannot merge features of widths {a.mean.size} and {b.mean.size}")
    count = a.count + b.count
    delta = b.mean - a.mean
    return Moments(
        count,
        a.mean + delta * (b.count / count),
        a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count),
    )


def covariance(statistics: Moments) -> np.ndarray:
    """Returns the unbiased covariance (d, d).

    Raises:
      ValueError: If there are fewer than two samples.
    """
    if statistics.count < 2:
        raise ValueError(
            f"a covariance needs at least 2 samples, got {statistics.count}: give more samples"
        )
    return statistics.scatter / (statistics.count - 1)


def gaussian(statistics: Moments) -> Gaussian:
    """Returns mean and covariance.

    Raises:
      ValueError: If there are fewer than two samples.
    """
    return Gaussian(statistics.mean, covariance(statistics))
