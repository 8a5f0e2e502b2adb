"""UPGrad: the mean of the gradients, each projected on the dual cone (Quinton and Rey, 2024)."""

import jax
import jax.numpy as jnp

from ant_jax.mtl.cone import dual_cone_weights, unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments


def upgrad(k: int) -> Weighting:
    r"""UPGrad: unconflicting projection of gradients.

    The dual cone holds the vectors that have no negative inner product with a gradient. Each
    gradient is projected on it, and the update is the mean of the projections:
    :math:`w = \frac1k \sum_i \arg\min_{v \ge e_i} v^T G v` (Quinton and Rey, *Jacobian Descent for
    Multi-Objective Optimization*, 2024, arXiv 2406.16232, proposition 1). Use it if no loss may
    rise and each gradient should count by its length. The update conflicts with no gradient, and
    without conflicts it is the mean.

    The reference code adds 1e-4 of the trace to the diagonal of G, so its update may conflict with
    gradients that are 100 times shorter than others. Here a ridge of 1e-6 on the cosines keeps the
    result independent of the lengths.

    Example::

      tx = optax.chain(mtl.combine(mtl.upgrad(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(upgrad, k)

    def weigh(stats, state):
        present = stats.present
        unit = unit_gram(stats.gram, present)
        basis = jnp.where(present, jnp.eye(k, dtype=jnp.float32), 0)
        projections = jax.vmap(lambda e: dual_cone_weights(unit, e))(basis)
        return projections.sum(0) / jnp.maximum(present.sum(), 1), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
