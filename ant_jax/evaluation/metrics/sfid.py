"""The sFID."""

from ant_jax.evaluation.metrics import Metric
from ant_jax.evaluation.metrics.frechet import frechet_distance


def sfid() -> Metric:
    """``sfid``: the squared Frechet distance of spatial features.

    Nash et al., *Generating Images with Sparse Representations*, 2021. The features are the first 7
    channels at the 17 x 17 positions of Inception's layer `mixed_6/conv`, so they depend on where
    things are in the image.

    Figures:
      sfid: the Frechet distance of spatial features | squared units of the features | 0
        and above | low
    """

    def measure(samples, reference):
        real = reference.summary.gaussians["spatial"]
        return {"sfid": frechet_distance(*samples.gaussians["spatial"], *real)}

    return Metric(measure, moments=frozenset({"spatial"}), lowest_is_best="sfid")
