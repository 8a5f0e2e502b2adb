"""MGDA: the shortest vector in the convex hull of the gradients (Désidéri, 2012)."""

from ant_jax.mtl.cone import min_norm_weights, unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments


def mgda(k: int) -> Weighting:
    r"""MGDA: the multiple-gradient descent algorithm.

    :math:`w = \arg\min_{w \ge 0,\ 1^T w = 1} w^T G w` (Désidéri, *Multiple-gradient descent
    algorithm*, Comptes Rendus Mathématique 2012; for networks Sener and Koltun, *Multi-Task
    Learning as Multi-Objective Optimization*, NeurIPS 2018). The update decreases all losses, or is
    0. Use it if no loss may rise. The task with the smallest gradient gets most of the weight.

    The programme is solved exactly, where the reference codes stop after a number of Frank-Wolfe or
    gradient steps. A task whose gradient is 0 has weight 0; by the formula the update would be 0.

    Example::

      tx = optax.chain(mtl.combine(mtl.mgda(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(mgda, k)

    def weigh(stats, state):
        return min_norm_weights(unit_gram(stats.gram, stats.present)), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
