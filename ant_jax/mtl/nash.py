"""Nash-MTL (Navon et al., 2022), solved by Newton's method on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments

_RIDGE = 1e-6
_TOLERANCE = 1e-6
_MAX_ITERATIONS = 40


class NashState(NamedTuple):
    """Bargaining solution alpha, (k,), 0 where none is known yet."""

    alpha: jax.Array


def bargaining_solution(gram: jax.Array, active: jax.Array) -> jax.Array:
    r"""Solves :math:`G \alpha = 1 / \alpha`, :math:`\alpha > 0`, by damped Newton.

    The solution minimises the strictly convex, self-concordant
    :math:`\frac12 \alpha^T G \alpha - \sum_i \log \alpha_i`. With G scaled to unit diagonal (A) and
    :math:`\alpha = G_{ii}^{-1/2} b`, a Newton step in units of b solves
    :math:`(\mathrm{diag}(b) A\, \mathrm{diag}(b) + I) u = 1 - b \circ A b`, whose matrix is bounded
    below by I. With the Newton decrement :math:`\lambda`, :math:`|u_i| \le \lambda`, so the damped
    step :math:`b \leftarrow b (1 + u / (1 + \lambda))` keeps b positive and always descends.

    Args:
      gram: (k, k) Gram matrix of the gradients.
      active: (k,) bool; the other rows are left out. Active rows have a positive diagonal.

    Returns:
      alpha, (k,), 0 where not active. It solves the system with 1e-6 G_ii added to the diagonal,
      so that it exists for gradients that cancel exactly too. The residual
      |alpha_i (G alpha)_i - 1| is the rounding error of alpha in float32: at most 2e-6 + 1e-6 b^2
      for k <= 16, where b is the largest alpha_i sqrt(G_ii). b is about 1 for gradients that are
      orthogonal or agree, and 20 to 90 (a residual of 2e-4 to 2e-3) for gradients that cancel to
      5 %. For gradients that cancel exactly it is 1000 to 2500, and no digit is right.
    """
    # A row that is left out is a unit vector, which solves to b = 1 on its own.
    unit = unit_gram(gram, active).cosines
    diagonal = jnp.where(active, jnp.diag(gram), 1)

    def residual(b):
        # The ridge is kept apart: 1 + 1e-6 is off by 5 % of the 1e-6 in float32.
        return 1 - b * (jnp.dot(unit, b, precision="highest") + _RIDGE * b)

    def newton(carry):
        b, r, iteration = carry
        hessian = b[:, None] * unit * b + jnp.diag(1 + _RIDGE * b * b)
        u = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian), True), r)
        decrement = jnp.sqrt(jnp.maximum(jnp.sum(u * r), 0))
        step = jnp.where(decrement < 0.25, 1.0, 1 / (1 + decrement))
        b = b * (1 + step * u)
        return b, residual(b), iteration + 1

    def unsolved(carry):
        _, r, iteration = carry
        return (jnp.abs(r).max() > _TOLERANCE) & (iteration < _MAX_ITERATIONS)

    # The multiple of 1 for which the residuals add up to 0.
    total = jnp.maximum(unit.sum(), 0) + _RIDGE * diagonal.size
    start = jnp.sqrt(diagonal.size / total) * jnp.ones_like(diagonal)
    b, _, _ = jax.lax.while_loop(unsolved, newton, (start, residual(start), 0))
    return jnp.where(active, b * jax.lax.rsqrt(diagonal), 0)


def nash(k: int) -> Weighting:
    r"""Nash-MTL: the bargaining solution.

    :math:`w = \alpha / k,\ G \alpha = 1 / \alpha` (Navon et al., *Multi-Task Learning as a
    Bargaining Game*, ICML 2022, claim 3.1). Use it if gradients conflict and have different
    lengths: every task makes the same relative progress. The norm of the update is
    :math:`1 / \sqrt k`, since :math:`\| \sum_i \alpha_i g_i \|^2 = k`. k counts the tasks that are
    present. Tasks without a gradient get weight 0. Where no finite solution is found, the previous
    one is kept, at first :math:`\alpha_i = 1 / \|g_i\|`.

    The reference code renews the weights at every 25th step and clips the norm of the update, since
    weights that are not renewed may not fit the gradients: ``clipped(every(nash(k), 25), 1.0)``.

    Example::

      tx = optax.chain(mtl.combine(mtl.nash(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A `Weighting` that needs the Gram matrix.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(nash, k)

    def weigh(stats, state):
        gram, present = stats.gram, stats.present
        diagonal = jnp.diag(gram)
        active = present & (diagonal > 0)
        fallback = jax.lax.rsqrt(jnp.where(active, diagonal, 1))
        previous = jnp.where(active & (state.alpha == 0), fallback, state.alpha)
        alpha = bargaining_solution(gram, active)
        usable = jnp.all(jnp.isfinite(alpha) & ((alpha > 0) | ~active))
        alpha = jnp.where(usable & active, alpha, previous)
        weights = jnp.where(active, alpha, 0) / jnp.maximum(present.sum(), 1)
        return weights, NashState(alpha)

    init = lambda: NashState(jnp.zeros(k, jnp.float32))
    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"gram"}))
