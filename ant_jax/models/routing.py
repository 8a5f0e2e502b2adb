"""Denoising task routing: each noise level uses its own window of a network's channels.

Park et al., *Denoising Task Routing for Diffusion Models* (ICLR 2024, arXiv 2310.07138). Windows of
near noise levels overlap, those of distant ones less, without any parameter.
"""

import jax
import jax.numpy as jnp
import numpy as np


def window_starts(levels: int, channels: int, share: float, power: float) -> np.ndarray:
    """The first channel of the window of each noise level (section 4.2 of the paper).

    Args:
      levels: number of noise levels D.
      channels: number of channels C.
      share: the size of a window as a share of the channels, beta.
      power: alpha; above 1, low noise levels share more of their windows.

    Returns:
      (levels,) int, from 0 to C minus the size of a window.
    """
    way = np.linspace(0, 1, levels) ** power
    return np.round(way * (channels - int(channels * share))).astype(np.int32)


def routing_mask(t: jax.Array, levels: int, channels: int, share: float, power: float) -> jax.Array:
    """(B, C) float32, 1 for the channels that the noise levels t use and 0 for the others.

    Args:
      t: (B,) noise levels: integers below ``levels``, or floats in [0, 1].
      levels: see `window_starts`.
      channels: see `window_starts`.
      share: see `window_starts`.
      power: see `window_starts`.
    """
    if jnp.issubdtype(t.dtype, jnp.floating):
        t = jnp.round(t * (levels - 1)).astype(jnp.int32)
    start = jnp.asarray(window_starts(levels, channels, share, power))[t][:, None]
    channel = jnp.arange(channels)
    return jnp.float32((start <= channel) & (channel < start + int(channels * share)))
