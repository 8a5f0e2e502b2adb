"""Auxiliary losses by the cosine of their gradients with the main one (Du et al., 2018)."""

from typing import Annotated

import jax.numpy as jnp

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Integer, check_integer


def gcosim(k: int, main: Annotated[int, Integer(0)] = 0, weighted: bool = True) -> Weighting:
    r"""Gradient cosine similarity: auxiliary losses as far as they help a main one.

    :math:`w_i = \max(0, G_{mi} / \sqrt{G_{mm} G_{ii}}) / k`: the weight of an auxiliary loss is the
    cosine between its gradient and that of the main loss m, or 0 if they conflict (Du et al.,
    *Adapting Auxiliary Losses Using Gradient Similarity*, 2018, arXiv 1812.02224). Use it if one
    loss is the aim and the others only help, such as an auxiliary loss beside the denoising loss.
    The main loss has weight 1/k. With ``weighted=False`` every auxiliary loss with a positive
    cosine has weight 1/k too. The method is not meant for noise levels, which are all needed.

    The paper does not divide by k. k counts the tasks that are present. If the main task is absent
    or has no gradient, the update is 0.

    Example::

      tx = optax.chain(mtl.combine(mtl.gcosim(2, main=0)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      main: index of the main task.
      weighted: whether the cosine is the weight; otherwise only its sign counts.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or if there is no task ``main``.
    """
    check_arguments(gcosim, k, weighted=weighted)
    check_integer("main", main, 0, k - 1)

    def weigh(stats, state):
        present = stats.present
        unit = unit_gram(stats.gram, present)
        similar = jnp.maximum(unit.cosines[main], 0)
        similar = similar if weighted else (similar > 0).astype(similar.dtype)
        return jnp.where(present, similar, 0) / jnp.maximum(present.sum(), 1), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
