"""DualProj: the mean gradient, projected on the dual cone (Lopez-Paz and Ranzato, 2017)."""

import jax.numpy as jnp

from ant_jax.mtl.cone import dual_cone_weights, unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments


def dualproj(k: int) -> Weighting:
    r"""DualProj: the vector nearest to the mean gradient that conflicts with no gradient.

    :math:`w = \arg\min_{v \ge 1/k} v^T G v`: the projection of GEM (Lopez-Paz and Ranzato,
    *Gradient Episodic Memory for Continual Learning*, NeurIPS 2017, eq. 11), named DualProj by
    Quinton and Rey (*Jacobian Descent for Multi-Objective Optimization*, 2024). Use it if the mean
    loss counts but no loss may rise. Long gradients decide the mean; `upgrad` projects each
    gradient before it takes the mean.

    Example::

      tx = optax.chain(mtl.combine(mtl.dualproj(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(dualproj, k)

    def weigh(stats, state):
        unit = unit_gram(stats.gram, stats.present)
        mean = stats.present / jnp.maximum(stats.present.sum(), 1).astype(jnp.float32)
        return dual_cone_weights(unit, mean), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
