"""Vanilla training: the plain mean of the per-example losses."""

import jax.numpy as jnp

from ant_jax.mtl.weighting import Weighting, check_arguments


def vanilla(k: int) -> Weighting:
    r"""Vanilla training.

    :math:`w_i = n_i / \sum_j n_j`: each task by its share of the n examples, so the update is the
    gradient of the mean over all examples (for diffusion Ho et al., *Denoising Diffusion
    Probabilistic Models*, NeurIPS 2020). Use it to see what training does without tasks.

    Example::

      tx = optax.chain(mtl.combine(mtl.vanilla(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting`.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(vanilla, k)

    def weigh(stats, state):
        return jnp.where(stats.present, stats.counts / stats.counts.sum(), 0), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset())
