"""EDM: a noise process without a factor of the data, and a preconditioned network.

Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models* (NeurIPS 2022).
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion import densities
from ant_jax.diffusion.continuous import ContinuousProcess, checked_output
from ant_jax.diffusion.loss_weights import LossWeight
from ant_jax.diffusion.process import Array, Denoise, Prediction
from ant_jax.settings import Affects, Number


@dataclasses.dataclass(frozen=True)
class EDM(ContinuousProcess):
    r"""Data with noise, :math:`x = x_0 + \sigma \epsilon` (Karras et al. 2022).

    The level t in [0, 1] is a linear function of :math:`\log \sigma`, from 0 at ``sigma_min`` to 1
    at ``sigma_max``. The network F takes scaled data and t, and :math:`x_0` is predicted as
    :math:`c_{skip} x + c_{out} F(c_{in} x, t)` with the factors of the paper's table 1. The paper
    gives the network :math:`\log(\sigma) / 4`, which is a linear function of t. The loss, the
    squared error of :math:`x_0` with the paper's weight, is the mean squared error of F.

    Attributes:
      mean: of :math:`\log \sigma` in training.
      std: of :math:`\log \sigma` in training. The normal density is cut off at both ends of
        :math:`\sigma`.
      sigma_data: standard deviation of the data.
      sigma_min: the least noise that the network sees.
      sigma_max: the most noise, where sampling starts.
      loss_weight: of the squared error of the noise, as a function of log-SNR, instead of the
        paper's weight; None for the paper's.

    Raises:
      ValueError: if a number is out of range.
    """

    mean: Annotated[float, Number(-100, 100)] = -1.2
    std: Annotated[float, Number(above=0)] = 1.2
    sigma_data: Annotated[float, Number(above=0), Affects.MEANING] = 0.5
    sigma_min: Annotated[float, Number(above=0), Affects.MEANING] = 0.002
    sigma_max: Annotated[float, Number(above=0), Affects.MEANING] = 80.0
    loss_weight: LossWeight | None = None

    def __post_init__(self):
        for name in ("std", "sigma_data", "sigma_min"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.sigma_min < self.sigma_max < np.inf:
            raise ValueError(
                f"sigma_max = {self.sigma_max} must be above sigma_min = {self.sigma_min}"
            )
        low, high = self._tails
        if not high - low > 1e-3:
            raise ValueError(
                f"the density of mean = {self.mean} and std = {self.std} is nearly 0 between "
                f"sigma_min = {self.sigma_min} and sigma_max = {self.sigma_max}"
            )

    @property
    def ratios(self) -> tuple[float, float]:
        """``sigma_min`` and ``sigma_max``."""
        return self.sigma_min, self.sigma_max

    def quantile(self, u: Array) -> Array:
        """The level below which a share u of the truncated normal density lies."""
        xp = u.__array_namespace__()
        low, high = self._tails
        log_sigma = self.mean + self.std * densities.special(u).ndtri(low + u * (high - low))
        least, greatest = self._ends
        t = (log_sigma - least) / (greatest - least)
        return xp.where(u <= 0, 0, xp.where(u >= 1, 1, t)).astype(u.dtype)

    def cdf(self, t: Array) -> Array:
        """The share of the density below the level t."""
        low, high = self._tails
        share = densities.special(t).ndtr((self._log_sigma(t) - self.mean) / self.std)
        return (share - low) / (high - low)

    def log_snr(self, t: np.ndarray) -> np.ndarray:
        """-2 log(sigma), in nats."""
        return -2 * self._log_sigma(np.asarray(t, np.float64))

    def at_log_snr(self, log_snr: np.ndarray) -> np.ndarray:
        """The levels with these log-SNR."""
        least, greatest = self._ends
        return (-np.asarray(log_snr, np.float64) / 2 - least) / (greatest - least)

    def factors(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """1 and sigma."""
        sigma = np.exp(self._log_sigma(np.asarray(t, np.float64)))
        return np.ones_like(sigma), sigma

    def noised(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x0 + sigma noise, float32."""
        return jnp.float32(x0) + self._sigma(t) * jnp.float32(noise)

    def target(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """What F should be: the data less its skipped part, divided by the factor of F."""
        sigma, data = self._sigma(t), self.sigma_data
        # (x0 - c_skip (x0 + sigma noise)) / c_out, where nothing large is subtracted.
        total = jnp.sqrt(sigma**2 + data**2)
        return (sigma / data * jnp.float32(x0) - data * jnp.float32(noise)) / total

    def losses(
        self,
        denoise: Denoise,
        x0: jax.Array,
        t: jax.Array,
        noise: jax.Array,
        y: jax.Array | None = None,
    ) -> jax.Array:
        """(B,) mean squared errors of F, or those of the noise times ``loss_weight``.

        Raises:
          ValueError: if the network's output has another shape than the data.
        """
        output = self._output(denoise, self.noised(x0, t, noise), t, y)
        errors = jnp.mean((output - self.target(x0, t, noise)) ** 2, axis=(1, 2, 3))
        if self.loss_weight is None:
            return errors
        log_sigma = self._log_sigma(jnp.float32(t))
        # The error of the noise is that of F times c_out / sigma.
        of_noise = self.sigma_data**2 / (jnp.exp(2 * log_sigma) + self.sigma_data**2)
        return errors * (self.loss_weight(-2 * log_sigma) * of_noise)

    def predict(
        self, denoise: Denoise, x: jax.Array, t: jax.Array, y: jax.Array | None = None
    ) -> Prediction:
        """Data and noise that the network predicts for x.

        Raises:
          ValueError: if the network's output has another shape than x.
        """
        output, sigma, data = self._output(denoise, x, t, y), self._sigma(t), self.sigma_data
        variance = sigma**2 + data**2
        total = jnp.sqrt(variance)
        x0 = data**2 / variance * x + sigma * data / total * output
        # (x - x0) / sigma
        return Prediction(x0, sigma / variance * x - data / total * output)

    def _output(self, denoise, x, t, y):
        """F for the data x, scaled to unit variance."""
        total = jnp.sqrt(self._sigma(t) ** 2 + self.sigma_data**2)
        return checked_output(denoise(x / total, t, y), x.shape)

    @property
    def _ends(self):
        """Logarithms of the least and the most noise."""
        return np.log(self.sigma_min), np.log(self.sigma_max)

    @property
    def _tails(self):
        """Shares of the whole normal density below both ends."""
        ends = (np.array(self._ends) - self.mean) / self.std
        return densities.special(ends).ndtr(ends).tolist()

    def _log_sigma(self, t):
        least, greatest = self._ends
        return least + t * (greatest - least)

    def _sigma(self, t):
        return jnp.exp(self._log_sigma(jnp.float32(t)))[:, None, None, None]
