"""Krum: the gradients with the nearest neighbours alone (Blanchard et al., 2017)."""

from typing import Annotated

import jax.numpy as jnp

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Integer, check_integer


def krum(
    k: int, outliers: Annotated[int, Integer(0)] = 0, selected: Annotated[int, Integer(1)] = 1
) -> Weighting:
    r"""Krum and multi-Krum: the gradients with the nearest neighbours.

    :math:`w_i = 1/m\ \text{for the } m \text{ smallest of}\ \sum_{j \in N_i} (G_{ii} + G_{jj} - 2
    G_{ij})`, else 0. The sum runs over the k - f - 2 other gradients that are nearest to gradient
    i, and its terms are the squared distances (Blanchard et al., *Machine Learning with
    Adversaries: Byzantine Tolerant Gradient Descent*, NeurIPS 2017; m > 1 is its multi-Krum). Use
    it as a baseline that is robust to f gradients of any size and direction. All but m of the tasks
    get weight 0.

    TorchJD adds distances, not their squares, and selects other gradients in some cases. Equal sums
    share the weight: with one neighbour, the two nearest gradients always have the same. k counts
    the tasks that are present and have a gradient. At least one neighbour counts.

    Example::

      tx = optax.chain(mtl.combine(mtl.krum(5, outliers=1, selected=2)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      outliers: f, how many gradients may be arbitrary; at most k - 3.
      selected: m, how many gradients the update is the mean of; at most k.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or if there are too many outliers or selected gradients.
    """
    check_arguments(krum, k)
    check_integer("outliers", outliers, 0, max(k - 3, 0))
    check_integer("selected", selected, 1, k)

    def weigh(stats, state):
        cosines, norms, active = unit_gram(stats.gram, stats.present)
        lengths = jnp.where(active, norms, 0)
        lengths = lengths / jnp.maximum(lengths.max(), jnp.finfo(norms.dtype).tiny)
        # A sum of two terms >= 0, so nearly equal gradients do not cancel to a negative number.
        apart = (lengths[:, None] - lengths) ** 2
        distances = apart + 2 * lengths[:, None] * lengths * (1 - cosines)
        # Exactly symmetric, so that two nearest neighbours have exactly the same score.
        distances = (distances + distances.T) / 2
        others = active[:, None] & active & ~jnp.eye(k, dtype=bool)
        distances = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        number = active.sum()
        neighbours = jnp.clip(number - outliers - 2, 1, jnp.maximum(number - 1, 0))
        scores = jnp.where(jnp.arange(k) < neighbours, distances, 0).sum(1)
        scores = jnp.where(active, scores, jnp.inf)
        m = jnp.minimum(selected, number)
        last = jnp.sort(scores)[m - 1]
        below, equal = scores < last, active & (scores == last)
        share = (m - below.sum()) / jnp.maximum(equal.sum(), 1).astype(jnp.float32)
        return jnp.where(below, 1, jnp.where(equal, share, 0)) / jnp.maximum(m, 1), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
