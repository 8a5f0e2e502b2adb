"""MoDo: MGDA's weights from two independent halves of each batch (Chen et al., 2023)."""

from typing import Annotated

import jax.numpy as jnp

from ant_jax.mtl.aggregators.halves import OnHalves, on_halves
from ant_jax.mtl.aggregators.simplex import among, stepped
from ant_jax.mtl.weighting import check_arguments
from ant_jax.settings import Number


def modo(
    k: int,
    gamma: Annotated[float, Number(above=0)] = 0.5,
    rho: Annotated[float, Number(0)] = 0.02,
    axis_name: str | None = None,
) -> OnHalves:
    r"""Multi-objective gradient descent with double sampling.

    :math:`w = \Pi(w_{t-1} - \gamma (A / \tau + \rho I) w_{t-1})` with
    :math:`A = J_1 J_2^T`, where :math:`J_1` and :math:`J_2` are the gradients of two halves of each
    task's examples and :math:`\Pi` is the projection on the simplex (Chen, Fernando, Ying and Chen,
    *Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
    Conflict-Avoidance*, NeurIPS 2023). The update is that of all examples, :math:`J^T w`. w moves
    slowly towards MGDA's weights. The halves are independent, so A has no bias. The Gram matrix of
    one batch has: the noise of the gradients adds to its diagonal.

    Use it in place of `mgda` where the gradients of a batch are noisy.

    The paper has no :math:`\tau`, so its steps depend on the scale of the losses. Here
    :math:`\tau` is the sum over tasks of the mean squared norm of both gradients. It bounds the
    norm of A, so a step with :math:`\gamma (1 + \rho) < 2` is stable for every k. The defaults
    are the authors' 0.1 and 0.1 for five gradients of norm 1. Their code adds the gradients of the
    halves, where the paper and this function average them.

    The leading axis is 2 k: row i is the gradient of the mean loss of the first half of task i's
    examples, row k + i that of its second half; ``counts`` and ``losses`` are (2 k,) in this order.
    If example j is of task j mod k, this makes example j part of row j mod 2 k::

      groups = jax.tree.map(lambda x: x.reshape(-1, 2 * k, *x.shape[1:]).swapaxes(0, 1), batch)
      stacked = jax.vmap(jax.grad(loss), (None, 0))(params, groups)

    This costs the backward passes of k gradients, the memory of 2 k, and a (2 k, 2 k) Gram matrix.
    A task that has examples in one half only keeps its weight.

    Example::

      tx = optax.chain(mtl.modo(5), optax.adam(1e-3))

    Args:
      k: number of tasks.
      gamma: step of the weights.
      rho: pull towards equal weights.
      axis_name: name of a mapped axis, as for `combine`.

    Returns:
      An `Aggregator` of gradients with leaves (2 k, *param_shape); its state is a `CombineState`
      with the weights w, (k,), as ``weighting_state``. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or a setting is out of its range; from update, if a leaf's leading
        axis is not 2 k.
    """
    check_arguments(modo, k, gamma=gamma, rho=rho)

    def renew(cross, trace, tasks, weights):
        return stepped(weights, tasks, cross / jnp.where(trace > 0, trace, 1), gamma, rho)

    return on_halves(k, axis_name, renew, among)
