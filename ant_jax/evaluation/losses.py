"""The loss on images that the model may not know."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax.diffusion import Denoise, Process


def interval_losses(
    apply_fn: Denoise,
    diffusion: Process,
    x0: jax.Array,
    key: jax.Array,
    boundaries: np.ndarray,
    *,
    y: jax.Array | None = None,
    timesteps_each: int = 10,
) -> np.ndarray:
    """Mean loss of each interval, without loss weights, for images that the model may not know.

    The timesteps are evenly spaced in each interval and the noise depends on the key, the timestep
    and the image's place, so that models are compared on the very same tasks.

    Args:
      apply_fn: the network, ``(x, t, y) -> output``; a `jax.tree_util.Partial` over its parameters
        compiles once for all of them.
      diffusion: the noise process.
      x0: (M, H, W, C) images in [-1, 1].
      key: of the noise.
      boundaries: (k + 1,) of the intervals.
      y: (M,) labels or None.
      timesteps_each: so many timesteps an interval; a shorter one repeats some.

    Returns:
      (k,) float64, means over images and timesteps.
    """
    low, high = np.asarray(boundaries[:-1])[:, None], np.asarray(boundaries[1:])[:, None]
    middles = (np.arange(timesteps_each) + 0.5) / timesteps_each
    timesteps = np.floor(low + middles * (high - low)).astype(np.int32)
    losses = _timestep_losses(
        apply_fn if isinstance(apply_fn, Partial) else Partial(apply_fn),
        x0,
        y,
        key,
        jnp.asarray(timesteps.reshape(-1)),
        diffusion=_unweighted(diffusion),
    )
    return np.asarray(losses, np.float64).reshape(timesteps.shape).mean(1)


# Compiled functions are found again by the identity of the process.
@functools.lru_cache(maxsize=8)
def _unweighted(diffusion):
    return dataclasses.replace(diffusion, loss_weight=None)


@functools.partial(jax.jit, static_argnames="diffusion")
def _timestep_losses(apply_fn, x0, y, key, timesteps, *, diffusion):
    def loss(t):
        noise = jax.random.normal(jax.random.fold_in(key, t), x0.shape)
        t = jnp.full(x0.shape[:1], t)
        return diffusion.losses(apply_fn, x0, t, noise, y).mean()

    return jax.lax.map(loss, timesteps)
