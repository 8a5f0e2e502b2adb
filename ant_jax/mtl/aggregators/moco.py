"""MoCo: MGDA's weights from moving gradients (Fernando et al., 2023)."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from ant_jax.mtl.aggregators.parts import on_parts, zero_parts
from ant_jax.mtl.aggregators.simplex import among, stepped
from ant_jax.mtl.combine import weighted_sum
from ant_jax.mtl.gramian import gramian
from ant_jax.mtl.shards import global_sum
from ant_jax.mtl.weighting import check_arguments
from ant_jax.settings import Number


class MoCoState(NamedTuple):
    """State of `moco`.

    Attributes:
      moving: the moving gradients, a pytree like the parameters with leaves (k, p), float32. p is
        the number of entries, or with ``axis_name`` of this device's part of them.
      weights: (k,), on the simplex.
    """

    moving: Any
    weights: jax.Array


def moco(
    k: int,
    beta: Annotated[float, Number(above=0, high=1)] = 0.1,
    gamma: Annotated[float, Number(above=0)] = 0.5,
    rho: Annotated[float, Number(0)] = 0.02,
    axis_name: str | None = None,
) -> aggregating.Aggregator:
    r"""Multi-objective gradient correction.

    :math:`w = \Pi(w_{t-1} - \gamma (Y Y^T / \tau + \rho I) w_{t-1})`, with the moving gradients
    :math:`y_i \leftarrow y_i + \beta (g_i - y_i)`, from 0, as rows of Y, and :math:`\Pi` the
    projection on the simplex. The update is :math:`Y^T w` (Fernando et al., *Mitigating Gradient
    Bias in Multi-objective Learning: A Provably Convergent Approach*, ICLR 2023). w moves slowly
    towards MGDA's weights. The noise of Y is small, so the bias of w is too.

    Use it in place of `mgda` where the gradients of a batch are noisy and memory is not short.

    The state holds k gradients in float32. On n devices with ``axis_name``, each holds
    k/n of a gradient. ``init`` must then run under the mapped axis too, and ``moving`` differs from
    device to device.

    The authors' code has no :math:`\tau`, so its steps depend on the scale of the losses. Here
    :math:`\tau` is the trace of :math:`Y Y^T`, so a step with :math:`\gamma (1 + \rho) < 2` is
    stable for every k. The defaults are their 0.1, 0.1 and 0.1 for five gradients of norm 1.
    LibMTL scales each gradient to the size of its loss, and takes a softmax instead of the
    projection, which pulls all weights to 1/k.

    Example::

      tx = optax.chain(mtl.moco(5), optax.adam(1e-3))

    Args:
      k: number of tasks.
      beta: share of the new gradients in the moving ones.
      gamma: step of the weights.
      rho: pull towards equal weights.
      axis_name: name of a mapped axis, as for `combine`.

    Returns:
      An `Aggregator` of gradients with leaves (k, *param_shape); its state is a `MoCoState`. At
      call t, identical gradients g give the update (1 - (1 - beta)^t) g. An absent task keeps its
      moving gradient and its weight, and is left out of the update.

    Raises:
      ValueError: if k < 1, or a setting is out of its range; from update, if a leaf's leading
        axis is not k.
      NameError: from init, outside of the mapped axis ``axis_name``.
    """
    check_arguments(moco, k, beta=beta, gamma=gamma, rho=rho)

    def aggregate(parts, present, state):
        follow = lambda y, g: jnp.where(present[:, None], y + beta * (g - y), y)
        moving = jax.tree.map(follow, state.moving, parts)
        gram = global_sum(gramian(moving), axis_name)
        tasks = present & (jnp.diag(gram) > 0)
        gram = jnp.where(tasks[:, None] & tasks, gram, 0)
        trace = jnp.trace(gram)
        matrix = gram / jnp.where(trace > 0, trace, 1)
        weights = stepped(state.weights, tasks, matrix, gamma, rho)
        used = among(weights, tasks)
        update = jax.tree.map(lambda y: weighted_sum(used, y), moving)
        return update, MoCoState(moving, weights)

    init = lambda params: MoCoState(
        zero_parts(params, k, axis_name), jnp.full(k, 1 / k, jnp.float32)
    )
    return on_parts(k, axis_name, init, aggregate)
