"""Linear scalarisation."""

import jax.numpy as jnp

from ant_jax.mtl.weighting import Weighting, check_k


def linear(k: int) -> Weighting:
    r"""The mean of the cluster losses: :math:`w_i = 1/k`.

    The mean runs over the clusters that are present. On a stratified batch the update is the
    gradient of the plain mean of that batch; it is not vanilla training, since stratified sampling
    changes the distribution of the timesteps.

    Args:
      k: number of clusters.

    Returns:
      A stateless `Weighting`.

    Raises:
      ValueError: if k < 1.
    """
    check_k(k)

    def weigh(losses, gram, present, state):
        del losses, gram
        return present / jnp.maximum(present.sum(), 1).astype(jnp.float32), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs_gram=False, needs_losses=False)
