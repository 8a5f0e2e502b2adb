"""The sinusoidal features of noise levels that all denoising networks here use."""

import jax
import jax.numpy as jnp
import numpy as np

MAX_PERIOD = 10_000

# The frequencies were chosen for a thousand timesteps.
LEVEL_SCALE = 1000.0


def timestep_features(t: jax.Array, features: int, level_scale: float = LEVEL_SCALE) -> jax.Array:
    """Cosines, then sines, of t at geometric frequencies from 1 down to almost 1 / 10,000.

    Args:
      t: (B,) noise levels: integers, or floats in [0, 1].
      features: number of features, even.
      level_scale: floats are multiplied by this.

    Returns:
      (B, features) float32.
    """
    scale = level_scale if jnp.issubdtype(t.dtype, jnp.floating) else 1
    angles = (scale * t).astype(jnp.float32)[:, None] * frequencies(features)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def frequencies(features: int) -> np.ndarray:
    """The frequencies of `timestep_features`, in radians: (features / 2,) float32."""
    half = features // 2
    return (MAX_PERIOD ** (-np.arange(half) / half)).astype(np.float32)
