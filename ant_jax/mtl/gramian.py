"""The Gram matrix of stacked gradients, and their cosines."""

import jax
import jax.numpy as jnp


def gramian(stacked: jax.typing.ArrayLike) -> jax.Array:
    """Inner products of k gradients, ``G = J J^T``.

    Args:
      stacked: pytree of gradients with leaves of shape (k, *param_shape).

    Returns:
      (k, k) float32, accumulated in float32 at full precision.
    """
    grams = []
    for leaf in jax.tree.leaves(stacked):
        rows, axes = leaf.astype(jnp.float32), tuple(range(1, leaf.ndim))
        grams.append(jnp.tensordot(rows, rows, (axes, axes), precision="highest"))
    return sum(grams)


def pairwise_cosines(gram: jax.Array) -> jax.Array:
    """Cosines between different gradients.

    Args:
      gram: (k, k) Gram matrix.

    Returns:
      (k (k - 1) / 2,) float32, the pairs (0, 1), (0, 2), ..., (k - 2, k - 1); NaN for a pair of
      which one has no gradient (zero diagonal).
    """
    diagonal = jnp.diag(gram)
    inverse = jnp.where(diagonal > 0, jax.lax.rsqrt(diagonal), jnp.nan)
    cosines = gram * inverse[:, None] * inverse
    return cosines[jnp.triu_indices(gram.shape[0], 1)]
