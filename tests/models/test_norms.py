"""Norms keep their digits where the mean is far from zero, in every network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.latents.autoencoder import autoencoder
from ant_jax.models import norms
from ant_jax.models.dit import DiT
from ant_jax.models.unet import UNet

_NETWORKS = {
    "dit": DiT(width=8, depth=1, heads=2, patch=2, channels=1, dtype=jnp.bfloat16, qk_norm=True),
    "unet": UNet(
        width=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_factors=(2,),
        head_channels=8,
        channels=1,
        dtype=jnp.bfloat16,
    ),
    "autoencoder": autoencoder("KL-f4-small"),
}


@pytest.mark.parametrize("ratio", [1, 30, 300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_of_a_group_norm_does_not_grow_with_the_mean(dtype, ratio):
    rng = np.random.default_rng(0)
    shape, axes = (2, 16, 16, 64), (1, 2, 4)
    x = jnp.asarray(rng.normal(size=shape) + ratio, dtype)
    norm = norms.GroupNorm(32, epsilon=1e-5, use_bias=False, use_scale=False)
    exact = np.asarray(x.astype(jnp.float32), np.float64).reshape(*shape[:3], 32, -1)
    exact = exact - exact.mean(axes, keepdims=True)
    exact = (exact / np.sqrt((exact**2).mean(axes, keepdims=True) + 1e-5)).reshape(shape)
    np.testing.assert_allclose(norm.apply({}, x), exact, atol=2e-5)


def exact_norm(x, norm):
    """The normalised tokens and their standard deviations, in float64."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / deviation, deviation


@pytest.mark.parametrize("ratio", [1, 30, 300])
@pytest.mark.parametrize("outlier", [0, 1e4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_of_a_layer_norm_does_not_grow_with_the_mean(dtype, outlier, ratio):
    x = np.random.default_rng(0).normal(size=(2, 5, 512)) + ratio
    # Of the first channel, from which the others are subtracted.
    x[..., 0] += outlier
    x, zero = jnp.asarray(x, dtype), jnp.zeros((2, 512))
    found = norms.modulated_norm(x, zero, zero, "layer", jnp.float32)
    exact, _ = exact_norm(x, "layer")
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_modulated_norm_and_its_derivatives(norm):
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(2, 3, 16)) + 100 * (norm == "layer"))
    shift, scale = np.float32(rng.normal(size=(2, 2, 16)))
    direction = rng.normal(size=x.shape)
    apply = lambda *args: norms.modulated_norm(*args, norm, jnp.float32)
    y, deviation = exact_norm(x, norm)
    np.testing.assert_allclose(
        apply(x, shift, scale), y * (1 + scale[:, None]) + shift[:, None], rtol=2e-5, atol=2e-5
    )

    loss = lambda *args: jnp.sum(apply(*args) * direction)
    to_x, to_shift, to_scale = jax.jit(jax.grad(loss, (0, 1, 2)))(x, shift, scale)
    to_y = direction * (1 + scale[:, None])
    mean = to_y.mean(-1, keepdims=True) if norm == "layer" else 0
    exact = (to_y - mean - y * (y * to_y).mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(to_x, exact, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(to_shift, direction.sum(1), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(to_scale, (direction * y).sum(1), rtol=2e-5, atol=5e-5)

    # Forward mode is the transpose.
    tangents = tuple(np.float32(rng.normal(size=each.shape)) for each in (x, shift, scale))
    _, along = jax.jvp(loss, (x, shift, scale), tangents)
    gradients = (to_x, to_shift, to_scale)
    products = [np.vdot(a, b) for a, b in zip(gradients, tangents, strict=True)]
    assert along == pytest.approx(sum(products), rel=1e-4)


def test_a_modulated_norm_keeps_its_input_and_little_else():
    x, shift = jnp.ones((2, 3, 16), jnp.bfloat16), jnp.ones((2, 16), jnp.bfloat16)
    apply = lambda *args: norms.modulated_norm(*args, "layer", jnp.bfloat16)
    result, pullback = jax.vjp(apply, x, shift, shift)
    assert result.dtype == jnp.bfloat16
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
    assert [each.dtype for each in pullback(result)] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("name", _NETWORKS)
def test_networks_have_no_other_norms(name):
    network, found = _NETWORKS[name], []

    def note(call, args, kwargs, context):
        found.append(type(context.module))
        return call(*args, **kwargs)

    inputs = [jnp.zeros((1, 8, 8, 3 if name == "autoencoder" else 1))]
    if name != "autoencoder":
        inputs.append(jnp.zeros(1, jnp.int32))
    with nn.intercept_methods(note):
        jax.eval_shape(network.init, jax.random.key(0), *inputs)
    fast = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm, nn.InstanceNorm, nn.RMSNorm)
    used = {kind for kind in found if issubclass(kind, fast)}
    assert used == ({norms.RMSNorm} if name == "dit" else {norms.GroupNorm})
