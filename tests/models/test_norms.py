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
    "dit": DiT(width=8, depth=1, heads=2, patch=2, channels=1, dtype=jnp.bfloat16),
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
@pytest.mark.parametrize("kind", ["layer", "group"])
def test_error_does_not_grow_with_the_mean(kind, dtype, ratio):
    rng = np.random.default_rng(0)
    shape, groups = (2, 16, 16, 64), 32 if kind == "group" else 1
    x = jnp.asarray(rng.normal(size=shape) + ratio, dtype)
    if kind == "group":
        norm = norms.GroupNorm(groups, epsilon=1e-5, use_bias=False, use_scale=False)
        split, axes = (*shape[:3], groups, -1), (1, 2, 4)
    else:
        norm = norms.LayerNorm(epsilon=1e-5, use_bias=False, use_scale=False)
        split, axes = shape, -1
    exact = np.asarray(x.astype(jnp.float32), np.float64).reshape(split)
    exact = exact - exact.mean(axes, keepdims=True)
    exact = (exact / np.sqrt((exact**2).mean(axes, keepdims=True) + 1e-5)).reshape(shape)
    np.testing.assert_allclose(norm.apply({}, x), exact, atol=2e-5)


def test_gradient_is_that_of_the_norm():
    rng = np.random.default_rng(1)
    x, direction, eps = rng.normal(size=(3, 16)) + 100, rng.normal(size=(3, 16)), 1e-5
    norm = norms.LayerNorm(epsilon=eps, use_bias=False, use_scale=False)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(norm.apply({}, x) * direction)))(np.float32(x))
    x = np.float64(np.float32(x))
    centred = x - x.mean(-1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    y = centred / sigma
    exact = direction - direction.mean(-1, keepdims=True)
    exact = (exact - y * (y * direction).mean(-1, keepdims=True)) / sigma
    np.testing.assert_allclose(gradient, exact, atol=5e-6)


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
    assert used and used <= {norms.LayerNorm, norms.GroupNorm}
