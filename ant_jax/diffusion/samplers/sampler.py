"""What samplers share: their arguments, guidance, and one compiled ``lax.scan`` over the steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax.diffusion.process import Denoise, Prediction, Process, Steps
from ant_jax.settings import Integer, Number

# A ratio of noise to signal that counts as infinite, which no setting can be.
NO_END = 1e9


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Options that all samplers share.

    Attributes:
      num_steps: Number of steps.
      spacing: Which noise levels the steps use. Each process has its own spacings.
      guidance: Scale g of classifier-free guidance (Ho & Salimans 2022):
        ``eps = eps_uncond + g * (eps_cond - eps_uncond)``, from one pass over a doubled batch. The
        variance is that of the conditional model. 1 means no guidance, at half the cost.
      guidance_channels: Number of channels, from the first, that are guided. The others are those
        of the conditional model. 0 means all. The code of DiT guides 3 of its 4 channels.
      clip_x0: Whether to clip each prediction of x_0 to [-1, 1], and to recompute the noise from
        it: for pixels, not for latents.
      guidance_low: The least ratio of noise to signal at which guidance is used (Kynkaanniemi et
        al. 2024). Outside the interval a step costs one pass over the plain batch.
      guidance_high: The greatest such ratio; 1e9 is no end.
    """

    num_steps: Annotated[int, Integer(1)] = 50
    spacing: str = "even"
    guidance: Annotated[float, Number(0, 1000)] = 1.0
    guidance_channels: Annotated[int, Integer(0)] = 0
    clip_x0: bool = True
    guidance_low: Annotated[float, Number(0)] = 0.0
    guidance_high: Annotated[float, Number(above=0)] = NO_END


class Level(NamedTuple):
    """The noise level of one step: t, and the factors of data and noise there.

    Each is (S,) for S steps, or a scalar.
    """

    t: jax.Array | np.ndarray
    signal: jax.Array | np.ndarray
    noise: jax.Array | np.ndarray


# From noised data and its level to the prediction, with guidance and clipping applied.
Predict = Callable[[jax.Array, Level], Prediction]


class Sampler(NamedTuple):
    """A sampler, called as ``sampler(process, denoise, shape, keys, options)``.

    Attributes:
      coefficients: ``(process, steps) -> pytree`` of (S,) arrays, in float64 NumPy, that a step
        needs.
      step: ``(predict, x, level, coefficients, noise) -> x`` at the next lower level, where
        predict is a `Predict`, the coefficients are those of the step, float32 scalars, and noise
        is standard normal and new. It must not be a closure: compiled programs are cached by this
        function, the process and the shapes.
      multistep: whether a step needs the prediction of the step before. Then x and the result of a
        step are pairs: the noised data, and the predicted data, which are zeros in the first step.
      calls: ``(num_steps) -> int``, how often the network is called for a sample.
    """

    coefficients: Callable[[Process, Steps], Any]
    step: Callable[[Predict, Any, Level, Any, jax.Array], Any]
    multistep: bool = False
    calls: Callable[[int], int] = int

    def __call__(
        self,
        process: Process,
        denoise: Denoise,
        shape: tuple[int, int, int, int],
        keys: jax.Array,
        options: SampleOptions,
        y: jax.Array | None = None,
        null_label: int | jax.Array | None = None,
    ) -> jax.Array:
        """Draws samples.

        A second call with the same process, network, shapes and number of steps doesn't compile
        again, whatever the parameters, keys, labels, guidance scale, spacing and settings of the
        sampler, if the parameters are arguments of the network rather than closed over::

          denoise = jax.tree_util.Partial(model.apply, {"params": params})
          ddpm()(process, denoise, (16, 8, 8, 1), jax.random.key(0), SampleOptions(num_steps=50))

        Args:
          process: The process with which the network was trained.
          denoise: The network.
          shape: (B, H, W, C) of the samples.
          keys: One typed PRNG key, from which sample i gets ``fold_in(key, i)``, or a (B,) array of
            keys, one a sample. All noise of a sample comes from its own key, so a sample doesn't
            depend on the batch it is drawn in.
          options: Number of steps, guidance and clipping.
          y: (B, ...) labels, or None for a network without.
          null_label: Label of the unconditional model; broadcasts to the shape of ``y``.

        Returns:
          (B, H, W, C) float32 samples.

        Raises:
          TypeError: If ``keys`` are not typed keys (``jax.random.key``).
          ValueError: If ``keys`` or ``y`` don't fit the batch, guidance lacks ``y`` or
            ``null_label``, the process has no such steps, or the network's output has the wrong
            shape.
        """
        batch = shape[0]
        if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
            raise TypeError(f"keys must be typed (jax.random.key), got an array of {keys.dtype}")
        if keys.shape not in ((), (batch,)):
            raise ValueError(f"keys must have the shape () or ({batch},), got {keys.shape}")
        if y is not None and jnp.shape(y)[:1] != (batch,):
            raise ValueError(f"y must have the batch size {batch}, got the shape {jnp.shape(y)}")
        guidance = _by_channel(options.guidance, options.guidance_channels, shape[-1])
        guided, unlabelled = np.any(np.not_equal(guidance, 1)), None
        if guided:
            if y is None or null_label is None:
                raise ValueError("guidance needs both y and null_label")
            unlabelled = jnp.full_like(y, null_label)
        low, high = options.guidance_low, options.guidance_high
        if low >= high:
            raise ValueError(f"guidance_low must be below guidance_high, got {low} and {high}")
        # At pure noise the ratio is infinite.
        interval = low, np.inf if high >= NO_END else high
        steps = process.steps(options.num_steps, options.spacing)
        level = Level(steps.t, np.sqrt(steps.signal[1:]), np.sqrt(steps.noise[1:]))
        return _reverse(
            denoise if isinstance(denoise, Partial) else Partial(denoise),
            keys,
            y,
            unlabelled,
            jnp.float32(guidance),
            jnp.float32(steps.start),
            jnp.float32(interval) if guided and interval != (0, np.inf) else None,
            *jax.tree.map(_single, (level, self.coefficients(process, steps))),
            step=self.step,
            process=process,
            shape=tuple(shape),
            clip_x0=options.clip_x0,
            multistep=self.multistep,
        )


