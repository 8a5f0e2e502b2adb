"""Ancestral (DDPM) and implicit (DDIM) sampling, each one compiled ``lax.scan`` over the steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax.diffusion.gaussian import ApplyFn, GaussianDiffusion, gather, respace


def ddpm_sample(
    apply_fn: ApplyFn,
    shape: tuple[int, int, int, int],
    key: jax.Array,
    *,
    diffusion: GaussianDiffusion,
    num_steps: int | None = None,
    spacing: str = "even",
    y: jax.Array | None = None,
    null_label: int | jax.Array | None = None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    clip_x0: bool = True,
) -> jax.Array:
    """Samples by the reverse process of Ho et al. 2020, algorithm 2.

    The variance of each step is ``diffusion.variance``. A second call with the same model, shapes
    and process doesn't compile again, whatever the parameters, keys, labels and guidance scale, if
    the parameters are arguments of the model rather than closed over::

      apply_fn = jax.tree_util.Partial(model.apply, {"params": params})
      ddpm_sample(apply_fn, (16, 8, 8, 1), jax.random.key(0), diffusion=process, num_steps=50)

    Args:
      apply_fn: The model, ``apply_fn(x, t, y)`` with t the (B,) timesteps of its training; see
        ``GaussianDiffusion.per_example_losses``.
      shape: (B, H, W, C) of the samples.
      key: One typed PRNG key, from which sample i gets ``fold_in(key, i)``, or a (B,) array of
        keys, one a sample. All noise of a sample comes from its own key, so a sample doesn't depend
        on the batch it is drawn in.
      diffusion: The process with which the model was trained.
      num_steps: Number of timesteps to use; None means all.
      spacing: Which timesteps those are, see ``respace``.
      y: (B, ...) labels, or None for a model without.
      null_label: Label of the unconditional model; broadcasts to the shape of ``y``.
      guidance: Scale g of classifier-free guidance (Ho & Salimans 2022):
        ``eps = eps_uncond + g * (eps_cond - eps_uncond)``, from one pass over a doubled batch. The
        variance is that of the conditional model. 1 means none, at half the cost.
      guidance_channels: How many channels, from the first, are guided; the others are those of the
        conditional model. None means all. The code of DiT guides 3 of its 4.
      clip_x0: Whether to clip each prediction of x_0 to [-1, 1]: for pixels, not for latents.

    Returns:
      (B, H, W, C) float32 samples.

    Raises:
      TypeError: If ``key`` is not a typed key (``jax.random.key``).
      ValueError: If ``key`` or ``y`` doesn't fit the batch, guidance lacks ``y`` or ``null_label``,
        ``num_steps`` is not in 1 .. T or does not fit ``spacing``, or the model's output has the
        wrong shape.
    """
    step = Partial(_ddpm_step)
    guidance = _by_channel(guidance, guidance_channels, shape[-1])
    return _sample(
        step, apply_fn, shape, key, diffusion, num_steps, spacing, y, null_label, guidance, clip_x0
    )


def ddim_sample(
    apply_fn: ApplyFn,
    shape: tuple[int, int, int, int],
    key: jax.Array,
    *,
    diffusion: GaussianDiffusion,
    num_steps: int | None = None,
    spacing: str = "even",
    y: jax.Array | None = None,
    null_label: int | jax.Array | None = None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    clip_x0: bool = True,
    eta: float = 0.0,
) -> jax.Array:
    """Samples by the non-Markovian process of Song et al. 2021 (DDIM), eqs. 12 and 16.

    A learned variance is ignored. See ``ddpm_sample`` for the other arguments and for compilation.

    Args:
      apply_fn: The model.
      shape: (B, H, W, C) of the samples.
      key: One typed PRNG key or a (B,) array of keys.
      diffusion: The process with which the model was trained.
      num_steps: Number of timesteps to use; None means all.
      spacing: Which timesteps those are, see ``respace``.
      y: (B, ...) labels, or None.
      null_label: Label of the unconditional model.
      guidance: Scale of classifier-free guidance.
      guidance_channels: How many channels are guided; None means all.
      clip_x0: Whether to clip each prediction of x_0 to [-1, 1]; epsilon is then recomputed.
      eta: Noise of the steps, in [0, 1]: 0 is deterministic given the first noise, 1 is DDPM with
        the variance ``"fixed_small"``.

    Returns:
      (B, H, W, C) float32 samples.

    Raises:
      TypeError: If ``key`` is not a typed key.
      ValueError: As ``ddpm_sample``, or if ``eta`` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    step = Partial(_ddim_step, jnp.float32(eta))
    guidance = _by_channel(guidance, guidance_channels, shape[-1])
    return _sample(
        step, apply_fn, shape, key, diffusion, num_steps, spacing, y, null_label, guidance, clip_x0
    )


