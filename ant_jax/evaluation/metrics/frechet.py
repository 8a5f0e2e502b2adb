"""The Frechet distance between two sets of features, which is the FID for those of Inception."""

import numpy as np
from threadpoolctl import threadpool_limits

from ant_jax.evaluation.metrics import Metric


def frechet() -> Metric:
    """``frechet_distance``: the squared Frechet distance of the features to those of real images.

    With Inception's features it is called "fid" (Heusel et al. 2017). Its bias falls with the
    number of samples, so compare only equal numbers. Samples of a perfect generator are like
    held-out images, whose distance ``real_frechet_distance`` is above zero because they are few. A
    model that has memorised its training images scores below it.

    Figures:
      frechet_distance: distance between two Gaussians, of the features of samples and of real
        images | squared units of the features | 0 and above | low
    """

    def measure(samples, reference):
        real = reference.summary.gaussians["features"]
        return {"frechet_distance": frechet_distance(*samples.gaussians["features"], *real)}

    name = "frechet_distance"
    return Metric(
        measure,
        moments=frozenset({"features"}),
        floors=frozenset({name}),
        lowest_is_best=name,
    )


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
    """Returns L (d, rank) with L L^T = cov, up to rounding errors."""
    # Imported here, because it takes a third of a second and training does not need it.
    from scipy.linalg import lapack

    # scipy finds it at run time.
    dpstrf = lapack.dpstrf  # pyright: ignore[reportAttributeAccessIssue]
    factor, order, rank, _ = dpstrf((cov + cov.T) / 2, lower=1)
    rows = np.empty((len(cov), rank))
    rows[order - 1] = np.tril(factor)[:, :rank]
    return rows
