"""The Euler-Maruyama method for the reverse SDE."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion.process import Process, Steps
from ant_jax.diffusion.samplers.sampler import Level, Sampler


class _Coefficients(NamedTuple):
    signal: np.ndarray
    noise: np.ndarray
    fresh: np.ndarray  # variance of the new noise


def euler_maruyama() -> Sampler:
    r"""Samples by the reverse SDE of Ma et al. 2024 (SiT), eq. 7, by Euler-Maruyama steps.

    The diffusion coefficient is :math:`w = s\, ds/dt` for the factor s of the noise. For flow
    matching this is the choice :math:`w_t = \sigma_t` of the paper, whose code takes twice as much.
    A step to the factors a', s' goes to :math:`a' x_0 + (s' - (s - s')/2)\, \epsilon` and adds
    noise of the variance :math:`s (s - s')`. The last step, which ends without noise, adds none and
    returns the predicted data.
    """
    return Sampler(_coefficients, _step)


def _coefficients(process: Process, steps: Steps) -> _Coefficients:
    del process
    after, before = np.sqrt(steps.noise[:-1]), np.sqrt(steps.noise[1:])
    inner = steps.noise[:-1] > 0
    fall = np.where(inner, before - after, 0)
    return _Coefficients(np.sqrt(steps.signal[:-1]), after - fall / 2, before * fall)


def _step(predict: Any, x: jax.Array, level: Level, own: _Coefficients, noise: jax.Array) -> Any:
    prediction = predict(x, level)
    mean = own.signal * prediction.x0 + own.noise * prediction.noise
    return mean + jnp.sqrt(own.fresh) * noise
