"""FairGrad: alpha-fair progress of the tasks (Ban and Ji, 2024), by Newton's method."""

from typing import Annotated

import jax
import jax.numpy as jnp

from ant_jax.mtl.cone import UnitGram, unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

# That of `nash`, whose rule this is for alpha = 1.
_RIDGE = 1e-6
_TOLERANCE = 1e-6
_MAX_ITERATIONS = 60
# So many steps near the solution that are not shorter than the last ones are rounding errors.
_MAX_STALLS = 2


def fair_weights(unit: UnitGram, alpha: float) -> jax.Array:
    r"""Solves :math:`G w = w^{-p}`, :math:`w > 0`, :math:`p = 1 / \alpha`, by damped Newton.

    With the cosines C, the norms n, their geometric mean m, :math:`c_i = (n_i / m)^{p - 1}` and
    :math:`w_i = m^{(p - 1) / (p + 1)} b_i / n_i` the system is :math:`C b = c\, b^{-p}`, whose
    numbers do not depend on the scale of the gradients. b minimises the strictly convex
    :math:`F(b) = \frac12 b^T C b - \sum_i c_i b_i^{1-p} / (1 - p)` (:math:`\log b_i` for p = 1).

    For a Newton step u in units of b, let :math:`\mu` be its largest decrease. Along
    :math:`b (1 + t u)` the curvature of F is at most :math:`(1 - t \mu)^{-(p + 1)}` times that at
    t = 0. So F decreases up to :math:`t = (1 - (1 + p \mu)^{-1/p}) / \mu` at least, which keeps b
    positive and is 1 for small steps: no line search is needed.

    Args:
      unit: the Gram matrix.
      alpha: > 0.

    Returns:
      w, (k,); 0 where a task is not active. It solves the system with 1e-6 G_ii added to the
      diagonal, so that it exists for gradients that cancel too.
    """
    cosines, norms, active = unit
    p = 1 / alpha
    eye = jnp.eye(norms.size, dtype=norms.dtype)
    logs = jnp.log(norms)
    mean = jnp.where(active, logs, 0).sum() / jnp.maximum(active.sum(), 1)
    # A row that is left out has c = 1, which solves to b = 1 on its own.
    log_c = jnp.where(active, (p - 1) * (logs - mean), 0)
    # The b of orthogonal gradients. In units of it, b is exp(x).
    start = jnp.exp(log_c / (1 + p))

    def product(matrix, b):
        return jnp.dot(matrix, b, precision="highest") + _RIDGE * b

    def residual(x):
        """1 - b^p (C b) / c, and the same with absolute values, which bounds its rounding error."""
        b, factor = start * jnp.exp(x), jnp.exp(p * x) / start
        return 1 - product(cosines, b) * factor, product(jnp.abs(cosines), b) * factor

    def newton(carry):
        x, (r, _), iteration, last, stalls = carry
        # In units in which the second derivatives of the sum are the identity.
        root = jnp.exp((1 + p) / 2 * x) * alpha**0.5
        hessian = root[:, None] * cosines * root + eye * (1 + _RIDGE * root**2)
        scale = start * jnp.exp((1 - p) / 2 * x)
        factor = (jnp.linalg.cholesky(hessian), True)
        u = alpha * jax.scipy.linalg.cho_solve(factor, scale * r) / scale
        largest = jnp.maximum(-u, 0).max()
        decrease = jnp.minimum(-jnp.expm1(-alpha * jnp.log1p(p * largest)), 0.999)
        step = jnp.where(largest > 0, decrease / jnp.where(largest > 0, largest, 1), 1)
        x = x + jnp.log1p(step * u)
        change = jnp.abs(u).max()
        # Far from the solution, the steps of weights that grow have about the same size, alpha.
        stalls += (change < jnp.minimum(alpha, 1) / 2) & (change > 0.9 * last)
        return x, residual(x), iteration + 1, change, stalls

    def unsolved(carry):
        _, (r, size), iteration, _, stalls = carry
        inexact = jnp.any(jnp.abs(r) > _TOLERANCE * (1 + size))
        return inexact & (iteration < _MAX_ITERATIONS) & (stalls < _MAX_STALLS)

    # The multiple of it for which b (C b - c b^-p) adds up to 0.
    squared = jnp.sum(start * start)
    total = jnp.dot(start, product(cosines, start), precision="highest")
    total = jnp.maximum(total, _RIDGE * squared)
    x = jnp.log(squared / total) / (1 + p) * jnp.ones_like(norms)
    carry = (x, residual(x), 0, jnp.full((), jnp.inf, x.dtype), 0)
    x, *_ = jax.lax.while_loop(unsolved, newton, carry)
    return jnp.where(active, start * jnp.exp(x + (p - 1) / (p + 1) * mean) / norms, 0)


def fairgrad(k: int, alpha: Annotated[float, Number(0.25, 10)] = 1.0) -> Weighting:
    r"""FairGrad: fair resource allocation.

    :math:`G w = w^{-1/\alpha},\ w > 0`, elementwise: the update maximises the :math:`\alpha`-fair
    utility of the progress of all tasks (Ban and Ji, *Fair Resource Allocation in Multi-Task
    Learning*, ICML 2024, eq. 4). Use it if one number should choose between the sum of the progress
    and the least progress. The update conflicts with no gradient. A small :math:`\alpha` is close
    to the mean. 1 is proportional fairness: the weights are k times those of `nash`. A large one
    favours the task of the least progress.

    For :math:`\alpha = 1` the norm of the update is :math:`\sqrt k`, whatever the norms of the
    gradients. In general it is their scale to the power :math:`(1 - \alpha) / (1 + \alpha)`. So use
    Adam, or `clipped`: the authors' code clips the norm to 1. The system is solved in a form that
    does not depend on the scale of the gradients. The solver of the authors' code has absolute
    tolerances and is inexact for gradients of norms about 1e-3.

    Example::

      tx = optax.chain(mtl.combine(mtl.fairgrad(5, alpha=2.0)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      alpha: fairness; a large one favours the task of the least progress.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Tasks without a gradient get weight 0.

    Raises:
      ValueError: if k < 1, or if alpha is not in 0.25 .. 10.
    """
    check_arguments(fairgrad, k, alpha=alpha)

    def weigh(stats, state):
        return fair_weights(unit_gram(stats.gram, stats.present), alpha), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
