r"""The posterior q(x_s | x_t, x_0): the reverse step from level t to s < t, given the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion.process import Steps


class Posterior(NamedTuple):
    """Constants of q(x_s | x_t, x_0) for S steps, (S,) float64; or those of one step.

    Attributes:
      x0: factor of the data in the mean.
      x: factor of x_t in the mean.
      variance: 0 for a step that ends without noise.
      log_least: log of the variance. For a first step without noise it is that of the second step.
      log_greatest: log of the variance of q(x_t | x_s), the greatest that a reverse step may have
        (DDPM, section 3.2).
    """

    x0: np.ndarray
    x: np.ndarray
    variance: np.ndarray
    log_least: np.ndarray
    log_greatest: np.ndarray


def posterior(steps: Steps) -> Posterior:
    """The constants of each step (Ho et al. 2020, eq. 7; Kingma et al. 2021, appendix A)."""
    beta, ratio = forward_variance(steps), steps.signal[1:] / steps.signal[:-1]
    before, noise = steps.noise[:-1], steps.noise[1:]
    variance = beta * before / noise
    least = variance
    if not variance[0]:
        least = np.append(variance[1] if len(variance) > 1 else beta[0], variance[1:])
    return Posterior(
        x0=np.sqrt(steps.signal[:-1]) * beta / noise,
        x=np.sqrt(ratio) * before / noise,
        variance=variance,
        log_least=np.log(least),
        log_greatest=np.log(beta),
    )


def forward_variance(steps: Steps) -> np.ndarray:
    r"""(S,) variances :math:`\beta = s_t^2 - (a_t / a_s)^2 s_s^2` of q(x_t | x_s)."""
    # Written with the sums of both squares, so that it is exactly 1 - ratio where these sums are 1.
    power, ratio = steps.signal + steps.noise, steps.signal[1:] / steps.signal[:-1]
    return power[1:] - ratio * power[:-1]


def mean(constants: Posterior, x0: jax.Array, x: jax.Array) -> jax.Array:
    """Mean of q(x_s | x_t, x_0)."""
    return x0 * constants.x0 + x * constants.x


def log_variance(constants: Posterior, fraction: jax.Array | float) -> jax.Array | np.ndarray:
    """Log-variance, a fraction of the way from least to greatest (improved DDPM, eq. 15)."""
    return fraction * constants.log_greatest + (1 - fraction) * constants.log_least


def gather(constants: np.ndarray, t: jax.Array) -> jax.Array:
    """Gathers (T,) constants at (B,) timesteps as (B, 1, 1, 1) float32, to broadcast on images."""
    return jnp.asarray(constants, jnp.float32)[t][:, None, None, None]
