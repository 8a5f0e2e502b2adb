"""Steps of weights on the probability simplex, of which an absent task keeps its share."""

import jax
import jax.numpy as jnp

from ant_jax.mtl.cone import project_on_simplex


def among(weights: jax.Array, tasks: jax.Array) -> jax.Array:
    """The weights of some tasks, (k,) bool, scaled to the sum 1; equal ones if all are 0."""
    kept = jnp.where(tasks, weights, 0)
    total = kept.sum()
    equal = tasks / jnp.maximum(tasks.sum(), 1).astype(weights.dtype)
    return jnp.where(total == 0, equal, kept / jnp.where(total == 0, 1, total))


def replaced(weights: jax.Array, tasks: jax.Array, found: jax.Array) -> jax.Array:
    """The weights with those of some tasks replaced by others on the simplex; the sum stays."""
    return jnp.where(tasks, found * jnp.where(tasks, weights, 0).sum(), weights)


def stepped(
    weights: jax.Array, tasks: jax.Array, matrix: jax.Array, gamma: float, rho: float
) -> jax.Array:
    r"""One step :math:`\Pi(\lambda - \gamma (M + \rho I) \lambda)` of the weights of some tasks."""
    x = among(weights, tasks)
    slope = jnp.dot(matrix, x, precision="highest") + rho * x
    return replaced(weights, tasks, project_on_simplex(x - gamma * slope, tasks))
