"""Uncertainty weighting (Kendall et al., 2018)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ant_jax.mtl.per_task import adam_step
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

_LEAST = -40.0


class UncertaintyState(NamedTuple):
    """Log-variances s of the tasks, shape (k,), and their Adam states, one a task."""

    log_variance: jax.Array
    adam: optax.OptState


def uncertainty(k: int, learning_rate: Annotated[float, Number(above=0)] = 0.025) -> Weighting:
    r"""Uncertainty weighting.

    :math:`w_i = e^{-s_i} / (2k)`, which minimises :math:`\sum_i \frac12 (e^{-s_i} L_i / k + s_i)`
    jointly over the parameters and the log-variances s (Kendall et al., *Multi-Task Learning Using
    Uncertainty to Weigh Losses*, CVPR 2018, eq. 7, with the 1/k of the ANT reference code). Use it
    if the losses have different sizes and one backward pass must be enough. The weights are those
    before the update of s, and s moves along :math:`\frac12 (1 - e^{-s_i} L_i / k)` by Adam without
    decay, from s = 0. An absent task's s and Adam state stay as they are. s stays at -40 or above:
    the weight of a loss that is 0 would grow until it overflows.

    Example::

      tx = optax.chain(mtl.combine(mtl.uncertainty(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      learning_rate: Adam's learning rate for s.

    Returns:
      A `Weighting` that needs the losses.

    Raises:
      ValueError: if k < 1, or if a setting is out of its range.
    """
    check_arguments(uncertainty, k, learning_rate=learning_rate)
    adam = optax.adam(learning_rate)

    def init():
        log_variance = jnp.zeros(k, jnp.float32)
        return UncertaintyState(log_variance, jax.vmap(adam.init)(log_variance))

    def weigh(stats, state):
        present = stats.present
        scale = jnp.exp(-state.log_variance)
        grads = 0.5 * (1 - scale * stats.losses / k)
        bound = lambda s: jnp.maximum(s, _LEAST)
        after = adam_step(adam, grads, state.log_variance, state.adam, present, bound)
        return jnp.where(present, scale / (2 * k), 0.0), UncertaintyState(*after)

    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"losses"}))
