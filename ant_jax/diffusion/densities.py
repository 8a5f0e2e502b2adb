"""Densities of the levels in [0, 1] by which training draws them, for NumPy and JAX arrays.

Each has a quantile function, from a share u in [0, 1] to a level, and its inverse, the cumulative
distribution function. Both rise from 0 to 1.
"""

from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np

from ant_jax.diffusion.process import Array

# Beyond these ends the mode density is not positive everywhere (Esser et al. 2024, section 3.1).
MODE_SCALES = (-1.0, 2 / (np.pi - 2))


def special(array: Array) -> ModuleType:
    """`scipy.special` for NumPy arrays, `jax.scipy.special` for JAX arrays."""
    # Imported late, because most processes need neither.
    if isinstance(array, np.ndarray | np.generic):
        import scipy.special

        return scipy.special
    import jax.scipy.special

    return jax.scipy.special


def logit_normal_quantile(u: Array, mean: float, std: float) -> Array:
    """Of the sigmoid of a normal variable (Esser et al. 2024, eq. 19)."""
    functions = special(u)
    return functions.expit(mean + std * functions.ndtri(u))


def logit_normal_cdf(t: Array, mean: float, std: float) -> Array:
    """The inverse of `logit_normal_quantile`."""
    functions = special(t)
    return functions.ndtr((functions.logit(t) - mean) / std)


def mode_quantile(u: Array, scale: float) -> Array:
    """Of the density with a mode (Esser et al. 2024, eq. 20).

    Args:
      u: shares of the density.
      scale: within `MODE_SCALES`: above 0 the middle levels are drawn more often, below 0 the ends
        are; 0 is uniform.
    """
    xp = u.__array_namespace__()
    # The paper's function falls from 1 to 0. Here u is its 1 - u.
    return u - scale * (xp.sin(np.pi / 2 * u) ** 2 - u)


def mode_cdf(t: Array, scale: float) -> Array:
    """The inverse of `mode_quantile`, by bisection to the precision of float32."""
    return _inverse(lambda u: mode_quantile(u, scale), t)


def shift(t: Array, factor: float) -> Array:
    r"""The level that has the odds t / (1 - t) of t times a factor (Esser et al. 2024, eq. 23).

    A factor above 1 moves levels to more noise. The inverse is the shift by 1 / factor.
    """
    # In this form both ends stay where they are, whatever the rounding.
    return factor * t / (factor * t + (1 - t))


def _inverse(rising: Callable[[Array], Array], values: Array) -> Array:
    xp = values.__array_namespace__()

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = rising(middle) < values
        return xp.where(below, middle, low), xp.where(below, high, middle)

    ends = xp.zeros_like(values), xp.ones_like(values)
    if xp is np:
        for number in range(48):
            ends = halve(number, ends)
    else:
        ends = jax.lax.fori_loop(0, 24, halve, ends)
    # The ends of [0, 1] are their own inverses.
    return xp.where(values <= 0, 0, xp.where(values >= 1, 1, (ends[0] + ends[1]) / 2))
