"""PBI: penalty-based boundary intersection (Zhang and Li, 2007)."""

from typing import Annotated

import jax.numpy as jnp

from ant_jax.mtl.preference import Preference, preference_vector, restricted
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

# Losses that are this near to the ray, in their length, count as on it.
_NEAR = 1e-5


def pbi(k: int, theta: Annotated[float, Number(0)] = 5.0, preference: Preference = ()) -> Weighting:
    r"""PBI: penalty-based boundary intersection.

    :math:`w = (h + \theta\, r / \|r\|) / 1^T h` with :math:`h = p / \|p\|` for a preference p, and
    :math:`r = L - (h^T L)\, h`: the gradient of the length of the losses along the ray of p, plus
    :math:`\theta` times their distance from it (Zhang and Li, *MOEA/D: A Multiobjective
    Evolutionary Algorithm Based on Decomposition*, IEEE Transactions on Evolutionary Computation
    2007). Use it if the losses should have given proportions, those of p. The proportions of losses
    after plain training are a start; the uniform p asks for equal losses, which intervals of noise
    levels do not have.

    The weight of a loss below the ray can be negative: the method then increases that loss. The
    ideal point of the paper is 0 here. The paper does not divide by :math:`1^T h`.

    Example::

      tx = optax.chain(mtl.combine(mtl.pbi(3, preference=(0.2, 0.3, 0.5))), optax.adam(1e-3))

    Args:
      k: number of tasks.
      theta: penalty of the distance from the ray.
      preference: p, k numbers > 0; () for equal ones.

    Returns:
      A stateless `Weighting` that needs the losses. Identical gradients g of losses on the ray give
      the update g. It does not depend on a common scale of the losses.

    Raises:
      ValueError: if k < 1, or there are not k preferences > 0.
    """
    check_arguments(pbi, k, theta=theta)
    preferred = preference_vector(k, preference)

    def weigh(stats, state):
        present = stats.present
        losses = jnp.where(present, stats.losses, 0)
        largest = jnp.abs(losses).max()
        # Squares of losses in units of the largest neither overflow nor vanish.
        losses = losses / jnp.where(largest > 0, largest, 1)
        p, h = restricted(preferred, present)
        off = losses - jnp.sum(losses * h) * h
        squared = jnp.sum(off * off) + _NEAR**2 * jnp.sum(losses * losses)
        off = off / jnp.sqrt(jnp.where(squared > 0, squared, 1))
        # Divided by the sum of h, as p is.
        return p + theta * jnp.sum(p * h) * off, state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"losses"}))
