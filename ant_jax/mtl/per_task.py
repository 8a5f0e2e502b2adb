"""What methods share on quantities with one entry a task."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_FLOOR = 1e-8
# Adam squares the gradients.
_LARGEST_GRADIENT = 1e18


def mean_over(values: jax.Array, present: jax.Array) -> jax.Array:
    """The mean of values (k,) over the tasks that are present; 0 if none is."""
    return jnp.where(present, values, 0).sum() / jnp.maximum(present.sum(), 1)


def positive_losses(losses: jax.Array, present: jax.Array) -> jax.Array:
    """Losses that one can divide by and take logarithms of.

    Args:
      losses: (k,).
      present: (k,) bool.

    Returns:
      (k,), the losses, but at least 1e-8 of the largest; 1 for absent tasks, and for all tasks if
      no loss is > 0.
    """
    largest = jnp.where(present, losses, 0).max()
    floor = jnp.maximum(_FLOOR * largest, jnp.finfo(jnp.float32).tiny)
    return jnp.where(present & (largest > 0), jnp.maximum(losses, floor), 1)


def adam_step(
    adam: optax.GradientTransformation,
    gradients: jax.Array,
    values: jax.Array,
    state: Any,
    present: jax.Array,
    bound: Callable[[jax.Array], jax.Array] = lambda values: values,
) -> tuple[jax.Array, Any]:
    """One Adam step for each task that is present; the others keep their value and state.

    Each task has an Adam of its own, so that the step count of its bias correction stands still
    too.

    Args:
      adam: the optimizer.
      gradients: (k,); one beyond 1e18 in size counts as that.
      values: (k,).
      state: ``jax.vmap(adam.init)(values)`` at first.
      present: (k,) bool.
      bound: applied to the values after the step.

    Returns:
      The values and the state after the step.
    """
    gradients = jnp.clip(gradients, -_LARGEST_GRADIENT, _LARGEST_GRADIENT)
    step: Callable[..., Any] = jax.vmap(adam.update)
    updates, after = step(gradients, state)
    moved = (bound(values + updates), after)
    return jax.tree.map(lambda new, old: jnp.where(present, new, old), moved, (values, state))
