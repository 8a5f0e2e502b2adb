"""DWA: weights by how fast the losses fall from epoch to epoch (Liu et al., 2019)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Integer, Number


class DwaState(NamedTuple):
    """State of `dwa`.

    Attributes:
      mean: (k,) float32, mean loss of the epoch so far.
      last: (k,) float32, mean loss of the last complete epoch.
      before: (k,) float32, mean loss of the epoch before.
      steps: (k,) int32, calls at which the task was present.
    """

    mean: jax.Array
    last: jax.Array
    before: jax.Array
    steps: jax.Array


def dwa(
    k: int,
    steps_per_epoch: Annotated[int, Integer(1)] = 1000,
    temperature: Annotated[float, Number(above=0)] = 2.0,
) -> Weighting:
    r"""DWA: dynamic weight average.

    :math:`w = \mathrm{softmax}(\rho / T)` with :math:`\rho_i = \bar L_i(e-1) / \bar L_i(e-2)`, the
    quotient of the mean losses of the last two epochs (Liu et al., *End-to-End Multi-Task Learning
    with Attention*, CVPR 2019). Use it if a task whose loss falls slowly should get a little more
    weight. The quotients are about 1, so with T = 2 the weights stay near 1/k.

    In the first two epochs :math:`\rho_i = 1`. An epoch is a number of steps, since a weighting
    does not see the data set. It counts the steps at which the task is present. The paper's weights
    have the sum k, these have the sum 1.

    Example::

      tx = optax.chain(mtl.combine(mtl.dwa(5, steps_per_epoch=500)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      steps_per_epoch: steps over which a mean loss is taken.
      temperature: T; the larger, the more equal the weights.

    Returns:
      A `Weighting` that needs the losses; its state is the mean losses. Identical gradients g give
      the update g.

    Raises:
      ValueError: if k < 1, or if a setting is out of its range.
    """
    check_arguments(dwa, k, steps_per_epoch=steps_per_epoch, temperature=temperature)

    def init():
        # Each its own array: a step that donates its state can't donate one array twice.
        mean, last, before = (jnp.zeros(k, jnp.float32) for _ in range(3))
        return DwaState(mean, last, before, jnp.zeros(k, jnp.int32))

    def weigh(stats, state):
        present = stats.present
        mean, last, before, steps = state
        # In the first two epochs it is 0.
        known = before != 0
        rate = jnp.where(known, last / jnp.where(known, before, 1), 1) / temperature
        largest = jnp.finfo(jnp.float32).max
        weights = jax.nn.softmax(jnp.clip(rate, -largest, largest), where=present)

        mean = mean + (stats.losses - mean) / (steps % steps_per_epoch + 1)
        steps = steps + 1
        ends = steps % steps_per_epoch == 0
        after = DwaState(
            jnp.where(ends, 0, mean),
            jnp.where(ends, mean, last),
            jnp.where(ends, last, before),
            steps,
        )
        return weights, jax.tree.map(lambda new, old: jnp.where(present, new, old), after, state)

    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"losses"}))
