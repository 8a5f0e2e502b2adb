r"""What a noise process is: the contract between processes, training and samplers.

Every process noises data as :math:`x_t = a_t x_0 + s_t \epsilon`, with factors that depend on the
noise level t alone. A process is one file of this folder, with a subclass of `Process` and a
component that returns an instance of it. Compiled programs are cached by the process, so it is
immutable and hashable, and a component returns the same or an equal object for equal settings.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

# Arrays of one of the two libraries, which give an array of the same.
Array = TypeVar("Array", jax.Array, np.ndarray)
# The network with its parameters bound: (x, t, y) -> output.
Denoise = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


class Prediction(NamedTuple):
    """What a network predicts for noised data.

    Attributes:
      x0: (B, H, W, C) float32 data.
      noise: (B, H, W, C) float32 noise.
      variance: (B, H, W, C) or a number: the log-variance of a reverse step, as a fraction of the
        way from the least (0), that of q(x_s | x_t, x_0), to the greatest (1), that of
        q(x_t | x_s). None if the process does not specify it.
    """

    x0: jax.Array
    noise: jax.Array
    variance: jax.Array | float | None = None


class Steps(NamedTuple):
    """The noise levels of a sampler in S steps, from the least noise to the most.

    Attributes:
      t: (S,) NumPy levels at which the network is called.
      signal: (S + 1,) float64 squares of the factors of the data. Index 0 is the end of sampling,
        and index i + 1 belongs to ``t[i]``.
      noise: (S + 1,) float64 squares of the factors of the noise.
      start: standard deviation of the noise that sampling starts from.
    """

    t: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    start: float = 1.0


class Process(abc.ABC):
    """A noise process: how data is noised, what the network predicts, and its loss.

    Arrays have the shape (B, H, W, C), levels (B,). All arithmetic is in float32, whatever the
    dtype of the network.

    Attributes:
      loss_weight: what multiplies the squared error by level; None for ones. It is a field, so
        ``dataclasses.replace(process, loss_weight=None)`` is the process without it.
    """

    loss_weight: Any

    @property
    @abc.abstractmethod
    def span(self) -> int | float:
        """The upper end of the levels: the integer T of levels 0 .. T - 1, or 1.0 of [0, 1]."""

    @abc.abstractmethod
    def level(self, low: Array, high: Array, u: Array) -> Array:
        """The level a fraction u in [0, 1) of the way from low to high, by the process's density.

        NumPy arrays are accepted too, and are computed in their own precision.

        Returns:
          Levels in [low, high), whatever the rounding.
        """

    def cdf(self, t: Array) -> Array:
        """How much of the training density lies below the level t, NumPy or JAX.

        The number of timesteps for discrete levels, a share in [0, 1] for continuous ones.
        """
        return t

    @abc.abstractmethod
    def factors(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The factors of data and noise at the levels t, float64; NumPy alone."""

    def log_snr(self, t: np.ndarray) -> np.ndarray:
        """Log of signal^2 / noise^2 in nats, float64, strictly decreasing in t; NumPy alone."""
        signal, noise = self.factors(t)
        return 2 * (np.log(signal) - np.log(noise))

    def at_log_snr(self, log_snr: np.ndarray) -> np.ndarray:
        """The levels with these log-SNR, or the nearest discrete ones; NumPy alone."""
        falling = self.log_snr(np.arange(self.span))
        middles = (falling[:-1] + falling[1:]) / 2
        return np.searchsorted(-middles, -np.asarray(log_snr, np.float64))

    @abc.abstractmethod
    def noised(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Data with noise of the levels t, float32."""

    @abc.abstractmethod
    def target(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """What a perfect network outputs for data with this noise, float32 (B, H, W, C).

        The channels of a learned variance are not part of it.
        """

    @abc.abstractmethod
    def losses(
        self,
        denoise: Denoise,
        x0: jax.Array,
        t: jax.Array,
        noise: jax.Array,
        y: jax.Array | None = None,
    ) -> jax.Array:
        """(B,) float32 training losses, means over pixels and channels, times ``loss_weight``.

        Args:
          denoise: the network.
          x0: data, scaled to [-1, 1].
          t: levels.
          noise: standard normal noise.
          y: labels or None, given to the network as they are.
        """

    @abc.abstractmethod
    def predict(
        self, denoise: Denoise, x: jax.Array, t: jax.Array, y: jax.Array | None = None
    ) -> Prediction:
        """What the network predicts for x. Data and noise are affine in its first C channels."""

    @abc.abstractmethod
    def steps(self, num_steps: int, spacing: str = "even") -> Steps:
        """The noise levels of a sampler with ``num_steps`` steps.

        Raises:
          ValueError: if the spacing is unknown, or does not give that many levels.
        """
