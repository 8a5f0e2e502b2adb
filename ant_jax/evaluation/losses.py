"""The loss on held-out images."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax.diffusion import Denoise, Process


def interval_losses(
    apply_fn: Denoise,
    process: Process,
    x0: jax.Array | np.ndarray,
    key: jax.Array,
    boundaries: np.ndarray,
    *,
    y: jax.Array | np.ndarray | None = None,
    timesteps_each: int = 10,
    batch_size: int,
) -> np.ndarray:
    """Mean loss of each interval on held-out images, without loss weights.

    The noise levels are evenly spaced in each interval, by the process's own density. The noise
    depends on the key, the level and the image's index. So models are compared on the same noised
    images.

    Args:
      apply_fn: the network, ``(x, t, y) -> output``; a `jax.tree_util.Partial` over its parameters
        compiles once for all of them.
      process: the noise process.
      x0: (M, H, W, C) images in [-1, 1].
      key: of the noise.
      boundaries: (k + 1,) boundaries of the intervals.
      y: (M,) labels or None.
      timesteps_each: number of levels in each interval. An interval with fewer timesteps repeats
        some.
      batch_size: largest number of images that the network sees at a time. The noise of one level
        is drawn for all images at once.

    Returns:
      (k,) float64, means over images and levels.
    """
    low, high = np.asarray(boundaries[:-1])[:, None], np.asarray(boundaries[1:])[:, None]
    middles = (np.arange(timesteps_each) + 0.5) / timesteps_each
    levels = process.level(low, high, middles)
    losses = _level_losses(
        apply_fn if isinstance(apply_fn, Partial) else Partial(apply_fn),
        x0,
        y,
        key,
        jnp.asarray(levels.reshape(-1)),
        process=_unweighted(process),
        batch_size=math.ceil(len(x0) / math.ceil(len(x0) / batch_size)),
    )
    return np.asarray(losses, np.float64).reshape(levels.shape).mean(1)


# Cached, because compiled functions are cached by the identity of the process.
@functools.lru_cache(maxsize=8)
def _unweighted(process):
    return dataclasses.replace(process, loss_weight=None)


@functools.partial(jax.jit, static_argnames=("process", "batch_size"))
def _level_losses(apply_fn, x0, y, key, levels, *, process, batch_size):
    in_batches = len(x0) // batch_size * batch_size

    def loss(t):
        bits = (
            t
            if jnp.issubdtype(t.dtype, jnp.integer)
            else jax.lax.bitcast_convert_type(t, jnp.int32)
        )
        noise = jax.random.normal(jax.random.fold_in(key, bits), x0.shape)
        images = x0, noise, y

        def of_batch(batch):
            x0, noise, y = batch
            return process.losses(apply_fn, x0, jnp.full(x0.shape[:1], t), noise, y)

        batches = jax.tree.map(
            lambda leaf: leaf[:in_batches].reshape(-1, batch_size, *leaf.shape[1:]), images
        )
        found = [jax.lax.map(of_batch, batches).reshape(-1)]
        if in_batches < len(x0):
            found.append(of_batch(jax.tree.map(lambda leaf: leaf[in_batches:], images)))
        return jnp.concatenate(found).mean()

    return jax.lax.map(loss, levels)
