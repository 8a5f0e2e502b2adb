"""The geometric mean of the losses, GLS (Chennupati et al., 2019)."""

import jax.numpy as jnp

from ant_jax.mtl.per_task import mean_over, positive_losses
from ant_jax.mtl.weighting import Weighting, check_arguments


def geometric_mean(k: int) -> Weighting:
    r"""GLS: the geometric mean of the losses as objective.

    :math:`w_i = \frac{1}{k L_i} \prod_j L_j^{1/k}`, so the update is the gradient of
    :math:`\prod_j L_j^{1/k}` (Chennupati et al., *MultiNet++: Multi-Stream Feature Aggregation and
    Geometric Loss Strategy for Multi-Task Learning*, CVPR Workshops 2019). Use it if the losses
    have different sizes: a factor of one loss changes the length of the update, not its direction.
    The direction is that of the mean of the log-losses, without the learned scales of `imtl_l`.

    The losses must be positive; one below 1e-8 of the largest counts as that. If one loss goes to
    0, so does the update.

    Example::

      tx = optax.chain(mtl.combine(mtl.geometric_mean(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting` that needs the losses. Identical gradients g of equal losses give the
      update g.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(geometric_mean, k)

    def weigh(stats, state):
        present = stats.present
        logs = jnp.log(positive_losses(stats.losses, present))
        # As a mean, since the product of many losses overflows.
        weights = jnp.exp(mean_over(logs, present) - logs) / jnp.maximum(present.sum(), 1)
        return jnp.where(present, weights, 0), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"losses"}))
