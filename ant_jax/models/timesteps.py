"""The sinusoidal features of noise levels that all denoising networks here use."""

import jax
import jax.numpy as jnp
import numpy as np

MAX_PERIOD = 10_000

# The frequencies were chosen for a thousand timesteps.
_LEVEL_SCALE = 1000


def timestep_features(t: jax.Array, features: int) -> jax.Array:
    """Cosines, then sines, of t at geometric frequencies from 1 down to almost 1 / 10,000.

    Args:
      t: (B,) noise levels: integers, or floats in [0, 1], which count as 1000 times as much.
      features: number of features, even.

    Returns:
      (B, features) float32.
    """
    half = features // 2
    frequencies = np.float32(MAX_PERIOD ** (-np.arange(half) / half))
    scale = _LEVEL_SCALE if jnp.issubdtype(t.dtype, jnp.floating) else 1
    angles = (scale * t).astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
