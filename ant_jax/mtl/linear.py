"""Linear scalarisation."""

from typing import Annotated

import jax.numpy as jnp
import numpy as np

from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Check, Number


def _are_weights(values):
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    valid = all(number(value) and Number(0).holds(value) for value in values)
    return valid and (not values or Number(above=0).holds(max(values)))


def linear(
    k: int,
    weights: Annotated[
        tuple, Check(_are_weights, "() or k numbers >= 0 as '(0.3, 0.7)', not all 0")
    ] = (),
) -> Weighting:
    r"""Linear scalarisation.

    :math:`w_i = 1/k`: the mean of the task losses, or fixed weights (Xin et al., *Do Current
    Multi-Task Optimization Methods in Deep Learning Even Help?*, NeurIPS 2022, find them hard to
    beat). Use it as the baseline for every other method. The mean runs over the tasks that are
    present. If all tasks have the same number of examples, the update is the gradient of the mean
    of that batch. With stratified noise levels this is not vanilla training, because stratified
    sampling changes the distribution of the levels.

    Example::

      tx = optax.chain(mtl.combine(mtl.linear(2, weights=(0.3, 0.7))), optax.adam(1e-3))

    Args:
      k: number of tasks.
      weights: k fixed weights >= 0, not all 0, instead of 1/k; absent tasks get 0.

    Returns:
      A stateless `Weighting`.

    Raises:
      ValueError: if k < 1, or the weights can't be.
    """
    check_arguments(linear, k)
    fixed = np.asarray(weights, np.float32)
    if fixed.shape != (0,) and not (
        fixed.shape == (k,) and (fixed >= 0).all() and 0 < fixed.sum() < np.inf
    ):
        raise ValueError(f"weights must be {k} finite numbers >= 0, not all 0, got {weights}")

    def weigh(stats, state):
        present = stats.present
        if fixed.size:
            return jnp.where(present, fixed, 0), state
        return present / jnp.maximum(present.sum(), 1).astype(jnp.float32), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset())
