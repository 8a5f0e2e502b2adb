"""Vanilla training: the plain mean of the per-example losses."""

import jax.numpy as jnp

from ant_jax.mtl.weighting import Weighting, check_k


def vanilla(k: int) -> Weighting:
    r"""Each task by its share of the examples, :math:`w_i = n_i / \sum_j n_j`.

    The update is the gradient of the mean over all examples, whatever their tasks.

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting`.

    Raises:
      ValueError: if k < 1.
    """
    check_k(k)

    def weigh(stats, state):
        return jnp.where(stats.present, stats.counts / stats.counts.sum(), 0), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset())
