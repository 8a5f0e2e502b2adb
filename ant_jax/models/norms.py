"""Layer norm, group norm and RMS norm that stay accurate if the mean is far from zero.

Flax computes the variance as E[x^2] - E[x]^2. If the mean is 100 times the standard deviation, the
error of the result is 1e-3. With `use_fast_variance=False` the rounding error of the mean remains.
"""

# Those of flax also take a mask.
# pyright: reportIncompatibleMethodOverride=false

import flax.linen as nn
import jax
import jax.numpy as jnp


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm` over the last axis; statistics in float32."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (..., C)."""
        return super().__call__(_centred(x, -1))


class GroupNorm(nn.GroupNorm):
    """`flax.linen.GroupNorm` over all positions of (B, H, W, C); statistics in float32."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (B, H, W, C), C a multiple of the number of groups."""
        groups = x.reshape(*x.shape[:-1], self.num_groups, -1)
        return super().__call__(_centred(groups, (1, 2, 4)).reshape(x.shape))


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm` over the last axis (Zhang & Sennrich 2019); statistics in float32."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (..., C)."""
        return super().__call__(x.astype(jnp.float32))


def _centred(x, axes):
    # Subtracting a constant does not change the norm, so the constant needs no gradient.
    x = x.astype(jnp.float32)
    return x - jax.lax.stop_gradient(x.mean(axes, keepdims=True))
