"""Flow matching on straight paths from data to noise: rectified flow, SiT, Stable Diffusion 3.

Lipman et al., *Flow Matching for Generative Modeling* (ICLR 2023); Liu et al., *Flow Straight and
Fast* (ICLR 2023); Ma et al., *SiT* (ECCV 2024); Esser et al., *Scaling Rectified Flow Transformers*
(ICML 2024), the paper of Stable Diffusion 3.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion import densities
from ant_jax.diffusion.continuous import ContinuousProcess, checked_output
from ant_jax.diffusion.loss_weights import LossWeight
from ant_jax.diffusion.process import Array, Denoise, Prediction, Steps
from ant_jax.settings import Affects, Number, OneOf

_SPACES = ("velocity", "x0", "epsilon")
_DENSITIES = ("uniform", "logit_normal", "mode")
# A prediction of x0 or the noise is divided by t or 1 - t. The loss divides by this at least, as
# Li & He 2025 (arXiv 2511.13720) do.
_LEAST = 0.05


@dataclasses.dataclass(frozen=True)
class Flow(ContinuousProcess):
    r"""Straight paths :math:`x_t = (1 - t) x_0 + t \epsilon`, for t from 0, data, to 1, noise.

    The velocity is :math:`\epsilon - x_0`. The log-SNR is :math:`2 \log((1 - t) / t)`. In the code
    of SiT time runs the other way, from noise to data.

    Attributes:
      prediction: what the network predicts: "velocity", "x0" or "epsilon", the noise.
      loss: whose mean squared error is the loss: the same three. For data and noise the errors are
        those of the velocity times t and 1 - t. Where the loss divides by these, it divides by 0.05
        at least.
      density: of the levels in training: "uniform", "logit_normal" or "mode" (Esser et al. 2024,
        section 3.1).
      mean: of the logit of t, for "logit_normal". Above 0 there is more noise.
      std: of the logit of t, for "logit_normal".
      mode: strength of the mode at t = 1/2, for "mode". It is the scale s of the paper.
      shift: multiplies the odds t / (1 - t) of the levels that the density and the spacing "even"
        give; above 1 there is more noise. Esser et al. take the square root of the ratio of numbers
        of pixels.
      loss_weight: of the squared error of the noise, as a function of log-SNR; None for ones. It
        needs ``loss="epsilon"``.

    Raises:
      ValueError: if a setting is not as above.
    """

    prediction: Annotated[str, OneOf(*_SPACES), Affects.MEANING] = "velocity"
    loss: Annotated[str, OneOf(*_SPACES)] = "velocity"
    density: Annotated[str, OneOf(*_DENSITIES)] = "uniform"
    mean: Annotated[float, Number(-100, 100)] = 0.0
    std: Annotated[float, Number(above=0)] = 1.0
    mode: Annotated[float, Number(*densities.MODE_SCALES)] = 1.29
    shift: Annotated[float, Number(above=0)] = 1.0
    loss_weight: LossWeight | None = None

    def __post_init__(self):
        for name, allowed in (
            ("prediction", _SPACES),
            ("loss", _SPACES),
            ("density", _DENSITIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("std", "shift"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        low, high = densities.MODE_SCALES
        if not low <= self.mode <= high:
            raise ValueError(f"mode must be from {low} to {high:.4f}, got {self.mode}")
        if self.loss_weight is not None and self.loss != "epsilon":
            raise ValueError(
                "a loss weight multiplies the squared error of the noise: it needs "
                f"loss = 'epsilon', got {self.loss!r}"
            )

    def quantile(self, u: Array) -> Array:
        """The level below which a share u of the density lies."""
        t = u
        if self.density == "logit_normal":
            t = densities.logit_normal_quantile(u, self.mean, self.std)
        elif self.density == "mode":
            t = densities.mode_quantile(u, self.mode)
        return densities.shift(t, self.shift)

    def cdf(self, t: Array) -> Array:
        """The share of the density below the level t."""
        t = densities.shift(t, 1 / self.shift)
        if self.density == "logit_normal":
            return densities.logit_normal_cdf(t, self.mean, self.std)
        if self.density == "mode":
            return densities.mode_cdf(t, self.mode)
        return t

    def log_snr(self, t: np.ndarray) -> np.ndarray:
        """2 log((1 - t) / t), in nats; infinite at both ends."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log1p(-np.asarray(t, np.float64)) - np.log(np.asarray(t, np.float64)))

    def at_log_snr(self, log_snr: np.ndarray) -> np.ndarray:
        """The levels with these log-SNR."""
        return 1 / (1 + np.exp(np.asarray(log_snr, np.float64) / 2))

    def noised(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """(1 - t) x0 + t noise, float32."""
        t = _of_images(t)
        return (1 - t) * jnp.float32(x0) + t * jnp.float32(noise)

    def target(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """The velocity, the data or the noise, float32."""
        x0, noise = jnp.float32(x0), jnp.float32(noise)
        return {"velocity": noise - x0, "x0": x0, "epsilon": noise}[self.prediction]

    def losses(
        self,
        denoise: Denoise,
        x0: jax.Array,
        t: jax.Array,
        noise: jax.Array,
        y: jax.Array | None = None,
    ) -> jax.Array:
        """(B,) mean squared errors in the space of ``loss``, times ``loss_weight``.

        Raises:
          ValueError: if the network's output has another shape than the data.
        """
        output = checked_output(denoise(self.noised(x0, t, noise), t, y), x0.shape)
        errors = jnp.mean((output - self.target(x0, t, noise)) ** 2, axis=(1, 2, 3))
        if self.loss != self.prediction:
            t = jnp.float32(t)
            # The errors of all three in units of that of the velocity.
            units = {"velocity": jnp.ones_like(t), "x0": t, "epsilon": 1 - t}
            errors *= (units[self.loss] / jnp.maximum(units[self.prediction], _LEAST)) ** 2
        if self.loss_weight is not None:
            errors *= self.loss_weight(2 * (jnp.log1p(-t) - jnp.log(t)))
        return errors

    def predict(
        self, denoise: Denoise, x: jax.Array, t: jax.Array, y: jax.Array | None = None
    ) -> Prediction:
        """Data and noise that the network predicts for x.

        A predicted noise says nothing about the data at t = 1, where 1 - t counts as 0.001.

        Raises:
          ValueError: if the network's output has another shape than x.
        """
        output, t = checked_output(denoise(x, t, y), x.shape), _of_images(t)
        if self.prediction == "velocity":
            return Prediction(x - t * output, x + (1 - t) * output)
        if self.prediction == "x0":
            return Prediction(output, (x - (1 - t) * output) / jnp.maximum(t, 1e-3))
        return Prediction((x - t * output) / jnp.maximum(1 - t, 1e-3), output)

    def factors(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """1 - t and t."""
        t = np.asarray(t, np.float64)
        return 1 - t, t

    def steps(self, num_steps: int, spacing: str = "even") -> Steps:
        """See `ContinuousProcess.steps`; "even" levels are shifted as those of training are."""
        steps = super().steps(num_steps, spacing)
        if spacing != "even" or self.shift == 1:
            return steps
        ends = densities.shift(np.append(0.0, steps.t), self.shift)
        return Steps(ends[1:], (1 - ends) ** 2, ends**2)


def _of_images(t):
    return jnp.float32(t)[:, None, None, None]
