"""The Gaussian diffusion process: noising, posteriors and training losses.

Notation follows Ho et al. 2020 ("DDPM") and Nichol & Dhariwal 2021 ("improved DDPM"), with
timesteps counted from 0 (least noise) to T - 1.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from ant_jax.diffusion import schedule
from ant_jax.diffusion.spacing import spaced_timesteps

ApplyFn = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]

_VARIANCES = ("fixed_small", "fixed_large", "learned_range")
_PREDICTIONS = ("epsilon", "v")
# Nats: -log(1e-12), where the code of DDPM and improved DDPM ends the decoder's term.
_MAX_SLOPE = 12 * np.log(10)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    r"""A diffusion process, as float64 NumPy constants by timestep.

    Instances are immutable and hash by identity, so that one can be closed over or be a static
    argument of ``jax.jit``. Arrays given to the methods have the shape (B, H, W, C), timesteps
    the shape (B,); all arithmetic is in float32, whatever the dtype of the model.

    Attributes:
      alphas_bar: (T,) signal fractions :math:`\bar\alpha_t`, strictly decreasing, in (0, 1).
      variance: Reverse-process variance: ``"fixed_small"`` is :math:`\tilde\beta_t` and
        ``"fixed_large"`` is :math:`\beta_t` (DDPM, section 3.2); ``"learned_range"`` lets the
        model interpolate between their logarithms (improved DDPM, eq. 15), in C further output
        channels.
      prediction: What the model's first C output channels are: ``"epsilon"``, the noise, or
        ``"v"``, :math:`\sqrt{\bar\alpha_t} \epsilon - \sqrt{1-\bar\alpha_t} x_0` (Salimans & Ho
        2022, appendix D).
      loss_weight: (T,) factors of the mean squared error of the prediction; None means ones.
      timestep_map: (T,) timesteps under which the model was trained, for a process that uses only
        some of them (see ``respace``); None means 0 .. T - 1.
      last_alpha_bar: Signal fraction at which the reverse process ends, above all others: 1, which
        is data without noise, or less in LDM's sampler (see ``respace``).

    Raises:
      ValueError: If an array has the wrong shape, ``alphas_bar`` is not strictly decreasing in
        (0, 1), ``last_alpha_bar`` is not above it and at most 1, or ``variance`` or ``prediction``
        is unknown.
    """

    alphas_bar: np.ndarray
    variance: str = "fixed_large"
    prediction: str = "epsilon"
    loss_weight: np.ndarray | None = None
    timestep_map: np.ndarray | None = None
    last_alpha_bar: float = 1.0

    def __post_init__(self):
        _freeze_array(self, "alphas_bar", np.float64)
        alphas_bar = self.alphas_bar
        if alphas_bar.ndim != 1 or alphas_bar.size == 0:
            raise ValueError(f"alphas_bar must have the shape (T,), got {alphas_bar.shape}")
        if not np.all((alphas_bar > 0) & (alphas_bar < 1)):
            raise ValueError("alphas_bar must lie in (0, 1)")
        if not np.all(np.diff(alphas_bar) < 0):
            raise ValueError("alphas_bar must be strictly decreasing")
        if not alphas_bar[0] < self.last_alpha_bar <= 1:
            raise ValueError(
                f"last_alpha_bar must be above {alphas_bar[0]} and at most 1, "
                f"got {self.last_alpha_bar}"
            )
        if self.variance not in _VARIANCES:
            raise ValueError(f"unknown variance {self.variance!r}: expected one of {_VARIANCES}")
        if self.prediction not in _PREDICTIONS:
            raise ValueError(
                f"unknown prediction {self.prediction!r}: expected one of {_PREDICTIONS}"
            )
        for name, dtype in (("loss_weight", np.float64), ("timestep_map", np.int32)):
            if getattr(self, name) is not None:
                _freeze_array(self, name, dtype)
                shape = getattr(self, name).shape
                if shape != alphas_bar.shape:
                    raise ValueError(f"{name} must have the shape {alphas_bar.shape}, got {shape}")

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return len(self.alphas_bar)

    @functools.cached_property
    def alphas_bar_prev(self) -> np.ndarray:
        r"""(T,) :math:`\bar\alpha_{t-1}`, with ``last_alpha_bar`` before the first timestep."""
        return np.append(self.last_alpha_bar, self.alphas_bar[:-1])

    @functools.cached_property
    def betas(self) -> np.ndarray:
        r"""(T,) :math:`\beta_t = 1 - \bar\alpha_t / \bar\alpha_{t-1}`."""
        return 1 - self.alphas_bar / self.alphas_bar_prev

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        r"""(T,) :math:`\tilde\beta_t`, variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7); 0 at 0."""
        return self.betas * (1 - self.alphas_bar_prev) / (1 - self.alphas_bar)

    @functools.cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        r"""(T,) :math:`\log \tilde\beta_t`; at t = 0 that of t = 1 where the variance is 0.

        If T = 1 it is :math:`\log \beta_0` there.
        """
        variance = self.posterior_variance
        if not variance[0]:
            first = variance[1] if self.num_timesteps > 1 else self.betas[0]
            variance = np.append(first, variance[1:])
        return np.log(variance)

    @functools.cached_property
    def log_snr(self) -> np.ndarray:
        """(T,) log signal-to-noise ratios, in nats, strictly decreasing."""
        return schedule.log_snr(self.alphas_bar)

    def model_timesteps(self, t: jax.Array) -> jax.Array:
        """Timesteps to give to the model for the timesteps (B,) of this process."""
        return t if self.timestep_map is None else jnp.asarray(self.timestep_map)[t]

    def level(self, low: jax.Array, high: jax.Array, u: jax.Array) -> jax.Array:
        """The timestep a fraction u in [0, 1) of the way from low to high, both integers.

        It is low + floor(u (high - low)). In float32, floor(low + u (high - low)) can be ``high``.
        """
        xp = u.__array_namespace__()
        return low + xp.floor(u * (high - low)).astype(low.dtype)

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        r"""Noises data: :math:`\sqrt{\bar\alpha_t} x_0 + \sqrt{1-\bar\alpha_t} \epsilon`.

        Args:
          x0: (B, H, W, C) data.
          t: (B,) integer timesteps in [0, T).
          noise: (B, H, W, C) standard normal noise.

        Returns:
          (B, H, W, C) float32 samples of q(x_t | x_0) (DDPM, eq. 4).
        """
        signal, sigma = gather(np.sqrt(self.alphas_bar), t), gather(np.sqrt(1 - self.alphas_bar), t)
        return signal * jnp.float32(x0) + sigma * jnp.float32(noise)

    def predict_x0(self, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        """Data (B, H, W, C) for which ``eps`` is the noise in ``x_t``; inverts ``q_sample``."""
        ratio = 1 / self.alphas_bar
        return gather(np.sqrt(ratio), t) * x_t - gather(np.sqrt(ratio - 1), t) * eps

    def predict_eps(self, x_t: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:
        """Noise (B, H, W, C) in ``x_t`` if the data is ``x0``; inverts ``q_sample``."""
        signal, sigma = gather(np.sqrt(self.alphas_bar), t), gather(np.sqrt(1 - self.alphas_bar), t)
        return (x_t - signal * x0) / sigma

    def prediction_target(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """What a perfect model would predict: the noise or v, (B, H, W, C) float32."""
        if self.prediction == "epsilon":
            return jnp.float32(noise)
        signal, sigma = gather(np.sqrt(self.alphas_bar), t), gather(np.sqrt(1 - self.alphas_bar), t)
        return signal * jnp.float32(noise) - sigma * jnp.float32(x0)

    def predicted_parts(
        self, prediction: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Data and noise (B, H, W, C) of which ``x_t`` consists by the model's prediction."""
        if self.prediction == "epsilon":
            return self.predict_x0(x_t, t, prediction), prediction
        signal, sigma = gather(np.sqrt(self.alphas_bar), t), gather(np.sqrt(1 - self.alphas_bar), t)
        return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t

    def posterior_mean(self, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Mean (B, H, W, C) of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        noise = 1 - self.alphas_bar
        x0_coef = np.sqrt(self.alphas_bar_prev) * self.betas / noise
        x_t_coef = np.sqrt(1 - self.betas) * (1 - self.alphas_bar_prev) / noise
        return gather(x0_coef, t) * x0 + gather(x_t_coef, t) * x_t

    def model_log_variance(self, t: jax.Array, variance: jax.Array | None = None) -> jax.Array:
        """Log-variance of the reverse process p(x_{t-1} | x_t).

        Args:
          t: (B,) integer timesteps in [0, T).
          variance: (B, H, W, C) variance channels of the model, -1 for the least and 1 for the
            greatest variance (improved DDPM, eq. 15); ignored unless the variance is learned.

        Returns:
          (B, H, W, C) float32 if the variance is learned, otherwise (B, 1, 1, 1).
        """
        small = gather(self.posterior_log_variance_clipped, t)
        large = gather(np.log(self.betas), t)
        if self.variance == "learned_range":
            fraction = (variance + 1) / 2
            return fraction * large + (1 - fraction) * small
        return small if self.variance == "fixed_small" else large

    def split_output(
        self, output: jax.Array, shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Splits a model's output into its prediction and its variance channels.

        Args:
          output: (B, H, W, C), or (B, H, W, 2C) if the variance is learned.
          shape: (B, H, W, C), the shape of the model's input.

        Returns:
          The pair (prediction, variance channels) in float32, each (B, H, W, C); the latter None
          unless the variance is learned.

        Raises:
          ValueError: If the output doesn't have the shape that ``variance`` calls for.
        """
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

    def per_example_losses(
        self,
        apply_fn: ApplyFn,
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

        All terms of the bound are exact and grow with the square of the distance between data and
        prediction, in standard deviations: :math:`L_0` is 881 nats at 42 of them, where the code of
        the papers ends at 27.6, or -log(1e-12). The gradient of :math:`L_0` by the log-variance is
        exact up to there and stays at -27.6 beyond, where in the papers' code it is 0; that of the
        other terms is not bounded, as in their code.

        Args:
          apply_fn: The model, ``apply_fn(x_t, t, y)`` to (B, H, W, C), or to (B, H, W, 2C) with the
            variance channels last if the variance is learned.
          x0: (B, H, W, C) data, scaled to [-1, 1].
          t: (B,) integer timesteps in [0, T).
          noise: (B, H, W, C) standard normal noise.
          y: Labels or None, given to the model as they are.

        Returns:
          (B,) float32 losses.

        Raises:
          ValueError: If the model's output has the wrong shape.
        """
        x_t = self.q_sample(x0, t, noise)
        output = apply_fn(x_t, self.model_timesteps(t), y)
        prediction, variance = self.split_output(output, x_t.shape)
        error = prediction - self.prediction_target(x0, t, noise)
        losses = jnp.mean(error**2, axis=(1, 2, 3))
        if self.loss_weight is not None:
            losses *= jnp.asarray(self.loss_weight, jnp.float32)[t]
        if variance is not None:
            predicted_x0, _ = self.predicted_parts(jax.lax.stop_gradient(prediction), x_t, t)
            bound = self._variational_bound(jnp.float32(x0), x_t, t, predicted_x0, variance)
            losses += self.num_timesteps / 1000 * bound
        return losses

    def _variational_bound(
        self,
        x0: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        predicted_x0: jax.Array,
        variance: jax.Array,
    ) -> jax.Array:
        """(B,) terms of the variational bound in bits per dimension (DDPM, eqs. 5 and 13)."""
        mean = self.posterior_mean(predicted_x0, x_t, t)
        log_variance = self.model_log_variance(t, variance)
        true_log_variance = gather(self.posterior_log_variance_clipped, t)
        shift = self.posterior_mean(x0, x_t, t) - mean
        log_ratio = true_log_variance - log_variance
        kl = 0.5 * (jnp.expm1(log_ratio) - log_ratio + shift**2 * jnp.exp(-log_variance))
        nll = _decoder_nll(x0, mean, log_variance)
        nats = jnp.where(t[:, None, None, None] == 0, nll, kl)
        return jnp.mean(nats, axis=(1, 2, 3)) / np.log(2)


def respace(
    diffusion: GaussianDiffusion, num_steps: int, spacing: str = "even"
) -> GaussianDiffusion:
    """The process on a subset of the timesteps, for sampling in fewer steps.

    The noise levels are those of the subset, so the betas are larger, and the model is still called
    with its own timesteps.

    Args:
      diffusion: The process, with T timesteps.
      num_steps: Number of timesteps to keep, in 1 .. T; T gives the same process.
      spacing: Which, see ``spaced_timesteps``. ``"ldm"`` also ends at the noise of timestep 0
        instead of at none.

    Returns:
      A process of ``num_steps`` timesteps, whose ``timestep_map`` leads back to the model's.

    Raises:
      ValueError: If ``num_steps`` is not in 1 .. T, or there is no such spacing.
    """
    subset = spaced_timesteps(diffusion.num_timesteps, num_steps, spacing)
    weight, timesteps = diffusion.loss_weight, diffusion.timestep_map
    return dataclasses.replace(
        diffusion,
        alphas_bar=diffusion.alphas_bar[subset],
        loss_weight=None if weight is None else weight[subset],
        timestep_map=subset if timesteps is None else timesteps[subset],
        last_alpha_bar=diffusion.alphas_bar[0] if spacing == "ldm" else diffusion.last_alpha_bar,
    )


def gather(constants: np.ndarray, t: jax.Array) -> jax.Array:
    """Gathers (T,) constants at (B,) timesteps as (B, 1, 1, 1) float32, to broadcast on images."""
    return jnp.asarray(constants, jnp.float32)[t][:, None, None, None]


def _freeze_array(diffusion: GaussianDiffusion, name: str, dtype: type) -> None:
    """Replaces a field by a read-only copy: compiled functions hold its values as constants."""
    array = np.array(getattr(diffusion, name), dtype)
    array.flags.writeable = False
    object.__setattr__(diffusion, name, array)


def _decoder_nll(x0: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """-log p(x_0 | x_1) in nats: its value exact, its gradient by the log-variance bounded.

    Far from the data the exact gradient is about minus the value, and in float32 loses its digits
    on the way: it is off by a factor of 3 at 10 000 standard deviations.
    """
    fixed = jax.lax.stop_gradient(log_variance)
    value = -_discretized_log_likelihood(x0, jax.lax.stop_gradient(mean), fixed)
    far = value > _MAX_SLOPE
    # At its data a far pixel has a finite gradient, which `where` multiplies by 0.
    near = -_discretized_log_likelihood(x0, jnp.where(far, x0, mean), log_variance)
    return jnp.where(far, value + _MAX_SLOPE * (fixed - log_variance), near)


def _discretized_log_likelihood(
    x: jax.Array, mean: jax.Array, log_variance: jax.Array
) -> jax.Array:
    """Log-probability, in nats, of 8-bit data scaled to [-1, 1] (DDPM, eq. 13).

    Each value owns the bin of half-width 1/255 around it; the two outermost bins reach to infinity.
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
