"""The Gaussian diffusion process of discrete timesteps, and its training losses.

Notation follows Ho et al. 2020 ("DDPM") and Nichol & Dhariwal 2021 ("improved DDPM"), with
timesteps counted from 0 (least noise) to T - 1.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from ant_jax.diffusion import posterior, schedule
from ant_jax.diffusion.loss_weights import LossWeight
from ant_jax.diffusion.process import Array, Denoise, Prediction, Process, Steps
from ant_jax.diffusion.spacing import RATIO_SPACINGS, noise_ratios, spaced_timesteps
from ant_jax.settings import Affects, Integer, OneOf

_VARIANCES = ("fixed_small", "fixed_large", "learned_range")
_PREDICTIONS = ("epsilon", "v")
# Nats; -log(1e-12), at which the code of DDPM and improved DDPM clips the decoder's term.
_MAX_SLOPE = 12 * np.log(10)


# "schedule" is the name of the setting and of the module.
def gaussian(
    timesteps: Annotated[int, Integer(1, 10_000)] = 1000,
    schedule: Annotated[str, OneOf(*schedule.SCHEDULES)] = "cosine",
    variance: Annotated[str, OneOf(*_VARIANCES)] = "fixed_large",
    prediction: Annotated[str, OneOf(*_PREDICTIONS), Affects.MEANING] = "epsilon",
    loss_weight: LossWeight | None = None,
) -> "GaussianDiffusion":
    """The process of a named schedule; the same object for equal settings.

    Args:
      timesteps: T.
      schedule: of the noise: "cosine", "linear" or "ldm"; see
        `ant_jax.diffusion.schedule.alphas_bar`.
      variance: of the reverse process: "fixed_small", "fixed_large" or "learned_range"; see
        `GaussianDiffusion`.
      prediction: what the network predicts: "epsilon", the noise, or "v".
      loss_weight: of the squared error of the noise, as a function of log-SNR; None for ones. A
        network that predicts v gets the same loss.

    Raises:
      ValueError: for unknown settings, or if in float32 all loss weights are 0 or one is infinite.
    """
    return _gaussian(timesteps, schedule, variance, prediction, loss_weight)


# Always called with positional arguments, because a cache distinguishes f(a=1) from f(1).
@functools.cache
def _gaussian(timesteps, schedule_name, variance, prediction, loss_weight):
    alphas_bar = schedule.alphas_bar(schedule_name, timesteps)
    weight = None
    if loss_weight is not None:
        weight = loss_weight(schedule.log_snr(alphas_bar))
        if prediction == "v":
            # The error of v is that of epsilon over the square root of alphas_bar.
            weight = weight * alphas_bar
        if not 0 < np.max(np.float32(weight)) < np.inf:
            raise ValueError(
                f"the weights of {loss_weight} are all 0 in float32, or one is infinite: change "
                "its settings"
            )
    return GaussianDiffusion(alphas_bar, variance, prediction, weight)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion(Process):
    r"""A diffusion process, as float64 NumPy constants by timestep.

    Instances are immutable and hash by identity, so a jitted function can close over one or take it
    as a static argument.

    Attributes:
      alphas_bar: (T,) signal fractions :math:`\bar\alpha_t`, strictly decreasing, in (0, 1).
      variance: Reverse-process variance: ``"fixed_small"`` is :math:`\tilde\beta_t` and
        ``"fixed_large"`` is :math:`\beta_t` (DDPM, section 3.2); ``"learned_range"`` lets the
        network interpolate between their logarithms (improved DDPM, eq. 15), in C further output
        channels, -1 for the first and 1 for the second.
      prediction: What the network's first C output channels are: ``"epsilon"``, the noise, or
        ``"v"``, :math:`\sqrt{\bar\alpha_t} \epsilon - \sqrt{1-\bar\alpha_t} x_0` (Salimans & Ho
        2022, appendix D).
      loss_weight: (T,) factors of the mean squared error of the prediction; None means ones.

    Raises:
      ValueError: If an array has the wrong shape, ``alphas_bar`` is not strictly decreasing in
        (0, 1), or ``variance`` or ``prediction`` is unknown.
    """

    alphas_bar: np.ndarray
    variance: str = "fixed_large"
    prediction: str = "epsilon"
    loss_weight: np.ndarray | None = None

    def __post_init__(self):
        _freeze_array(self, "alphas_bar")
        alphas_bar = self.alphas_bar
        if alphas_bar.ndim != 1 or alphas_bar.size == 0:
            raise ValueError(f"alphas_bar must have the shape (T,), got {alphas_bar.shape}")
        if not np.all((alphas_bar > 0) & (alphas_bar < 1)):
            raise ValueError("alphas_bar must lie in (0, 1)")
        if not np.all(np.diff(alphas_bar) < 0):
            raise ValueError("alphas_bar must be strictly decreasing")
        if self.variance not in _VARIANCES:
            raise ValueError(f"unknown variance {self.variance!r}: expected one of {_VARIANCES}")
        if self.prediction not in _PREDICTIONS:
            raise ValueError(
                f"unknown prediction {self.prediction!r}: expected one of {_PREDICTIONS}"
            )
        if self.loss_weight is not None:
            _freeze_array(self, "loss_weight")
            shape = self.loss_weight.shape
            if shape != alphas_bar.shape:
                raise ValueError(f"loss_weight must have the shape {alphas_bar.shape}, got {shape}")

    @property
    def span(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_bar)

    def level(self, low: Array, high: Array, u: Array) -> Array:
        """The timestep a fraction u in [0, 1) of the way from low to high, both integers.

        It is low + floor(u (high - low)). In float32, floor(low + u (high - low)) can be ``high``.
        """
        xp = u.__array_namespace__()
        return low + xp.floor(u * (high - low)).astype(low.dtype)

    def log_snr(self, t: np.ndarray) -> np.ndarray:
        """Log signal-to-noise ratios of timesteps, in nats, float64."""
        return schedule.log_snr(self.alphas_bar)[t]

    def factors(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Square roots of ``alphas_bar`` and of the rest of 1."""
        return np.sqrt(self.alphas_bar[t]), np.sqrt(1 - self.alphas_bar[t])

    def noised(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        r"""Noises data: :math:`\sqrt{\bar\alpha_t} x_0 + \sqrt{1-\bar\alpha_t} \epsilon`.

        Args:
          x0: (B, H, W, C) data.
          t: (B,) integer timesteps in [0, T).
          noise: (B, H, W, C) standard normal noise.

        Returns:
          (B, H, W, C) float32 samples of q(x_t | x_0) (DDPM, eq. 4).
        """
        signal, sigma = self._factors(t)
        return signal * jnp.float32(x0) + sigma * jnp.float32(noise)

    def target(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """The noise or v, (B, H, W, C) float32."""
        if self.prediction == "epsilon":
            return jnp.float32(noise)
        signal, sigma = self._factors(t)
        return signal * jnp.float32(noise) - sigma * jnp.float32(x0)

    def predict(
        self, denoise: Denoise, x: jax.Array, t: jax.Array, y: jax.Array | None = None
    ) -> Prediction:
        """Data, noise and variance that the network predicts for x.

        Raises:
          ValueError: If the network's output has the wrong shape.
        """
        prediction, variance = self._split(denoise(x, t, y), x.shape)
        fraction = float(self.variance == "fixed_large")
        if variance is not None:
            fraction = (variance + 1) / 2
        return Prediction(*self._parts(prediction, x, t), fraction)

    def steps(self, num_steps: int, spacing: str = "even") -> Steps:
        """Some of the timesteps, see `spaced_timesteps`; the last step ends without noise.

        With ``"ldm"`` it ends at the noise of timestep 0. "karras" and "log_snr" take the timesteps
        nearest to `spacing.noise_ratios`, from the least ratio of the process to its greatest, but
        at most 80.

        Raises:
          ValueError: if the spacing is unknown, or gives another number of timesteps.
        """
        if spacing in RATIO_SPACINGS:
            ends = np.exp(-schedule.log_snr(self.alphas_bar[[0, -1]]) / 2)
            ratios = noise_ratios(num_steps, spacing, ends[0], min(ends[1], 80.0))
            t = np.unique(self.at_log_snr(-2 * np.log(ratios)))
            if len(t) < num_steps:
                raise ValueError(
                    f"num_steps = {num_steps} of spacing {spacing!r} fall on only {len(t)} of the "
                    f"{self.span} timesteps: take fewer steps"
                )
        else:
            t = spaced_timesteps(self.span, num_steps, spacing)
        end = self.alphas_bar[0] if spacing == "ldm" else 1.0
        signal = np.append(end, self.alphas_bar[t])
        return Steps(t, signal, 1 - signal)

    def losses(
        self,
        denoise: Denoise,
        x0: jax.Array,
        t: jax.Array,
        noise: jax.Array,
        y: jax.Array | None = None,
    ) -> jax.Array:
        r"""Training loss of each example, averaged over pixels and channels.

        The weighted mean squared error of the prediction (DDPM, eq. 14) and, if the variance is
        learned, the hybrid objective's :math:`\lambda T L_t` with :math:`\lambda = 0.001`
        (improved DDPM, eq. 16), where :math:`L_t` is the term of the variational bound in bits per
        dimension. Its gradient reaches the variance channels only. ``loss_weight`` multiplies the
        squared error alone.

        All terms of the bound are exact. They grow with the square of the distance between data and
        prediction in standard deviations: :math:`L_0` is 881 nats at 42 standard deviations. The
        papers' code clips it at 27.6 nats, which is -log(1e-12). The gradient of :math:`L_0` by the
        log-variance is exact up to 27.6 nats and stays at -27.6 beyond, where it is 0 in the
        papers' code. The gradients of the other terms are not bounded, as in their code.

        Args:
          denoise: The network, ``denoise(x_t, t, y)`` to (B, H, W, C), or to (B, H, W, 2C) with the
            variance channels last if the variance is learned.
          x0: (B, H, W, C) data, scaled to [-1, 1].
          t: (B,) integer timesteps in [0, T).
          noise: (B, H, W, C) standard normal noise.
          y: Labels or None, given to the network as they are.

        Returns:
          (B,) float32 losses.

        Raises:
          ValueError: If the network's output has the wrong shape.
        """
        x_t = self.noised(x0, t, noise)
        output = denoise(x_t, t, y)
        prediction, variance = self._split(output, x_t.shape)
        error = prediction - self.target(x0, t, noise)
        losses = jnp.mean(error**2, axis=(1, 2, 3))
        if self.loss_weight is not None:
            losses *= jnp.asarray(self.loss_weight, jnp.float32)[t]
        if variance is not None:
            predicted_x0, _ = self._parts(jax.lax.stop_gradient(prediction), x_t, t)
            bound = self._variational_bound(jnp.float32(x0), x_t, t, predicted_x0, variance)
            losses += self.span / 1000 * bound
        return losses

    def _factors(self, t):
        """Factors (B, 1, 1, 1) of data and noise."""
        return (
            posterior.gather(np.sqrt(self.alphas_bar), t),
            posterior.gather(np.sqrt(1 - self.alphas_bar), t),
        )

    def _split(self, output, shape):
        """Splits the network's output into prediction and variance channels, in float32."""
        channels = shape[-1]
        learned = self.variance == "learned_range"
        expected = (*shape[:-1], 2 * channels if learned else channels)
        if output.shape != expected:
            raise ValueError(
                f"variance {self.variance!r} needs a model output of shape {expected}, "
                f"got {output.shape}"
            )
        output = jnp.float32(output)
        return output[..., :channels], output[..., channels:] if learned else None

    def _parts(self, prediction, x_t, t):
        """Data and noise that ``x_t`` consists of, according to the network's prediction."""
        if self.prediction == "epsilon":
            ratio = 1 / self.alphas_bar
            to_x0 = posterior.gather(np.sqrt(ratio), t)
            return to_x0 * x_t - posterior.gather(np.sqrt(ratio - 1), t) * prediction, prediction
        signal, sigma = self._factors(t)
        return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t

    @functools.cached_property
    def _posterior(self):
        signal = np.append(1.0, self.alphas_bar)
        return posterior.posterior(Steps(np.arange(self.span), signal, 1 - signal))

    def _variational_bound(self, x0, x_t, t, predicted_x0, variance):
        """(B,) terms of the variational bound in bits per dimension (DDPM, eqs. 5 and 13)."""
        constants = jax.tree.map(lambda table: posterior.gather(table, t), self._posterior)
        mean = posterior.mean(constants, predicted_x0, x_t)
        log_variance = jnp.asarray(posterior.log_variance(constants, (variance + 1) / 2))
        shift = posterior.mean(constants, x0, x_t) - mean
        log_ratio = constants.log_least - log_variance
        kl = 0.5 * (jnp.expm1(log_ratio) - log_ratio + shift**2 * jnp.exp(-log_variance))
        nll = _decoder_nll(x0, mean, log_variance)
        nats = jnp.where(t[:, None, None, None] == 0, nll, kl)
        return jnp.mean(nats, axis=(1, 2, 3)) / np.log(2)


def _freeze_array(process: GaussianDiffusion, name: str) -> None:
    """Replaces a field by a read-only copy: compiled functions hold its values as constants."""
    array = np.array(getattr(process, name), np.float64)
    array.flags.writeable = False
    object.__setattr__(process, name, array)


def _decoder_nll(x0: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """-log p(x_0 | x_1) in nats: the value is exact, the gradient by the log-variance is bounded.

    Far from the data the exact gradient is about minus the value, but float32 loses its digits: at
    10 000 standard deviations it is wrong by a factor of 3.
    """
    fixed = jax.lax.stop_gradient(log_variance)
    value = -_discretized_log_likelihood(x0, jax.lax.stop_gradient(mean), fixed)
    far = value > _MAX_SLOPE
    # `where` multiplies the gradient of a far pixel by 0. At the data this gradient is finite.
    near = -_discretized_log_likelihood(x0, jnp.where(far, x0, mean), log_variance)
    return jnp.where(far, value + _MAX_SLOPE * (fixed - log_variance), near)


def _discretized_log_likelihood(
    x: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
    """Log-probability, in nats, of 8-bit data scaled to [-1, 1] (DDPM, eq. 13).

    Each value has the bin of half-width 1/255 around it. The two outermost bins reach to infinity.
    """
    inv_sigma = jnp.exp(-0.5 * log_variance)
    half_width = 1 / 255
    # By symmetry the bin can be taken in the lower tail, where the log-CDF is accurate.
    distance = jnp.abs(x - mean)
    log_upper = log_ndtr((half_width - distance) * inv_sigma)
    log_lower = log_ndtr((-half_width - distance) * inv_sigma)
    inside = log_upper + jnp.log(-jnp.expm1(log_lower - log_upper))
    first = log_ndtr((x - mean + half_width) * inv_sigma)
    last = log_ndtr((mean - x + half_width) * inv_sigma)
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inside))
