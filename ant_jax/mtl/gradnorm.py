"""GradNorm: weights that balance the gradients' norms (Chen et al., 2018)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.per_task import adam_step, mean_over
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

_LARGEST_RATIO = 1e30


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      logits: (k,) float32; the weights are their softmax.
      adam: their Adam states, one a task.
      first: (k,) float32, each task's first loss.
      known: (k,) bool, whether a task has been present yet.
    """

    logits: jax.Array
    adam: optax.OptState
    first: jax.Array
    known: jax.Array


def gradnorm(
    k: int,
    alpha: Annotated[float, Number(0)] = 1.5,
    learning_rate: Annotated[float, Number(above=0)] = 0.025,
) -> Weighting:
    r"""GradNorm: gradient normalization.

    :math:`\min_w \sum_i | w_i \|g_i\| - \bar N r_i^\alpha |`, where :math:`\bar N` is the mean of
    the :math:`w_j \|g_j\|` and :math:`r_i` is :math:`L_i / L_i(0)` over its mean; the targets
    :math:`\bar N r_i^\alpha` count as constants (Chen et al., *GradNorm: Gradient Normalization for
    Adaptive Loss Balancing in Deep Multitask Networks*, ICML 2018). Use it if all tasks should
    learn at the same rate. One that learns slowly gets a long gradient. L(0) is the task's first
    loss, so the noise of the first batch stays in the targets.

    The weights are the softmax of logits, as in LibMTL, and are those before the logits' Adam step.
    The paper moves the weights themselves and then divides them by their mean; a step can make such
    a weight negative. In both, the weights have the sum k; here it is 1. With the sign of the
    difference as gradient, the weights never settle, but oscillate by about the learning rate. The
    paper takes the gradients at the last shared layer (``shared`` of `combine`). A task whose
    gradient is 0 gets weight 0, and its logit does not move.

    Example::

      tx = optax.chain(mtl.combine(mtl.gradnorm(5, alpha=0.5)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      alpha: 0 makes all norms equal; the larger, the more a slow task gets.
      learning_rate: Adam's learning rate for the logits.

    Returns:
      A `Weighting` that needs the losses and the Gram matrix; its state is the logits, Adam's and
      the first losses. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or if a setting is out of its range.
    """
    check_arguments(gradnorm, k, alpha=alpha, learning_rate=learning_rate)
    adam = optax.adam(learning_rate)

    def init():
        # Each its own array: a step that donates its state can't donate one array twice.
        logits, first = (jnp.zeros(k, jnp.float32) for _ in range(2))
        return GradNormState(logits, jax.vmap(adam.init)(logits), first, jnp.zeros(k, bool))

    def weigh(stats, state):
        losses, present = stats.losses, stats.present
        _, norms, active = unit_gram(stats.gram, present)
        # In units of the longest: Adam squares them.
        longest = jnp.where(active, norms, 0).max()
        norms = norms / jnp.where(longest > 0, longest, 1)
        weights = jax.nn.softmax(state.logits, where=active)
        lengths = weights * norms

        first = jnp.where(present & ~state.known, losses, state.first)
        ratio = jnp.where(first > 0, jnp.maximum(losses, 0) / jnp.where(first > 0, first, 1), 1)
        # So that the mean of ratios is finite.
        ratio = jnp.minimum(ratio, _LARGEST_RATIO)
        mean = mean_over(ratio, active)
        rate = jnp.where(mean > 0, ratio / jnp.where(mean > 0, mean, 1), 1)
        slope = jnp.sign(lengths - mean_over(lengths, active) * rate**alpha) * norms
        gradients = weights * (slope - jnp.sum(weights * slope))
        logits, adam_state = adam_step(adam, gradients, state.logits, state.adam, active)
        return weights, GradNormState(logits, adam_state, first, state.known | present)

    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"losses", "gram"}))
