"""Ancestral sampling (DDPM)."""

import jax.numpy as jnp

from ant_jax.diffusion import posterior
from ant_jax.diffusion.samplers.sampler import Sampler


def ddpm() -> Sampler:
    """Samples by the reverse process of Ho et al. 2020, algorithm 2.

    The variance of each step is that of the process or its network, or the least variance if they
    do not specify one.
    """
    return Sampler(lambda process, steps: posterior.posterior(steps), _step)


def _step(predict, x, level, constants, noise):
    prediction = predict(x, level)
    fraction = 0.0 if prediction.variance is None else prediction.variance
    # A last step that ends without noise returns its mean.
    keep = constants.variance > 0
    sigma = keep * jnp.exp(0.5 * posterior.log_variance(constants, fraction))
    return posterior.mean(constants, prediction.x0, x) + sigma * noise
