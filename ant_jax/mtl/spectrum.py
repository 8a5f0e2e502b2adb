"""Eigenvalues of a Gram matrix in float32, and pseudo-inverses by them."""

from typing import NamedTuple

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


class EqualProjections(NamedTuple):
    r"""The direction :math:`\sum_j v_j g_j / n_j`, with n the norms of the gradients.

    Attributes:
      v: (k,), :math:`C^+ 1` with C the cosines; 0 where a task is not active.
      projections: (k,), :math:`C v`, of the direction on the gradients; 0 where a task is not
        active.
      squared: :math:`v^T C v`, the squared length of the direction.

    All are 0 if the gradients cancel.
    """

    v: jax.Array
    projections: jax.Array
    squared: jax.Array


def equal_projections(unit: UnitGram) -> EqualProjections:
    """The direction that has the projection 1 on each gradient.

    Where it does not exist, because the gradients depend on each other, it is the least-squares
    solution.

    Args:
      unit: the Gram matrix.
    """
    values, vectors, positive = spectrum(unit.cosines)
    ones = unit.active.astype(vectors.dtype)
    parts = jnp.where(positive, jnp.dot(ones, vectors, precision="highest"), 0)
    scaled = parts / jnp.where(positive, values, 1)
    v = jnp.dot(vectors, scaled, precision="highest")
    # Not by C v, whose terms cancel if gradients nearly depend on each other.
    projections = jnp.dot(vectors, parts, precision="highest")
    squared = jnp.dot(parts, scaled, precision="highest")
    # v^T C v is at least 1 for independent gradients. For gradients that cancel it is 0, and v is
    # rounding error.
    known = squared > 1e-6
    return EqualProjections(
        jnp.where(unit.active & known, v, 0),
        jnp.where(unit.active & known, projections, 0),
        jnp.where(known, squared, 0),
    )
