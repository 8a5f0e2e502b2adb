"""The sFID."""

from ant_jax.evaluation.metrics import Metric
from ant_jax.evaluation.metrics.frechet import frechet_distance


def sfid() -> Metric:
    """``sfid``: the squared Frechet distance of spatial features.

    Nash et al., *Generating Images with Sparse Representations*, 2021: of Inception's first 7
    channels of the 17 x 17 positions of the layer `mixed_6/conv`, which see where things are.
    """

    def measure(samples, reference):
        real = reference.summary.gaussians["spatial"]
        return {"sfid": frechet_distance(*samples.gaussians["spatial"], *real)}

    return Metric(measure, moments=frozenset({"spatial"}))
