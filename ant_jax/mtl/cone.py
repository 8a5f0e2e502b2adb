r"""Exact solutions of the small quadratic programmes of several methods, on the device.

The programmes of MGDA, CAGrad, UPGrad and DualProj all have the form

.. math:: \min_{z \ge 0} \tfrac12 z^T M z + q^T z,

with M the (k, k) matrix of the cosines between gradients. The solution is the z of the linear
complementarity problem :math:`z \ge 0,\ y = M z + q \ge 0,\ z_i y_i = 0`, which is found by
pivoting: a few k x k solves, and exact up to rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_TOLERANCE = 1e-6
# Pivots of all infeasible indices at once that may bring no gain before single ones.
_PATIENCE = 3


class UnitGram(NamedTuple):
    """A Gram matrix as cosines and norms.

    Attributes:
      cosines: (k, k) with unit diagonal; the row of a task that is not active is that of the
        identity.
      norms: (k,) of the gradients; 1 where a task is not active.
      active: (k,) bool, whether a task is present and has a gradient.
    """

    cosines: jax.Array
    norms: jax.Array
    active: jax.Array


def unit_gram(gram: jax.Array, present: jax.Array) -> UnitGram:
    """Splits a Gram matrix into cosines and norms; no product of two entries overflows."""
    diagonal = jnp.diag(gram)
    active = present & (diagonal > 0)
    diagonal = jnp.where(active, diagonal, 1)
    eye = jnp.eye(diagonal.size, dtype=gram.dtype)
    cosines = gram / diagonal[:, None] * jnp.sqrt(diagonal[:, None] / diagonal)
    pairs = active[:, None] & active & (eye == 0)
    cosines = eye + jnp.where(pairs, jnp.clip(cosines, -1, 1), 0)
    return UnitGram(cosines, jnp.sqrt(diagonal), active)


def ridge(k: int) -> float:
    """A number to add to the unit diagonal, so that a programme has exactly one solution.

    It is about the rounding error of the eigenvalues of k cosines in float32.
    """
    return 2e-7 * max(k, 5)


def min_norm_weights(unit: UnitGram) -> jax.Array:
    r"""The weights of the shortest vector in the convex hull of the gradients.

    :math:`\min_{x \ge 0,\ 1^T x = 1} x^T G x`. With :math:`z_i = n_i x_i` and
    :math:`a_i = \min_j n_j / n_i` it is a multiple of the solution of
    :math:`\min_{z \ge 0} z^T C z + (a^T z - 1)^2`, whose numbers are about 1 whatever the norms.

    Args:
      unit: the Gram matrix.

    Returns:
      x, (k,); 0 where a task is not active, and 0 everywhere if none is.
    """
    k = unit.norms.size
    shortest = jnp.where(unit.active, unit.norms, jnp.inf).min()
    a = jnp.where(unit.active, shortest / unit.norms, 0)
    matrix = unit.cosines + ridge(k) * jnp.eye(k, dtype=a.dtype) + a[:, None] * a
    # x is z over the norms, times one factor for all.
    x = complementarity(matrix, -a) * a
    return x / jnp.maximum(x.sum(), jnp.finfo(x.dtype).tiny)


def dual_cone_weights(unit: UnitGram, weights: jax.Array) -> jax.Array:
    r"""The weights of the projection of :math:`J^T u` on the dual cone of the gradients.

    The dual cone holds the vectors that have no negative inner product with a gradient. The weights
    are :math:`\arg\min_{v \ge u} v^T G v` (Quinton and Rey, *Jacobian Descent for Multi-Objective
    Optimization*, 2024, proposition 1).

    Args:
      unit: the Gram matrix.
      weights: u, (k,).

    Returns:
      v, (k,).
    """
    k = unit.norms.size
    start = jnp.where(unit.active, weights * unit.norms, 0)
    scale = jnp.maximum(jnp.abs(start).max(), jnp.finfo(start.dtype).tiny)
    start = start / scale
    matrix = unit.cosines + ridge(k) * jnp.eye(k, dtype=unit.cosines.dtype)
    z = complementarity(matrix, jnp.dot(matrix, start, precision="highest"))
    return weights + z * scale / unit.norms


def complementarity(matrix: jax.Array, q: jax.Array, free: jax.Array | None = None) -> jax.Array:
    r"""Solves :math:`z \ge 0,\ y = M z + q \ge 0,\ z^T y = 0` by block principal pivoting.

    F is the set of the indices where z may be positive. Each pivot solves
    :math:`M_{FF} z_F = -q_F` and moves the indices whose z or y is negative to the other side: all
    of them as long as their number falls, else the last one alone, which ends after finitely many
    pivots (Judice and Pires, *A block principal pivoting algorithm for large-scale strictly
    monotone linear complementarity problems*, Computers and Operations Research 1994).

    Args:
      matrix: (k, k) symmetric, positive definite, of about unit diagonal.
      q: (k,).
      free: (k,) bool, the first F; a good guess saves pivots. None for the empty set.

    Returns:
      z, (k,).
    """
    k = q.size
    tolerance = _TOLERANCE * jnp.maximum(jnp.abs(q).max(), jnp.finfo(q.dtype).tiny)
    free = jnp.zeros(k, bool) if free is None else free

    def solve(free):
        pairs = free[:, None] & free
        # Outside of F the identity, which gives 0 there.
        system = jnp.where(pairs, matrix, jnp.eye(k, dtype=matrix.dtype))
        factor = jnp.linalg.cholesky(system)
        z = jax.scipy.linalg.cho_solve((factor, True), jnp.where(free, -q, 0))
        y = jnp.dot(matrix, z, precision="highest") + q
        return z, jnp.where(free, z < 0, y < -tolerance)

    def pivot(carry):
        free, _, bad, least, patience, count = carry
        number = bad.sum(dtype=jnp.int32)
        better = number < least
        whole = better | (patience > 0)
        last = jnp.arange(k) == k - 1 - jnp.argmax(bad[::-1])
        free = free ^ jnp.where(whole, bad, last)
        patience = jnp.where(better, _PATIENCE, jnp.maximum(patience - 1, 0))
        return free, *solve(free), jnp.minimum(number, least), patience, count + 1

    unsolved = lambda carry: carry[2].any() & (carry[-1] < 20 * k)
    start = (free, *solve(free), jnp.int32(k + 1), jnp.int32(_PATIENCE), jnp.int32(0))
    _, z, *_ = jax.lax.while_loop(unsolved, pivot, start)
    return jnp.maximum(z, 0)


def project_on_simplex(x: jax.Array, present: jax.Array) -> jax.Array:
    r"""The nearest point of the probability simplex, :math:`z_i = \max(x_i - \theta, 0)`.

    :math:`\theta` is the number for which z sums to 1; it is found by sorting (Held, Wolfe and
    Crowder, *Validation of subgradient optimization*, Mathematical Programming 1974).

    Args:
      x: (k,).
      present: (k,) bool; the others are left out.

    Returns:
      z, (k,), 0 where not present.
    """
    x = jnp.where(present, x, -jnp.inf)
    # The shift changes nothing but the rounding of a large x.
    x = x - jnp.where(present.any(), x.max(), 0)
    falling = -jnp.sort(-x)
    thresholds = (jnp.cumsum(falling) - 1) / jnp.arange(1, x.size + 1)
    last = jnp.maximum((falling > thresholds).sum() - 1, 0)
    return jnp.where(present, jnp.maximum(x - thresholds[last], 0), 0)
