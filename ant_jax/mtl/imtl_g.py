"""IMTL-G: an update of equal projections on all gradients (Liu et al., 2021)."""

import jax.numpy as jnp

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.spectrum import equal_projections
from ant_jax.mtl.weighting import Weighting, check_arguments

_LEAST_SUM = 0.01


def imtl_g(k: int) -> Weighting:
    r"""IMTL-G: impartial multi-task learning by the gradients.

    :math:`w = v / \sum_i v_i,\ v = G^{-1} n,\ n_i = \sqrt{G_{ii}}`: the update has equal
    projections on all gradients (Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021).
    Use it if the update should have the same angle to all gradients, whatever their lengths. Single
    weights may be negative. If gradients depend on each other, the inverse is the pseudo-inverse of
    their cosines. Gradients that cancel get weight 0.

    For three or more tasks the sum of v can be negative. The update of the paper then increases all
    losses. Here v is divided by the absolute value of its sum, so the update decreases them. The
    divisor is at least 0.01 of :math:`\sum_i |v_i|`, so that the weights are bounded. In all other
    cases the rule is the paper's.

    Example::

      tx = optax.chain(mtl.combine(mtl.imtl_g(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(imtl_g, k)

    def weigh(stats, state):
        unit = unit_gram(stats.gram, stats.present)
        shortest = jnp.where(unit.active, unit.norms, jnp.inf).min()
        # In units that keep the largest number at about 1.
        v = equal_projections(unit).v * jnp.where(unit.active, shortest / unit.norms, 0)
        total = jnp.maximum(jnp.abs(v.sum()), _LEAST_SUM * jnp.abs(v).sum())
        return v / jnp.where(total > 0, total, 1), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
