"""Linear scalarisation."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ant_jax.mtl.weighting import Weighting, check_k


def linear(k: int, weights: Sequence[float] | None = None) -> Weighting:
    r"""A fixed weighting of the cluster losses; by default their mean, :math:`w_i = 1/k`.

    The mean runs over the clusters that are present. On a stratified batch the update is the
    gradient of the plain mean of that batch; it is not vanilla training, since stratified sampling
    changes the distribution of the timesteps.

    Args:
      k: number of clusters.
      weights: (k,) fixed weights to use instead; clusters that are absent then get 0.

    Returns:
      A stateless `Weighting`.

    Raises:
      ValueError: if k < 1, or the weights are not k numbers >= 0.
    """
    check_k(k)
    if weights is not None:
        weights = np.asarray(weights, np.float32)
        if weights.shape != (k,) or not (weights >= 0).all() or not np.isfinite(weights).all():
            raise ValueError(f"weights must be {k} finite numbers >= 0, got {weights}")

    def weigh(losses, gram, present, state):
        del losses, gram
        if weights is not None:
            return jnp.where(present, weights, 0), state
        return present / jnp.maximum(present.sum(), 1).astype(jnp.float32), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs_gram=False, needs_losses=False)
