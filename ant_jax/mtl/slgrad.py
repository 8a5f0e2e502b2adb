"""SLGrad: a weight for each example of each task (Grégoire et al., 2023)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ant_jax.mtl.hydalearn import gain_weights


class SLGrad(NamedTuple):
    """What `slgrad` has found.

    Attributes:
      gradient: of the weighted sum of the losses, a pytree like the parameters.
      losses: (B,) or (k, B), as the loss function gives them.
      weights: of the shape of the losses.
    """

    gradient: Any
    losses: jax.Array
    weights: jax.Array


def slgrad_weights(
    losses_fn: Callable[[Any], jax.Array], params: Any, validation_gradient: Any
) -> jax.Array:
    r"""The weights of `slgrad`, by one forward-mode derivative.

    The inner products of the validation gradient v with the gradients of all losses are the
    derivative of the losses along v: one `jax.jvp`. No gradient of a single example is computed.

    Args:
      losses_fn: parameters to the losses of the examples, (B,) or (k, B).
      params: pytree of parameters.
      validation_gradient: v, a pytree like the parameters.

    Returns:
      Weights >= 0 of the shape of the losses, which add up to 1 over all tasks and examples. All
      are 0 if no inner product is positive.

    Raises:
      ValueError: if the losses have another shape.
    """
    _, products = jax.jvp(losses_fn, (params,), (validation_gradient,))
    if products.ndim not in (1, 2):
        raise ValueError(
            "losses_fn must return the losses of the examples, (B,) or (k, B), got the shape "
            f"{products.shape}: it must not take their mean"
        )
    return gain_weights(products)


def slgrad(losses_fn: Callable[[Any], jax.Array], params: Any, validation_gradient: Any) -> SLGrad:
    r"""SLGrad: sample-level weighting for multi-task learning with auxiliary tasks.

    :math:`w_{ib} = \max(\langle g_{ib}, v \rangle, 0) / \sum_{jc} \max(\langle g_{jc}, v \rangle,
    0)`, where :math:`g_{ib}` is the gradient of the loss of task i on example b, and v the gradient
    of the main task's loss on a batch of validation examples. The update is
    :math:`\sum_{ib} w_{ib} g_{ib}` (Grégoire et al., *Sample-Level Weighting for Multi-Task
    Learning with Auxiliary Tasks*, Applied Intelligence 2024, arXiv 2306.04519). It costs one
    gradient on the validation batch, one forward-mode derivative and one backward pass, whatever
    the number of tasks and examples::

      x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      y = jnp.array([[1.0, 0.5], [0.0, 1.0], [2.0, 1.0]])
      losses_fn = lambda params, x, y: ((jnp.tanh(x @ params) - y) ** 2).T  # (k, B)
      main_loss = lambda params: losses_fn(params, x[:2], y[:2])[0].mean()  # validation examples
      params = jnp.ones((2, 2))
      before, v = jax.value_and_grad(main_loss)(params)
      found = mtl.slgrad(lambda params: losses_fn(params, x, y), params, v)
      params = jax.tree.map(lambda p, g: p - 0.1 * g, params, found.gradient)
      after = main_loss(params)

    Use it if some examples of the auxiliary tasks are harmful or have wrong labels. Examples with
    long gradients get large weights.

    The weights add up to 1, as in the authors' code. If all gradients are equal, the update is that
    gradient. The authors' code also divides the weighted sum by B, so its update is B times
    smaller. There v is taken after an extra optimizer step with the last weights, which is not
    undone, so each batch makes two steps. Here the caller chooses where to take v.

    In the authors' code the inner products run over the shared parameters alone. To do the same,
    set v to 0 for the parameters of the heads.

    Args:
      losses_fn: parameters to the losses of the examples: (B,) if each belongs to one task, or
        (k, B) if all tasks share all examples. `jax.jvp` must be able to differentiate it: it
        can't contain a `jax.custom_vjp`.
      params: pytree of parameters.
      validation_gradient: v, a pytree like the parameters.

    Returns:
      The gradient, the losses and the weights. If no inner product is positive, the weights and the
      gradient are 0.

    Raises:
      ValueError: if the losses have another shape.
    """
    weights = slgrad_weights(losses_fn, params, validation_gradient)
    losses, pullback = jax.vjp(losses_fn, params)
    (gradient,) = pullback(weights)
    return SLGrad(gradient, losses, weights)
