"""The Frechet distance between two sets of features, in NumPy and float64."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits


class Moments(NamedTuple):
    """Sums from which mean and covariance follow, and which can be merged.

    Attributes:
      count: Number of feature vectors.
      mean: (d,) their mean.
      scatter: (d, d) sum of the outer products of their deviations from the mean.
    """

    count: int
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
    Variances*, 1979, eq. 2.1: unlike raw second moments it does not cancel when the mean is large.

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
        raise ValueError(f"a covariance needs at least 2 samples, got {statistics.count}")
    return statistics.scatter / (statistics.count - 1)


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """Squared Frechet (Wasserstein-2) distance between two Gaussians.

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2); Dowson & Landau 1982; "FID" when
    the features come from Inception (Heusel et al. 2017). The last trace is the sum of the singular
    values of A^T B for any A A^T = S1 and B B^T = S2, here from Cholesky decompositions with
    pivoting: always real, and accurate for singular covariances, where the root of a rounding error
    would be large.

    Args:
      mean1: (d,) mean of the first Gaussian.
      cov1: (d, d) its covariance.
      mean2: (d,) mean of the second Gaussian.
      cov2: (d, d) its covariance.

    Returns:
      The squared distance, in squared units of the features; never negative.

    Raises:
      ValueError: If the shapes don't fit or a number is not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
    d = mean1.size
    if (mean1.shape, mean2.shape) != ((d,), (d,)) or (cov1.shape, cov2.shape) != ((d, d), (d, d)):
        raise ValueError(
            "means must be (d,) and covariances (d, d), got "
            f"{mean1.shape}, {cov1.shape}, {mean2.shape}, {cov2.shape}"
        )
    if not all(np.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite")
    # On a busy machine these decompositions are many times slower with several threads, which wait
    # for each other: for d = 2048, minutes instead of seconds.
    with threadpool_limits(1):
        overlap = np.linalg.svd(_factor(cov1).T @ _factor(cov2), compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(0.0, float(distance))


def _factor(cov: np.ndarray) -> np.ndarray:
    """Returns L (d, rank) with L L^T = cov, but for numbers that are rounding errors beside it."""
    factor, order, rank, _ = lapack.dpstrf((cov + cov.T) / 2, lower=1)
    rows = np.empty((len(cov), rank))
    rows[order - 1] = np.tril(factor)[:, :rank]
    return rows
