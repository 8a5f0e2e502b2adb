"""DB-MTL: log-losses and gradients of the same length (Lin et al., 2023)."""

import jax.numpy as jnp

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.per_task import positive_losses
from ant_jax.mtl.weighting import Weighting, check_arguments


def db_mtl(k: int) -> Weighting:
    r"""DB-MTL: dual-balancing of losses and gradients.

    :math:`w_i = \frac1k \max_j \frac{\|g_j\|}{L_j} / \|g_i\|`: the gradients of the log-losses,
    :math:`g_i / L_i`, all get the length of the longest (Lin et al., *Dual-Balancing for Multi-Task
    Learning*, 2023, arXiv 2308.12029, algorithm 1). Use it if gradients have different lengths and
    each should count the same. A task with a small gradient, such as one that has converged, gets a
    large weight, and its noise with it.

    This is the paper's method without its moving average, :math:`\beta = 0`. With
    :math:`\beta > 0`, moving averages of the gradients of the log-losses take the place of the
    gradients. Their combination is not of the form :math:`J^T w`: it needs a state of k times the
    size of the parameters, which a weighting does not have.

    The paper takes the sum over the tasks, here it is the mean. `combine` leaves the gradients of
    heads as they are; the paper takes those of the log-losses. The losses must be positive; one
    below 1e-8 of the largest counts as that.

    Example::

      tx = optax.chain(mtl.combine(mtl.db_mtl(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting` that needs the losses and the Gram matrix. Identical gradients g of
      equal losses L give the update g / L, because the objective is the log-loss.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(db_mtl, k)

    def weigh(stats, state):
        present = stats.present
        _, norms, active = unit_gram(stats.gram, present)
        # In units of the longest, so that no quotient overflows.
        longest = jnp.where(active, norms, 0).max()
        norms = norms / jnp.where(longest > 0, longest, 1)
        common = jnp.where(active, norms / positive_losses(stats.losses, present), 0).max()
        return jnp.where(active, common / norms, 0) / jnp.maximum(present.sum(), 1), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"losses", "gram"}))
