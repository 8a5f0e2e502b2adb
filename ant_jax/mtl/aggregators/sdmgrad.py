"""SDMGrad: MGDA's direction, pulled towards the mean gradient (Xiao, Ban and Ji, 2023)."""

from typing import Annotated

import jax
import jax.numpy as jnp

from ant_jax.mtl.aggregators.halves import OnHalves, on_halves
from ant_jax.mtl.aggregators.simplex import among, replaced
from ant_jax.mtl.cone import project_on_simplex
from ant_jax.mtl.weighting import check_arguments
from ant_jax.settings import Integer, Number


def sdmgrad(
    k: int,
    lam: Annotated[float, Number(0)] = 0.3,
    steps: Annotated[int, Integer(1)] = 20,
    learning_rate: Annotated[float, Number(above=0)] = 1.0,
    momentum: Annotated[float, Number(0, 0.99)] = 0.5,
    axis_name: str | None = None,
) -> OnHalves:
    r"""Stochastic direction-oriented multi-objective gradient descent.

    :math:`w = (x + \lambda u) / (1 + \lambda)`, where :math:`u = 1/k` and x is on the simplex. At
    each call, x takes some projected steps with momentum along :math:`-A (x + \lambda u)`, from the
    x of the call before (Xiao, Ban and Ji, *Direction-oriented Multi-objective Learning: Simple and
    Provable Stochastic Algorithms*, NeurIPS 2023). :math:`A = J_1 J_2^T` are the inner products of
    the gradients of two halves of each task's examples, which have no bias. The update is that of
    all examples, :math:`J^T w`. :math:`\lambda = 0` is MGDA, a large :math:`\lambda` the mean.

    Use it in place of `mgda` or `cagrad` where the gradients of a batch are noisy.

    The paper takes a third batch for the update. The authors' step is 10 after A is divided by the
    squared mean norm; x then jumps between the corners of the simplex. Here the step is
    ``learning_rate`` over the Frobenius norm of A. It does not depend on the scale of the
    gradients, and below 2 (1 + momentum) it is stable where A is symmetric.

    The leading axis is 2 k, and `modo` says how to group the examples. This costs the backward
    passes of k gradients, the memory of 2 k, and a (2 k, 2 k) Gram matrix. A task that has examples
    in one half only keeps its x.

    Example::

      tx = optax.chain(mtl.sdmgrad(5, lam=0.3), optax.adam(1e-3))

    Args:
      k: number of tasks.
      lam: pull towards the mean gradient, :math:`\lambda`.
      steps: number of steps of x at each call.
      learning_rate: size of these steps.
      momentum: of these steps; it starts from 0 at each call.
      axis_name: name of a mapped axis, as for `combine`.

    Returns:
      An `Aggregator` of gradients with leaves (2 k, *param_shape); its state is a `CombineState`
      with x, (k,), as ``weighting_state``. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or a setting is out of its range; from update, if a leaf's leading
        axis is not 2 k.
    """
    check_arguments(
        sdmgrad, k, lam=lam, steps=steps, learning_rate=learning_rate, momentum=momentum
    )
    toward_mean = lambda x, tasks: x + lam * tasks.astype(x.dtype) / jnp.maximum(tasks.sum(), 1)

    def renew(cross, trace, tasks, state):
        del trace
        # Divided by the largest first, whose square may overflow.
        largest = jnp.abs(cross).max()
        unit = cross / jnp.where(largest > 0, largest, 1)
        unit /= jnp.maximum(jnp.sqrt((unit**2).sum()), 1)

        def step(carry, _):
            x, velocity = carry
            slope = jnp.dot(unit, toward_mean(x, tasks), precision="highest")
            velocity = momentum * velocity + slope
            return (project_on_simplex(x - learning_rate * velocity, tasks), velocity), None

        start = (among(state, tasks), jnp.zeros(k, jnp.float32))
        (x, _), _ = jax.lax.scan(step, start, length=steps)
        return replaced(state, tasks, x)

    use = lambda state, tasks: toward_mean(among(state, tasks), tasks) / (1 + lam)
    return on_halves(k, axis_name, renew, use)
