"""Implicit sampling (DDIM), deterministic or not."""

import functools
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion.posterior import forward_variance
from ant_jax.diffusion.samplers.sampler import Sampler
from ant_jax.settings import Number


class _Coefficients(NamedTuple):
    signal: np.ndarray  # factor of the data after the step
    noise: np.ndarray  # variance of the noise after the step
    share: np.ndarray  # of that variance, replaced by new noise in DDPM
    eta: np.ndarray


def ddim(eta: Annotated[float, Number(0, 1)] = 0.0) -> Sampler:
    """Samples by the non-Markovian process of Song et al. 2021, eqs. 12 and 16.

    With eta = 0 it is Euler's method for the probability-flow ODE: in t for flow matching, in sigma
    for EDM, and in the ratio of noise to signal for all. A learned variance is ignored.

    Args:
      eta: Noise of the steps, in [0, 1]: 0 is deterministic given the first noise, 1 is DDPM with
        the least variance.

    Raises:
      ValueError: If ``eta`` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    return Sampler(functools.partial(_coefficients, eta), _step)


def _coefficients(eta, process, steps):
    del process
    share = forward_variance(steps) / steps.noise[1:]
    return _Coefficients(
        np.sqrt(steps.signal[:-1]), steps.noise[:-1], share, np.full(len(steps.t), eta)
    )


def _step(predict, x, level, own, noise):
    prediction = predict(x, level)
    # The share of the noise that is replaced by new noise (eq. 16, squared).
    fresh = own.eta**2 * own.share
    mean = own.signal * prediction.x0 + jnp.sqrt(own.noise * (1 - fresh)) * prediction.noise
    return mean + jnp.sqrt(own.noise * fresh) * noise
