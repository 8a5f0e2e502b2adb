"""The Frechet distance of groups of samples as large as the held-out set."""

import numpy as np

from ant_jax.evaluation.metrics import Metric
from ant_jax.evaluation.metrics.frechet import frechet_distance
from ant_jax.evaluation.moments import gaussian, moments


def group_frechet() -> Metric:
    """``group_frechet_distance``, which can be compared with the distance of the held-out images.

    The samples are split, in order, into groups as large as the held-out set; a remainder is left
    out. The figure is the mean of the groups' Frechet distances to the real images. It is absent if
    there are fewer samples than held-out images, or if there are no more held-out images than
    features, which is too few for a covariance.

    Figures:
      group_frechet_distance: the Frechet distance of as many samples as there are held-out images,
        the mean over groups of samples | squared units of the features | 0 and above | low, near
        `real_frechet_distance`
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

    features = frozenset({"features"})
    return Metric(
        measure, moments=features, samples=features, lowest_is_best="group_frechet_distance"
    )
