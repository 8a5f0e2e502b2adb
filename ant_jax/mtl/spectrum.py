"""Eigenvalues of a Gram matrix in float32, and pseudo-inverses by them."""

import jax
import jax.numpy as jnp

from ant_jax.mtl.cone import UnitGram


def spectrum(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a (k, k) Gram matrix, with the rank that float32 resolves.

    Returns:
      The eigenvalues in ascending order, (k,), the eigenvectors as columns, (k, k), and which
      eigenvalues are positive, (k,) bool. One below 1e-6 k of the largest counts as 0, since it may
      be a rounding error. This is 1e-3 sqrt(k) in singular values of the gradients.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors, values > 1e-6 * values.size * values[-1]


def equal_projections(unit: UnitGram) -> jax.Array:
    r"""The v for which :math:`\sum_j v_j g_j / n_j` has the projection 1 on each gradient.

    It is :math:`v = C^+ 1`, with C the cosines and n the norms. Where equal projections do not
    exist, because the gradients depend on each other, v is the least-squares solution.

    Args:
      unit: the Gram matrix.

    Returns:
      v, (k,); 0 where a task is not active, and 0 everywhere if the gradients cancel.
    """
    values, vectors, positive = spectrum(unit.cosines)
    ones = unit.active.astype(vectors.dtype)
    parts = jnp.dot(ones, vectors, precision="highest")
    scaled = jnp.where(positive, parts / jnp.where(positive, values, 1), 0)
    v = jnp.dot(vectors, scaled, precision="highest")
    # 1^T C^+ 1 is at least 1 for independent gradients. For gradients that cancel it is 0, and v is
    # rounding error.
    return jnp.where(unit.active & (jnp.dot(parts, scaled) > 1e-6), v, 0)
