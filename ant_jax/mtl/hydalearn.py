"""HydaLearn: weights from what each task gains for the main task (Verboven et al., 2020)."""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Integer, check_integer


def hydalearn(k: int, main: Annotated[int, Integer(-1)] = 0) -> Weighting:
    r"""HydaLearn: highly dynamic task weighting.

    :math:`w_i = \max(G_{mi}, 0) / \sum_j \max(G_{mj}, 0)` for the main task m. A step along
    :math:`-g_i` lowers the main loss in proportion to :math:`G_{mi}`, to first order, and the
    weights are in the ratio of these gains (Verboven et al., *HydaLearn: Highly Dynamic Task
    Weighting for Multitask Learning with Auxiliary Tasks*, Applied Intelligence 2023,
    arXiv 2008.11643). Use it if one task counts and the others only help it. A gain below 0 counts
    as 0. The update never raises the main loss to first order. A long auxiliary gradient gets a
    large weight.

    The paper takes a real step with each task and measures the main task: `lookahead_weights`. The
    authors' public repository does not contain the method.

    Example::

      tx = optax.chain(mtl.combine(mtl.hydalearn(5, main=0)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      main: index of the main task; -1 for the mean of the tasks that are present.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. The weights add up to 1. If no gain is
      positive, all are 0: the main task is absent or has no gradient.

    Raises:
      ValueError: if k < 1, or main is not -1 or the index of a task.
    """
    check_arguments(hydalearn, k)
    check_integer("main", main, -1, k - 1)

    def weigh(stats, state):
        pairs = stats.present[:, None] & stats.present
        gram = jnp.where(pairs, stats.gram, 0)
        # The gains of the mean, times the number of tasks.
        gains = gram.sum(0) if main == -1 else gram[main]
        return gain_weights(gains), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))


def gain_weights(gains: jax.Array) -> jax.Array:
    """The positive parts of gains, divided by their sum; 0 everywhere if no gain is positive."""
    positive = jnp.maximum(gains, 0)
    largest = positive.max()
    # Divided by the largest first, so that the sum neither overflows nor underflows.
    shares = positive / jnp.where(largest == 0, 1, largest)
    return shares / jnp.maximum(shares.sum(), 1)


def lookahead_weights(
    task_losses: Callable[[Any], jax.Array],
    main_loss: Callable[[Any], jax.Array],
    params: Any,
    learning_rate: float,
) -> tuple[jax.Array, jax.Array]:
    r"""HydaLearn's weights by real steps.

    The gain of task i is :math:`L_m(\theta) - L_m(\theta - \eta g_i)`. The steps are taken one
    after the other, so the memory is that of one gradient and one more set of parameters. The time
    is that of k backward passes and k evaluations of the main loss::

      x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      y = jnp.array([[1.0, 0.5], [0.0, 1.0], [2.0, 1.0]])
      task_losses = lambda params: jnp.mean((jnp.tanh(x @ params) - y) ** 2, axis=0)
      params = jnp.ones((2, 2))
      main_loss = lambda params: task_losses(params)[0]  # better: of other examples
      weights, gains = mtl.lookahead_weights(task_losses, main_loss, params, 0.1)
      losses, pullback = jax.vjp(task_losses, params)
      (gradient,) = pullback(weights)

    As the learning rate goes to 0, the weights go to those of `hydalearn`. The gains are
    differences of two losses: in float32 they are rounding error where
    :math:`\eta\, |G_{mi}|` is below about :math:`10^{-7} L_m`.

    Args:
      task_losses: parameters to the task losses, (k,).
      main_loss: parameters to a number to be minimised, on any batch. It need not be
        differentiable, so a metric is possible.
      params: pytree of parameters.
      learning_rate: :math:`\eta`, the length of the steps.

    Returns:
      The weights, (k,), as those of `hydalearn`, and the gains, (k,).

    Raises:
      ValueError: if the losses have another shape.
    """
    losses, pullback = jax.vjp(task_losses, params)
    now = main_loss(params)
    if losses.ndim != 1 or jnp.ndim(now):
        raise ValueError(
            f"task_losses must return k losses and main_loss one number, got the shapes "
            f"{losses.shape} and {jnp.shape(now)}"
        )

    def gain(row):
        (gradient,) = pullback(row)
        ahead = jax.tree.map(lambda p, g: p - (learning_rate * g).astype(p.dtype), params, gradient)
        return now - main_loss(ahead)

    gains = jax.lax.map(gain, jnp.eye(losses.size, dtype=losses.dtype))
    return gain_weights(gains), gains
