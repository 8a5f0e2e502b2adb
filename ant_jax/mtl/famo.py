"""FAMO: all log-losses fall at the same rate (Liu et al., 2023)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.per_task import adam_step, positive_losses
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

# Adam squares the changes.
_LARGEST_CHANGE = 1e6


class FamoState(NamedTuple):
    """Logits of the tasks, shape (k,), and their Adam states, one a task."""

    logits: jax.Array
    adam: optax.OptState


def famo_weights(state: FamoState, losses: jax.Array, present: jax.Array) -> jax.Array:
    """The weights (k,) of FAMO, of sum 1, for losses (k,); 0 where not present."""
    logs = jnp.log(positive_losses(losses, present))
    return jax.nn.softmax(state.logits - logs, where=present)


def first_order_changes(
    losses: jax.Array, gram: jax.Array, weights: jax.Array, present: jax.Array, step_size: float
) -> jax.Array:
    r"""How much each log-loss falls in a gradient step, to first order.

    :math:`\eta (G w)_i / L_i` for the step :math:`-\eta J^T w`. The true decrease
    :math:`\log L_i - \log L_i'` differs by :math:`O(\eta^2)`.

    Args:
      losses: (k,) before the step.
      gram: (k, k) Gram matrix of the gradients of the losses.
      weights: (k,), 0 where not present.
      present: (k,) bool.
      step_size: :math:`\eta`.

    Returns:
      (k,), at most 1e6 in size.
    """
    decrease = step_size * jnp.dot(gram, weights, precision="highest")
    changes = decrease / positive_losses(losses, present)
    return jnp.clip(changes, -_LARGEST_CHANGE, _LARGEST_CHANGE)


def exact_update(
    state: FamoState,
    before: jax.Array,
    after: jax.Array,
    present: jax.Array,
    learning_rate: float = 0.025,
    weight_decay: float = 1e-3,
) -> FamoState:
    """The update of FAMO's logits by the losses before and after a step of the parameters.

    For loops that compute both, on the same batch with the same noise: weigh by `famo_weights`,
    move the parameters, compute the losses again, and call this.

    Args:
      state: before the step; at first ``famo(k).init()``.
      before: (k,) losses before the step, > 0.
      after: (k,) losses after it, > 0.
      present: (k,) bool.
      learning_rate: Adam's learning rate for the logits.
      weight_decay: added to the gradient as this times the logits.

    Returns:
      The state after the step.
    """
    changes = jnp.log(positive_losses(before, present)) - jnp.log(positive_losses(after, present))
    return _updated(
        state, changes.astype(jnp.float32), present, optax.adam(learning_rate), weight_decay
    )


def _updated(state, changes, present, adam, weight_decay):
    z = jax.nn.softmax(state.logits, where=present)
    gradients = z * (changes - jnp.sum(z * changes)) + weight_decay * state.logits
    return FamoState(*adam_step(adam, gradients, state.logits, state.adam, present))


def famo(
    k: int,
    step_size: Annotated[float, Number(above=0)] = 1e-3,
    learning_rate: Annotated[float, Number(above=0)] = 0.025,
    weight_decay: Annotated[float, Number(0)] = 1e-3,
) -> Weighting:
    r"""FAMO: fast adaptive multitask optimization.

    :math:`w_i = \frac{z_i}{L_i} / \sum_j \frac{z_j}{L_j}` with :math:`z = \mathrm{softmax}(\xi)`
    (Liu et al., *FAMO: Fast Adaptive Multitask Optimization*, NeurIPS 2023, algorithm 2). Use it if
    all losses should fall at the same relative rate. The logits :math:`\xi` move by Adam along
    :math:`z_i (\delta_i - \sum_j z_j \delta_j) + \gamma \xi_i`, where :math:`\delta_i` is the
    decrease of :math:`\log L_i` in the step, so a loss that fell more than the mean loses weight.

    The paper measures :math:`\delta` by a second forward pass on the same batch. Here it is
    :math:`\eta (G w)_i / L_i`, its first-order value for the step :math:`-\eta J^T w`, which needs
    none. For a gradient step its error is :math:`O(\eta^2)`, which is not small at usual learning
    rates: with high curvature, losses fall much less than their gradients say. Momentum and the
    preconditioner of Adam add an error that does not vanish with :math:`\eta`. On a small denoising
    network with SGD, this :math:`\delta` and the measured one had a correlation over tasks of 0.86
    or more in the first 500 steps and none later; the largest z was 0.79 instead of 0.45. If
    G is of the shared parameters, the steps of the others are missing. ``exact_update``
    in the module ``ant_jax.mtl.famo`` is the paper's update, for a loop that computes the losses
    after the step.

    Adam on the logits divides by the size of its gradient. So a common factor of all
    :math:`\delta`, such as :math:`\eta`, cancels but for two terms: the decay acts as
    :math:`\gamma / \eta`, and Adam's epsilon of 1e-8 counts where :math:`\delta` is as small. If
    :math:`\eta` is far too small, all :math:`z_i` stay at 1/k. If it is too large, the decay does
    not hold the logits. On that network with Adam at 1e-3, the learning rate itself came near the
    exact largest z (0.47 instead of 0.49), and 10 times it did not (0.83).

    The losses must be positive; one below 1e-8 of the largest counts as that. A task whose gradient
    is 0 gets weight 0, and its logit does not move. The authors' code also clips the update:
    ``clipped(famo(k), 1.0)``.

    Example::

      tx = optax.chain(mtl.combine(mtl.famo(5, step_size=0.1)), optax.sgd(0.1))

    Args:
      k: number of tasks.
      step_size: :math:`\eta`, about the learning rate of the network's optimizer.
      learning_rate: Adam's learning rate for the logits.
      weight_decay: :math:`\gamma`, pulls the logits to 0.

    Returns:
      A `Weighting` that needs the losses and the Gram matrix; its state is the logits and Adam's.
      Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or if a setting is out of its range.
    """
    check_arguments(
        famo, k, step_size=step_size, learning_rate=learning_rate, weight_decay=weight_decay
    )
    adam = optax.adam(learning_rate)

    def init():
        logits = jnp.zeros(k, jnp.float32)
        return FamoState(logits, jax.vmap(adam.init)(logits))

    def weigh(stats, state):
        active = unit_gram(stats.gram, stats.present).active
        weights = famo_weights(state, stats.losses, active)
        changes = first_order_changes(stats.losses, stats.gram, weights, active, step_size)
        return weights, _updated(state, changes, active, adam, weight_decay)

    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"losses", "gram"}))
