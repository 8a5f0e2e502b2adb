"""Aggregators of the gradients of two halves of each task's examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from ant_jax.mtl.combine import combine
from ant_jax.mtl.weighting import Weighting


class OnHalves(aggregating.Aggregator):
    """An `Aggregator` of gradients with leaves (2 k, *param_shape).

    Row i is of one half of task i's examples, row k + i of the other.
    """


def on_halves(
    k: int,
    axis_name: str | None,
    renew: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    use: Callable[[jax.Array, jax.Array], jax.Array],
) -> OnHalves:
    """`combine` with a weighting of 2 k gradients, of which i and k + i are of task i.

    Both gradients of a task get its weight, in proportion to their examples. The state is (k,)
    weights on the simplex, equal at first.

    Args:
      k: number of tasks.
      axis_name: name of a mapped axis, as for `combine`.
      renew: ``(cross, trace, tasks, state) -> state``. ``cross`` is (k, k), the inner products of
        the gradients of the first halves (rows) and the second halves (columns). ``tasks`` is (k,)
        bool, those with a gradient of both halves; the rows and columns of the others are 0.
        ``trace`` is the sum over these tasks of the mean squared norm of both gradients, a bound on
        the spectral norm of ``cross``.
      use: ``(state, tasks) -> (k,) weights`` of the tasks with a gradient of at least one half.
    """

    def weigh(stats, state):
        diagonal = jnp.diag(stats.gram)
        first, second = (stats.present & (diagonal > 0)).reshape(2, k)
        both = first & second
        cross = jnp.where(both[:, None] & both, stats.gram[:k, k:], 0)
        trace = jnp.where(both, diagonal.reshape(2, k).mean(0), 0).sum()
        state = renew(cross, trace, both, state)
        counts = stats.counts.reshape(2, k)
        shares = counts / jnp.where(counts.sum(0) > 0, counts.sum(0), 1)
        return (use(state, first | second) * shares).reshape(2 * k), state

    init = lambda: jnp.full(k, 1 / k, jnp.float32)
    return OnHalves(*combine(Weighting(init, weigh, 2 * k, frozenset({"gram"})), axis_name))
