"""Layer norm, group norm and RMS norm that stay accurate if the mean is far from zero.

Flax computes the variance as E[x^2] - E[x]^2. If the mean is 100 times the standard deviation, the
error of the result is 1e-3. With `use_fast_variance=False` the rounding error of the mean remains.
"""

# Those of flax also take a mask.
# pyright: reportIncompatibleMethodOverride=false

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-6


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def modulated_norm(
    x: jax.Array, shift: jax.Array, scale: jax.Array, norm: Literal["layer", "rms"], dtype: Any
) -> jax.Array:
    """Normalises each token and modulates it: ``norm(x) (1 + scale) + shift``, as adaLN does.

    All is computed in float32, without learned parameters. The backward pass keeps only the
    statistics of each token and computes the rest again: plain layer norm keeps or writes several
    arrays as large as x.

    Args:
      x: tokens (B, N, C).
      shift: (B, C).
      scale: (B, C).
      norm: "layer" (Ba et al. 2016), or "rms", without the mean (Zhang & Sennrich 2019).
      dtype: type of the result.
    """
    return _modulated(_normed(x, *_statistics(x, norm)), shift, scale).astype(dtype)


@modulated_norm.defjvp
def _modulated_norm_jvp(norm, dtype, primals, tangents):
    x, shift, scale = primals
    mean, inverse = _statistics(x, norm)
    result = _modulated(_normed(x, mean, inverse), shift, scale).astype(dtype)

    def tangent(x, mean, inverse, scale, tangents):
        to_x, to_shift, to_scale = (each.astype(jnp.float32) for each in tangents)
        y = _normed(x, mean, inverse)
        if norm == "layer":
            to_x -= to_x.mean(-1, keepdims=True)
        to_y = inverse * (to_x - y * (y * to_x).mean(-1, keepdims=True))
        to_result = to_y * (1 + scale[:, None]) + y * to_scale[:, None] + to_shift[:, None]
        return to_result.astype(dtype)

    return result, jax.checkpoint(tangent)(x, mean, inverse, scale, tangents)


def _statistics(x, norm):
    """Mean and inverse standard deviation of each token, (B, N, 1) float32, in one pass over x."""
    x = x.astype(jnp.float32)
    if norm == "rms":
        return jnp.zeros_like(x[..., :1]), jax.lax.rsqrt(
            jnp.square(x).mean(-1, keepdims=True) + _EPSILON
        )
    # E[d^2] - E[d]^2 loses few digits if d is at most sqrt(C - 1) standard deviations on average.
    # Differences from any entry are, because no entry is farther from the mean.
    d = x - x[..., :1]
    mean = d.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(d).mean(-1, keepdims=True) - jnp.square(mean), 0)
    return x[..., :1] + mean, jax.lax.rsqrt(variance + _EPSILON)


def _normed(x, mean, inverse):
    return (x.astype(jnp.float32) - mean) * inverse


def _modulated(y, shift, scale):
    return y * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None]


def _centred(x, axes):
    # Subtracting a constant does not change the norm, so the constant needs no gradient.
    x = x.astype(jnp.float32)
    return x - jax.lax.stop_gradient(x.mean(axes, keepdims=True))
