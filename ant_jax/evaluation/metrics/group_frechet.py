"""The Frechet distance of groups of samples that are as large as the held-out set."""

import numpy as np

from ant_jax.evaluation.metrics import Metric
from ant_jax.evaluation.metrics.frechet import frechet_distance
from ant_jax.evaluation.moments import gaussian, moments


def group_frechet() -> Metric:
    """``group_frechet_distance``: what to compare with the distance of the held-out images.

    The mean of the Frechet distances of groups of as many samples, in their order, as there are
    held-out images, to the real images; a rest is left out. Absent where there are fewer samples,
    or no more held-out images than features, too few for a covariance.
    """

    def measure(samples, reference):
        features, held_out = samples.kept["features"], reference.held_out
        size = 0 if held_out is None else held_out.count
        if size <= features.shape[1] or len(features) < size:
            return {}
        real = reference.summary.gaussians["features"]
        distances = [
            frechet_distance(*gaussian(moments(features[first : first + size])), *real)
            for first in range(0, len(features) - size + 1, size)
        ]
        return {"group_frechet_distance": float(np.mean(distances))}

    return Metric(measure, moments=frozenset({"features"}), samples=frozenset({"features"}))
