"""Improved precision and recall of generated samples, in NumPy and float64."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ant_jax.evaluation.metrics import Metric

_NEIGHBOURS = 3
# Bounds the memory: distances of a block.
_BLOCK_SIZE = 2**23
# Bounds the memory: feature vectors whose differences are taken at once.
_CHUNK = 1024


class PrecisionRecall(NamedTuple):
    """The share of samples that are realistic, and the share of real images that samples cover.

    Attributes:
      precision: Share of the generated images that lie in the manifold of the real ones.
      recall: Share of the real images that lie in the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall() -> Metric:
    """``precision`` and ``recall`` with 3 neighbours: see `precision_and_recall`.

    Absent if there are only 3 real images or samples, or fewer.

    Figures:
      precision: samples that lie near real images, in the features | share | 0 to 1 | high
      recall: real images, of at most 10 000, that lie near samples | share | 0 to 1 | high
    """

    def measure(samples, reference):
        real, fake = reference.summary.kept["features"], samples.kept["features"]
        if min(len(real), len(fake)) <= _NEIGHBOURS:
            return {}
        return precision_and_recall(real, fake, _NEIGHBOURS)._asdict()

    features = frozenset({"features"})
    return Metric(measure, samples=features, real=features)


def precision_and_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of generated features against real ones.

    Kynkaanniemi et al., *Improved Precision and Recall Metric for Assessing Generative Models*,
    2019, eq. 1 and 2. A set's manifold is the union of closed balls around its points. Each ball
    reaches to the k-th nearest other point of the set, so its radius is 0 if the point has k
    copies. Both shares depend on the numbers of images, so compare only equal numbers. Dhariwal &
    Nichol, *Diffusion Models Beat GANs*, 2021, use k = 3, Inception's 2048 pool features, 50 000
    generated images and 10 000 real ones. Their program computes distances in float16 where they
    are finite there, so its last digits may differ.

    The result is exactly that of comparing sums of squared differences in float64, ties included,
    at the price of a matrix product. With u = 2^-53, the expansion |a|^2 - 2ab + |b|^2 of centred
    features has an error of at most (d + 5) u (|a| + |b|)^2, whatever the order of its sums. The
    sum of squared differences has an error of at most (d + 2) u (|a| + |b|)^2. If a comparison is
    clear beyond the sum of both bounds, the expansion decides it. Otherwise, in practice for ties
    and copies, the squared differences decide it.

    Args:
      real: (n, d) features of real images.
      fake: (m, d) features of generated images.
      k: A ball reaches to the k-th nearest neighbour.

    Returns:
      Precision and recall. The memory is that of one of the sets in float64, and a few hundred MB.

    Raises:
      ValueError: If the features are not matrices of finite numbers with the same width, if a set
        has k points or fewer, or if k is not positive.
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"{name} features must be an (n, d) array, got {features.shape}")
        if len(features) <= k:
            raise ValueError(f"k = {k} needs more than {k} {name} features, got {len(features)}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} features are not finite")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"real features have the width {real.shape[1]}, but fake features have the width "
            f"{fake.shape[1]}"
        )
    return PrecisionRecall(
        precision=float(_inside(fake, real, _radii(real, k)).mean()),
        recall=float(_inside(real, fake, _radii(fake, k)).mean()),
    )


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Returns each point's squared distance to its k-th nearest other point, (n,)."""
    radii = np.empty(len(points))
    for start, squared, errors in _blocks(points, points):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf
        near = np.argpartition(squared, k - 1, axis=1)[:, :k]
        for i in rows:
            point = points[start + i]
            # The k-th nearest point is no further than the furthest of any k points.
            radius = _differences(point, points, near[i]).max()
            others = np.flatnonzero(squared[i] <= radius + errors[i])
            # No point is nearer than 0, so for copies the other differences are not needed.
            if radius > 0 and len(others) > k:
                radius = np.partition(_differences(point, points, others), k - 1)[k - 1]
            radii[start + i] = radius
    return radii


def _inside(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Returns whether each point lies in a ball, (n,) bool; the radii are squared."""
    inside = np.empty(len(points), bool)
    for start, squared, errors in _blocks(points, centres):
        squared -= radii
        nearest = squared.min(axis=1)
        inside[start : start + len(squared)] = nearest < -errors
        for i in np.flatnonzero(np.abs(nearest) <= errors):
            unsure = np.flatnonzero(squared[i] <= errors[i])
            differences = _differences(points[start + i], centres, unsure)
            inside[start + i] = (differences <= radii[unsure]).any()
    return inside


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields the first row, squared distances (rows, m), and bounds (rows,) of their errors."""
    mean = b.mean(axis=0, dtype=np.float64)
    # Centred features lose fewer digits in the expansion.
    b = b - mean
    squares = np.einsum("ij,ij->i", b, b)
    largest = np.sqrt(squares.max())
    rows = max(1, _BLOCK_SIZE // len(b))
    for start in range(0, len(a), rows):
        block = a[start : start + rows] - mean
        own = np.einsum("ij,ij->i", block, block)
        squared = block @ b.T
        squared *= -2
        squared += own[:, None]
        squared += squares
        # eps is 2 u, and the bounds add up to (2 d + 7) u. The rest is for errors of this line.
        errors = np.finfo(np.float64).eps * (a.shape[1] + 8) * (np.sqrt(own) + largest) ** 2
        yield start, squared, errors


def _differences(point: np.ndarray, others: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the squared distances of a point (d,) to some rows of others."""
    point = point.astype(np.float64)
    squared = []
    for i in range(0, len(rows), _CHUNK):
        differences = others[rows[i : i + _CHUNK]] - point
        # This sum has the same order for every row, so equal distances are equal numbers.
        squared.append(np.sum(differences * differences, axis=1))
    return np.concatenate(squared)