def _by_channel(guidance: float, guided: int | None, channels: int) -> float | np.ndarray:
    """(C,) scales of guidance; one for all where all channels are guided."""
    if guided is None:
        return guidance
    if not 1 <= guided <= channels:
        raise ValueError(f"guidance_channels must be in 1 .. {channels}, got {guided}")
    return np.where(np.arange(channels) < guided, guidance, 1.0)


def _sample(
    step, apply_fn, shape, key, diffusion, num_steps, spacing, y, null_label, guidance, clip_x0
) -> jax.Array:
    """Checks a sampler's arguments and brings them into the form that ``_reverse`` compiles for."""
    batch = shape[0]
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be typed (jax.random.key), got an array of {key.dtype}")
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must have the shape () or ({batch},), got {key.shape}")
    if y is not None and jnp.shape(y)[:1] != (batch,):
        raise ValueError(f"y must have the batch size {batch}, got the shape {jnp.shape(y)}")
    guided = np.any(np.not_equal(guidance, 1))
    if guided and (y is None or null_label is None):
        raise ValueError("guidance needs both y and null_label")
    return _reverse(
        step,
        apply_fn if isinstance(apply_fn, Partial) else Partial(apply_fn),
        key,
        y,
        jnp.full_like(y, null_label) if guided else None,
        jnp.float32(guidance),
        shape=tuple(shape),
        diffusion=diffusion,
        num_steps=diffusion.num_timesteps if num_steps is None else num_steps,
        spacing=spacing,
        clip_x0=clip_x0,
    )


@functools.partial(
    jax.jit, static_argnames=("shape", "diffusion", "num_steps", "spacing", "clip_x0")
)
def _reverse(
    step, apply_fn, key, y, null_y, guidance, *, shape, diffusion, num_steps, spacing, clip_x0
) -> jax.Array:
    """Runs the reverse process from pure noise; ``null_y`` is None without guidance."""
    process = respace(diffusion, num_steps, spacing)
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold_in(key, jnp.arange(shape[0])) if key.ndim == 0 else key

    def noise(level):
        level_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, level)
        return jax.vmap(lambda key: jax.random.normal(key, shape[1:], jnp.float32))(level_keys)

    def predict(x, t):
        model_t = process.model_timesteps(t)
        if null_y is None:
            prediction, variance = process.split_output(apply_fn(x, model_t, y), shape)
            return *process.predicted_parts(prediction, x, t), variance
        xx, tt, yy = (jnp.concatenate(pair) for pair in ((x, x), (model_t, model_t), (y, null_y)))
        prediction, variance = process.split_output(apply_fn(xx, tt, yy), xx.shape)
        conditional, unconditional = jnp.split(prediction, 2)
        # The noise is affine in the prediction, so guiding either is the same.
        prediction = unconditional + guidance * (conditional - unconditional)
        variance = None if variance is None else jnp.split(variance, 2)[0]
        return *process.predicted_parts(prediction, x, t), variance

    def body(x, level):
        t = jnp.full(shape[:1], level)
        x0, eps, variance = predict(x, t)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
            eps = process.predict_eps(x, t, x0)
        return step(process, x, t, x0, eps, variance, noise(level)), None

    # The first noise is that of level S, one above the last timestep.
    samples, _ = jax.lax.scan(body, noise(num_steps), jnp.arange(num_steps)[::-1])
    return samples


def _ddpm_step(process, x, t, x0, eps, variance, noise) -> jax.Array:
    del eps
    # A last step that ends without noise returns its mean.
    keep = gather(process.posterior_variance > 0, t)
    sigma = keep * jnp.exp(0.5 * process.model_log_variance(t, variance))
    return process.posterior_mean(x0, x, t) + sigma * noise


def _ddim_step(eta, process, x, t, x0, eps, variance, noise) -> jax.Array:
    del variance
    noise_prev = gather(1 - process.alphas_bar_prev, t)
    # The share of the noise of level t - 1 that is drawn anew (eq. 16, squared).
    fresh = eta**2 * gather(process.betas / (1 - process.alphas_bar), t)
    mean = (
        gather(np.sqrt(process.alphas_bar_prev), t) * x0 + jnp.sqrt(noise_prev * (1 - fresh)) * eps
    )
    return mean + jnp.sqrt(noise_prev * fresh) * noise
