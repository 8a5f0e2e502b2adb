"""Multi-task weightings and the optax transformation that applies them."""

from ant_jax.mtl.combine import CombineState, combine, init_combine, weigh, where_finite
from ant_jax.mtl.gramian import gramian, pairwise_cosines
from ant_jax.mtl.linear import linear
from ant_jax.mtl.nash import nash
from ant_jax.mtl.pcgrad import pcgrad
from ant_jax.mtl.uncertainty import uncertainty
from ant_jax.mtl.weighting import Weighting

__all__ = [
    "CombineState",
    "Weighting",
    "combine",
    "gramian",
    "init_combine",
    "linear",
    "nash",
    "pairwise_cosines",
    "pcgrad",
    "uncertainty",
    "weigh",
    "where_finite",
]
