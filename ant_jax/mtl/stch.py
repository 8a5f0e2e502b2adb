"""STCH: a smooth maximum of the relative losses (Lin et al., 2024)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.per_task import positive_losses
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Integer, Number


class StchState(NamedTuple):
    """State of `stch`.

    Attributes:
      nadir: (k,) float32, mean loss at the end of the warm-up.
      steps: (k,) int32, calls at which the task was present, up to the end of the warm-up.
    """

    nadir: jax.Array
    steps: jax.Array


def stch(
    k: int,
    mu: Annotated[float, Number(above=0)] = 1.0,
    warmup_steps: Annotated[int, Integer(1)] = 1000,
) -> Weighting:
    r"""STCH: smooth Tchebycheff scalarisation of the log-losses.

    :math:`w_i = \mathrm{softmax}(l / \mu)_i / L_i` with :math:`l_i = \log(L_i / n_i)`: the gradient
    of the smooth maximum :math:`\mu \log \sum_i e^{l_i / \mu}` (Lin et al., *Smooth Tchebycheff
    Scalarization for Multi-Objective Optimization*, ICML 2024, in the form of the authors'
    multi-task code). The nadir :math:`n_i` is the mean loss of the task at the end of a warm-up; in
    the warm-up, l = 0. Use it if the task that has improved least since the warm-up should count
    most. Only a small :math:`\mu` does that; with :math:`\mu = 1` the direction of the weights is
    that of the fixed :math:`1 / n_i`.

    The paper's formula is the maximum of the losses themselves. It does not fit losses of different
    sizes, because it decreases the largest alone; the logarithm makes a factor of one loss cancel.
    The authors' code has the sum instead of the mean, k times this, and a warm-up of four epochs
    plus one for the nadir, which is here the last fifth of the warm-up. A task's warm-up counts the
    steps at which it is present. The losses must be positive; one below 1e-8 of the largest counts
    as that.

    Example::

      tx = optax.chain(mtl.combine(mtl.stch(5, mu=0.5)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      mu: smoothness; the smaller, the nearer to the maximum. The paper tries 0.01 to 1.
      warmup_steps: steps until the nadir is known.

    Returns:
      A `Weighting` that needs the losses; its state is the nadir. Identical gradients g of equal
      losses L give the update g / L in the warm-up, because the objective is the log-loss.

    Raises:
      ValueError: if k < 1, or if a setting is out of its range.
    """
    check_arguments(stch, k, mu=mu, warmup_steps=warmup_steps)
    start = warmup_steps - -(-warmup_steps // 5)

    def init():
        return StchState(jnp.zeros(k, jnp.float32), jnp.zeros(k, jnp.int32))

    def weigh(stats, state):
        present = stats.present
        losses = positive_losses(stats.losses, present)
        nadir, steps = state
        known = steps == warmup_steps
        logs = jnp.where(known, jnp.log(losses) - jnp.log(jnp.where(known, nadir, 1)), 0)
        # Centred first, since a small mu overflows.
        logs = logs - jnp.where(present, logs, -jnp.inf).max()
        weights = jax.nn.softmax(logs / mu, where=present) / losses

        mean = nadir + (losses - nadir) / jnp.maximum(steps - start + 1, 1)
        after = StchState(jnp.where(steps >= start, mean, nadir), steps + 1)
        moves = present & ~known
        return weights, jax.tree.map(lambda new, old: jnp.where(moves, new, old), after, state)

    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"losses"}))
