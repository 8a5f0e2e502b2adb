"""The Gram matrix of stacked gradients and what is read off it."""

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
        flat = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
        grams.append(jnp.einsum("ip,jp->ij", flat, flat, precision="highest"))
    return sum(grams)


def smallest_cosine(gram: jax.Array) -> jax.Array:
    """Smallest cosine between two different gradients, scalar float32; NaN where there are none.

    Rows without a gradient (zero diagonal) are left out.
    """
    diagonal = jnp.diag(gram)
    inverse = jnp.where(diagonal > 0, jax.lax.rsqrt(diagonal), jnp.nan)
    cosines = gram * inverse[:, None] * inverse
    pairs = jnp.where(jnp.eye(gram.shape[0], dtype=bool), jnp.nan, cosines)
    return jnp.nanmin(pairs)
