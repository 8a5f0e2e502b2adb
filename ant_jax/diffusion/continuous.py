"""What noise processes of continuous levels share: levels in [0, 1], drawn by a density."""

import abc

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion.process import Array, Process, Steps
from ant_jax.diffusion.spacing import noise_ratios


class ContinuousProcess(Process):
    """A noise process whose levels are the floats of [0, 1], with a density of the levels."""

    @property
    def span(self) -> float:
        """1.0."""
        return 1.0

    @property
    def ratios(self) -> tuple[float, float]:
        """The ends of the spacings "karras" and "log_snr", as ratios of noise to signal."""
        return 0.002, 80.0

    @abc.abstractmethod
    def quantile(self, u: Array) -> Array:
        """The level below which a share u in [0, 1] of the density lies, NumPy or JAX.

        It rises from 0 at u = 0 to 1 at u = 1.
        """

    @abc.abstractmethod
    def cdf(self, t: Array) -> Array:
        """The share of the density below the level t, the inverse of `quantile`, NumPy or JAX."""

    @abc.abstractmethod
    def at_log_snr(self, log_snr: np.ndarray) -> np.ndarray:
        """The levels with these log-SNR, the inverse of `log_snr`, float64."""

    def level(self, low: Array, high: Array, u: Array) -> Array:
        """The level that a share u in [0, 1) of the density in [low, high) lies below."""
        xp = u.__array_namespace__()
        start, end = self.cdf(low), self.cdf(high)
        t = self.quantile(start + u * (end - start)).astype(low.dtype)
        # In float32 `quantile` and `cdf` are not exact inverses.
        return xp.clip(t, low, xp.nextafter(high, low))

    def steps(self, num_steps: int, spacing: str = "even") -> Steps:
        """The noise levels of a sampler; its last step ends without noise.

        Args:
          num_steps: number of levels.
          spacing: "even": evenly spaced in t from 1 down; "karras" or "log_snr": see
            `spacing.noise_ratios`.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if spacing == "even":
            t = np.arange(1, num_steps + 1) / num_steps
        else:
            t = self.at_log_snr(-2 * np.log(noise_ratios(num_steps, spacing, *self.ratios)))
        signal, noise = self.factors(t)
        return Steps(t, np.append(1.0, signal**2), np.append(0.0, noise**2), float(noise[-1]))


def checked_output(output: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A network's output in float32.

    Raises:
      ValueError: if it has another shape than the data.
    """
    if output.shape != shape:
        raise ValueError(f"the network's output must have the shape {shape}, got {output.shape}")
    return jnp.float32(output)
