"""Features of many images in little memory: moments, and some of the features themselves."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ant_jax.evaluation.metrics.frechet import Moments, covariance, merge, moments
from ant_jax.evaluation.reference import Gaussian, Statistics
from ant_jax.models.inception import Features

# Images whose moments are computed together: few merges of large matrices, and little memory.
_TOGETHER = 4096


class Summary(NamedTuple):
    """What is known of a set of images.

    Attributes:
      count: Number of images.
      statistics: Of all of them.
      pool: float32 (m, 2048), pool features of the first m images.
      logits: float32 (m, 1008), theirs.
    """

    count: int
    statistics: Statistics
    pool: np.ndarray
    logits: np.ndarray


def summarise(features: Iterable[Features], keep: int | None = None) -> Summary:
    """Works features off batch by batch.

    Args:
      features: In batches.
      keep: Of how many images the features are kept; None for all.

    Raises:
      ValueError: If there are fewer than two images, or features are not finite.
    """
    pool, logits, waiting = [], [], []
    kept = 0
    sums: tuple[Moments, ...] | None = None
    for part in features:
        room = len(part.pool) if keep is None else min(keep - kept, len(part.pool))
        if room:
            pool.append(part.pool[:room])
            logits.append(part.logits[:room])
            kept += room
        waiting.append(part)
        if sum(len(each.pool) for each in waiting) >= _TOGETHER:
            sums, waiting = _added(sums, waiting), []
    if waiting:
        sums = _added(sums, waiting)
    if sums is None:
        raise ValueError("no images to judge")
    gaussians = [Gaussian(each.mean, covariance(each)) for each in sums]
    return Summary(
        sums[0].count, Statistics(*gaussians), np.concatenate(pool), np.concatenate(logits)
    )


def _added(sums, parts):
    new = tuple(
        moments(np.concatenate([getattr(part, name) for part in parts]))
        for name in ("pool", "spatial")
    )
    return new if sums is None else tuple(map(merge, sums, new))
