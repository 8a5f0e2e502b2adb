"""ExcessMTL: weights that follow the estimated excess risks (He et al., 2024)."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from ant_jax.mtl.aggregators.parts import on_parts, zero_parts
from ant_jax.mtl.combine import weighted_sum
from ant_jax.mtl.shards import global_sum
from ant_jax.mtl.weighting import check_arguments
from ant_jax.settings import Integer, Number

_LARGEST_RATIO = 1e30


class ExcessMTLState(NamedTuple):
    """State of `excess_mtl`.

    Attributes:
      size: root of the sum of the squares of all gradients so far, a pytree like the parameters
        with leaves (k, p), float32. p is the number of entries, or with ``axis_name`` of this
        device's part of them.
      baseline: (k,) float32, the mean excess risk of the task's first calls; 0 before.
      known: (k,) int32, of how many calls, at most ``warmup``.
      log_weights: (k,) float32.
    """

    size: Any
    baseline: jax.Array
    known: jax.Array
    log_weights: jax.Array


def excess_mtl(
    k: int,
    eta: Annotated[float, Number(above=0)] = 0.01,
    warmup: Annotated[int, Integer(1)] = 1,
    axis_name: str | None = None,
) -> aggregating.Aggregator:
    r"""Robust multi-task learning with excess risks.

    :math:`w_i \propto w_{i,t-1}\, e^{\eta E_i / E_i^0}`, where
    :math:`E_i = \sum_p g_{ip}^2 / \sqrt{S_{ip}}` estimates how far the loss of task i is above its
    optimum, :math:`S_{ip}` is the sum of all :math:`g_{ip}^2` so far, and :math:`E_i^0` is the mean
    :math:`E_i` of the first calls, at which the weights stay equal. The update is :math:`J^T w`
    with weights of sum 1 (He et al., *Robust Multi-Task Learning with Excess Risks*, ICML 2024,
    equations 6, 7 and 9).

    Use it where the losses have different floors, such as label noise, so that a large loss need
    not mean that a task has more to learn.

    The state holds k gradients in float32. On n devices with ``axis_name``, each holds
    k/n of a gradient. ``init`` must then run under the mapped axis too, and ``size`` differs from
    device to device.

    S only grows, so :math:`E_i` falls as :math:`1 / \sqrt t` and the weights change less and less.
    The paper takes the first three epochs for :math:`E_i^0`, the authors' code the first call. The
    code's weights have the sum k.

    Example::

      tx = optax.chain(mtl.excess_mtl(5), optax.adam(1e-3))

    Args:
      k: number of tasks.
      eta: step of the weights.
      warmup: number of calls for :math:`E_i^0`.
      axis_name: name of a mapped axis, as for `combine`.

    Returns:
      An `Aggregator` of gradients with leaves (k, *param_shape); its state is an `ExcessMTLState`.
      Identical gradients g give the update g. An absent task keeps its part of the state, and its
      share of the weights while the others change.

    Raises:
      ValueError: if k < 1, or a setting is out of its range; from update, if a leaf's leading
        axis is not k.
      NameError: from init, outside of the mapped axis ``axis_name``.
    """
    check_arguments(excess_mtl, k, eta=eta, warmup=warmup)

    def aggregate(parts, present, state):
        size = jax.tree.map(jnp.hypot, state.size, parts)
        # The quotient is at most 1, so no square overflows or vanishes.
        risk = lambda g, s: jnp.abs(g / jnp.where(s > 0, s, 1)) * jnp.abs(g)
        risks = [
            risk(g, s).sum(1)
            for g, s in zip(jax.tree.leaves(parts), jax.tree.leaves(size), strict=True)
        ]
        risks = global_sum(sum(risks), axis_name)

        learned = state.known == warmup
        tasks = present & learned
        ratio = risks / jnp.where(learned, state.baseline, 1)
        moved = state.log_weights + eta * jnp.minimum(ratio, _LARGEST_RATIO)
        # The others' share of the weights stays.
        share = _log_sum(state.log_weights, tasks) - _log_sum(moved, tasks)
        log_weights = jnp.where(tasks, moved + share, state.log_weights)

        # A risk of 0 would be no baseline.
        counted = present & ~learned & (risks > 0)
        known = state.known + counted
        mean = state.baseline + (risks - state.baseline) / jnp.maximum(known, 1)
        baseline = jnp.where(counted, mean, state.baseline)

        weights = jnp.where(present, jnp.exp(log_weights - _log_sum(log_weights, present)), 0)
        update = jax.tree.map(lambda g: weighted_sum(weights, g), parts)
        return update, ExcessMTLState(size, baseline, known, log_weights)

    def init(params):
        zeros = jnp.zeros(k, jnp.float32)
        size = zero_parts(params, k, axis_name)
        return ExcessMTLState(size, zeros, jnp.zeros(k, jnp.int32), zeros - jnp.log(k))

    return on_parts(k, axis_name, init, aggregate)


def _log_sum(logs, tasks):
    return jax.nn.logsumexp(jnp.where(tasks, logs, -jnp.inf))
