"""The sinusoidal timestep features that all denoising networks here use."""

import jax
import jax.numpy as jnp
import numpy as np

MAX_PERIOD = 10_000


def timestep_features(t: jax.Array, features: int) -> jax.Array:
    """Cosines, then sines, of t at geometric frequencies from 1 down to almost 1 / 10,000.

    Args:
      t: (B,) timesteps, integers or the floats of a respaced process.
      features: number of features, even.

    Returns:
      (B, features) float32.
    """
    half = features // 2
    frequencies = np.float32(MAX_PERIOD ** (-np.arange(half) / half))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
