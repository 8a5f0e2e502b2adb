"""COSMOS: a linear objective plus the cosine with a preference (Ruchte and Grabocka, 2021)."""

from typing import Annotated

import jax.numpy as jnp

from ant_jax.mtl.preference import Preference, preference_vector, restricted
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number


def cosmos(
    k: int, penalty: Annotated[float, Number(0)] = 0.01, preference: Preference = ()
) -> Weighting:
    r"""COSMOS: a linear scalarisation that rewards losses in the direction of a preference.

    :math:`w = p - \frac{\lambda}{\|L\|} \left( \frac{p}{\|p\|} - \cos(p, L) \frac{L}{\|L\|}
    \right)` for a preference p of sum 1: the gradient of :math:`p^T L - \lambda \cos(p, L)` (Ruchte
    and Grabocka, *Scalable Pareto Front Approximation for Deep Multi-Objective Learning*, ICDM
    2021). Use it if a linear scalarisation should keep the proportions of the losses near those of
    p. Another method with this aim, `pbi`, does not depend on the scale of the losses.

    This is the objective alone. The whole method draws p from a Dirichlet distribution at each step
    and gives it to the network as an input, which a weighting can not. The first term does not
    depend on the scale of the losses, the second is inverse to it, so :math:`\lambda` must fit
    them; the authors use 0.01 to 8, by data set. With a large :math:`\lambda / \|L\|` weights are
    negative: the method then increases those losses.

    Example::

      tx = optax.chain(mtl.combine(mtl.cosmos(3, preference=(0.2, 0.3, 0.5))), optax.adam(1e-3))

    Args:
      k: number of tasks.
      penalty: the factor of the cosine.
      preference: p, k numbers > 0; () for equal ones. Here it is divided by its sum.

    Returns:
      A stateless `Weighting` that needs the losses. Identical gradients g of losses in the
      direction of p give the update g.

    Raises:
      ValueError: if k < 1, or there are not k preferences > 0.
    """
    check_arguments(cosmos, k, penalty=penalty)
    preferred = preference_vector(k, preference)

    def weigh(stats, state):
        present = stats.present
        losses = jnp.where(present, stats.losses, 0)
        largest = jnp.abs(losses).max()
        known = largest > 0
        # Squares of losses in units of the largest neither overflow nor vanish.
        relative = losses / jnp.where(known, largest, 1)
        length = jnp.sqrt(jnp.sum(relative * relative))
        # XLA may multiply by 1 / largest, which is 0 in float32 above 8e37.
        length = jnp.where(length > 0, length, 1)
        unit = relative / length
        p, h = restricted(preferred, present)
        slope = (h - jnp.sum(h * unit) * unit) / jnp.where(known, largest * length, 1)
        # At 0 the cosine has no gradient.
        return p - penalty * jnp.where(known, slope, 0), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"losses"}))
