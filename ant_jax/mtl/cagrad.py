"""CAGrad: the best worst-case progress near the mean gradient (Liu et al., 2021)."""

from typing import Annotated

import jax
import jax.numpy as jnp

from ant_jax.mtl.cone import UnitGram, complementarity, ridge, unit_gram
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

_TOLERANCE = 1e-6
_MAX_ITERATIONS = 40


def worst_case_shift(unit: UnitGram, mean: jax.Array, c: float) -> jax.Array:
    r"""The weights v of the shift :math:`J^T v` from the mean gradient to CAGrad's update.

    For a bound t on the worst progress, the shortest shift solves a linear complementarity
    problem: :math:`v \ge 0,\ G (u + v) \ge t`, with equality where v is positive. Its length grows
    with t, and on a fixed set of positive weights its square is a quadratic in t. So two or three
    steps find t: solve, and take the root of the quadratic. A bracket guards them.

    Args:
      unit: the Gram matrix.
      mean: u, (k,), the weights of the mean gradient.
      c: length of the shift, in lengths of the mean gradient.

    Returns:
      v, (k,). In float32 the worst progress is up to 2e-4 of the product of both lengths below the
      optimum if gradients cancel to 1e-3 or exactly; otherwise 1e-6.
    """
    cosines, norms, active = unit
    k = norms.size
    dot = lambda a, b: jnp.dot(a, b, precision="highest")
    longest = jnp.where(active, norms, 0).max()
    longest = jnp.where(longest > 0, longest, 1)
    start = mean * norms / longest
    length = jnp.sqrt(jnp.maximum(dot(start, dot(cosines, start)), 0))
    # All in units of the length of the mean gradient, so progress is a cosine.
    progress = dot(cosines, start) / jnp.where(length > 0, length, 1)
    progress = jnp.where(active, jnp.clip(progress, -1, 1), 0)
    shortest = jnp.where(active, norms, jnp.inf).min()
    bound = jnp.where(active, shortest / norms, 0)
    matrix = cosines + ridge(k) * jnp.eye(k, dtype=cosines.dtype)

    def at(t, free):
        """The shortest shift z, its length, and the t where this set gives the length c."""
        z = complementarity(matrix, progress - t * bound, free)
        free = z > 0
        system = jnp.where(free[:, None] & free, matrix, jnp.eye(k, dtype=matrix.dtype))
        sides = jnp.where(free[:, None], jnp.stack([bound, progress], axis=1), 0)
        x, y = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), sides).T
        a, b = dot(bound, x), dot(bound, y)
        root = jnp.sqrt(jnp.maximum(b * b - a * (dot(progress, y) - c * c), 0))
        return z, jnp.sqrt(jnp.maximum(dot(z, dot(matrix, z)), 0)), (b + root) / a

    def step(carry):
        low, high, t, z, _, count = carry
        z, shift, root = at(t, z > 0)
        low, high = jnp.where(shift < c, t, low), jnp.where(shift < c, high, t)
        inside = (root > low) & (root < high)
        return low, high, jnp.where(inside, root, (low + high) / 2), z, shift, count + 1

    def unsolved(carry):
        low, high, _, _, shift, count = carry
        wide = high - low > 1e-7 * (jnp.abs(low) + jnp.abs(high))
        return (jnp.abs(shift - c) > _TOLERANCE * c) & wide & (count < _MAX_ITERATIONS)

    low = jnp.where(active, progress / jnp.where(active, bound, 1), jnp.inf).min()
    high = jnp.float32((1 + c) * (1 + 1e-5))
    zeros = jnp.zeros(k, jnp.float32)
    carry = (low, high, (low + high) / 2, zeros, jnp.float32(0), jnp.int32(0))
    *_, z, _, _ = jax.lax.while_loop(unsolved, step, carry)
    # The ridge shortens the shift; where no progress is possible, it ends before its length is c.
    z *= jnp.minimum(1, c / jnp.sqrt(jnp.maximum(dot(z, dot(cosines, z)), 1e-30)))
    return z * length * longest / norms


def cagrad(k: int, c: Annotated[float, Number(0)] = 0.4) -> Weighting:
    r"""CAGrad: conflict-averse gradient descent.

    :math:`\max_d \min_i \langle d, g_i \rangle,\ \| d - g_0 \| \le c \| g_0 \|`: among all d near
    the mean gradient :math:`g_0`, the update has the largest progress of the worst task. It is then
    divided by :math:`1 + c^2` (Liu et al., *Conflict-Averse Gradient Descent for Multi-task
    Learning*, NeurIPS 2021, algorithm 1; the division is that of the authors' code). Use it if the
    mean loss must fall and no task may be left behind. With c = 0 it is the mean; a large c gives
    the direction of `mgda`.

    The programme is solved exactly and does not depend on the scale of the gradients. The authors'
    code stops at the mean if the gradients are below about 1e-2, because of absolute tolerances.

    Example::

      tx = optax.chain(mtl.combine(mtl.cagrad(5, c=0.4)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      c: radius around the mean gradient, in its lengths.

    Returns:
      A stateless `Weighting` that needs the Gram matrix.

    Raises:
      ValueError: if k < 1, or if a setting is out of its range.
    """
    check_arguments(cagrad, k, c=c)

    def weigh(stats, state):
        unit = unit_gram(stats.gram, stats.present)
        mean = unit.active / jnp.maximum(unit.active.sum(), 1).astype(jnp.float32)
        return (mean + worst_case_shift(unit, mean, c)) / (1 + c * c), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