def _by_channel(guidance, guided, channels):
    """(C,) scales of guidance; one for all where all channels are guided."""
    if not guided:
        return guidance
    if not 0 <= guided <= channels:
        raise ValueError(f"guidance_channels must be in 0 .. {channels}, got {guided}")
    return np.where(np.arange(channels) < guided, guidance, 1.0)


def _single(table):
    return np.asarray(table, np.int32 if np.issubdtype(table.dtype, np.integer) else np.float32)


@functools.partial(jax.jit, static_argnames=("step", "process", "shape", "clip_x0", "multistep"))
def _reverse(
    denoise,
    keys,
    y,
    null_y,
    guidance,
    start,
    interval,
    levels,
    coefficients,
    *,
    step,
    process,
    shape,
    clip_x0,
    multistep,
):
    """Runs the reverse process from pure noise.

    ``null_y`` is None without guidance, and ``interval`` is None if it has no ends.
    """
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold_in(keys, jnp.arange(shape[0])) if keys.ndim == 0 else keys
    guided = denoise if null_y is None else _guided(denoise, null_y, guidance, shape[-1])

    def noise(number):
        of_step = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        return jax.vmap(lambda key: jax.random.normal(key, shape[1:], jnp.float32))(of_step)

    def predict(x, level):
        network = guided
        if interval is not None:
            ratio = level.noise / level.signal
            within = (interval[0] <= ratio) & (ratio <= interval[1])
            network = lambda *inputs: jax.lax.cond(
                within, guided, lambda *inputs: jnp.float32(denoise(*inputs)), *inputs
            )
        prediction = process.predict(network, x, jnp.full(shape[:1], level.t), y)
        if not clip_x0:
            return prediction
        x0 = jnp.clip(prediction.x0, -1, 1)
        return prediction._replace(x0=x0, noise=(x - level.signal * x0) / level.noise)

    def body(x, numbered):
        number, level, own = numbered
        return step(predict, x, level, own, noise(number)), None

    # The first noise is that of step S, one above the last.
    num_steps = len(levels.t)
    numbered = (jnp.arange(num_steps), levels, coefficients)
    first = start * noise(num_steps)
    last, _ = jax.lax.scan(
        body, (first, jnp.zeros_like(first)) if multistep else first, numbered, reverse=True
    )
    return last[0] if multistep else last


def _guided(denoise, null_y, guidance, channels):
    """The network with guidance: its prediction is extrapolated, its variance as it is."""

    def guided(x, t, y):
        xx, tt, yy = (jnp.concatenate(pair) for pair in ((x, x), (t, t), (y, null_y)))
        conditional, unconditional = jnp.split(jnp.float32(denoise(xx, tt, yy)), 2)
        variance, prediction = conditional[..., channels:], conditional[..., :channels]
        # Data and noise are affine in the prediction, so guiding it guides both.
        unconditional = unconditional[..., :channels]
        guided = unconditional + guidance * (prediction - unconditional)
        return jnp.concatenate([guided, variance], -1)

    return guided
