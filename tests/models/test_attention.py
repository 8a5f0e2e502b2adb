"""Fused attention, without the GPU it is for: what is handed to one, and to whom it is refused."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from ant_jax import experiment
from ant_jax.models.dit import SIZES, DiT
from ant_jax.models.unet import VARIANTS, UNet
from configs import digits, imagenet256_dit_s2

K, GROUP = 3, 2


@pytest.fixture
def cudnn(monkeypatch):
    """A cuDNN to lower for; nothing is run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)


def lowered(model):
    """The k gradients of the train step, by vmap, as a program for CUDA."""
    x = jnp.zeros((K, GROUP, 4, 4, 3))
    t = jnp.zeros((K, GROUP), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x[0], t[0])
    loss = lambda params, x, t: jnp.mean((model.apply(params, x, t) - x) ** 2)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    return gradients.trace(params, x, t).lower(lowering_platforms=("cuda",)).as_text()


def calls(program):
    """(name, types) of each call of cuDNN."""
    return re.findall(r"custom_call @__cudnn\$(\w+)\(.* : (\(.*)", program)


@pytest.mark.parametrize("remat", ["none", "blocks", "dots"])
def test_forward_and_backward_are_one_call_each_over_all_clusters(cudnn, remat):
    dtype = jnp.bfloat16
    fields = dict(width=144, depth=1, heads=2, patch=2, channels=3, dtype=dtype)
    program = lowered(DiT(**fields, attention="cudnn", remat=remat))
    forward, backward = (
        [types for name, types in calls(program) if name == kind]
        for kind in ("fmhaSoftmax", "fmhaSoftmaxBackward")
    )
    # With remat once more; without, the weights of attention never exist.
    assert (len(forward), len(backward)) == (1 if remat == "none" else 2, 1)
    # Batch of all clusters, tokens, heads, channels of a head.
    operand = f"tensor<{K * GROUP}x4x2x72xbf16>"
    assert forward[0].startswith(f"({operand}, {operand}, {operand}")
    assert all(types.count(operand) >= 3 for types in backward)
    assert not calls(lowered(DiT(**fields)))


def test_a_unet_too(cudnn):
    fields = dict(width=64, channel_mult=(1,), num_res_blocks=1, attention_factors=())
    model = UNet(**fields, head_channels=32, channels=3, dtype=jnp.bfloat16, attention="cudnn")
    assert [name for name, _ in calls(lowered(model))] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]


@pytest.mark.parametrize("size", SIZES)
def test_it_takes_the_heads_of_every_dit(size):
    DiT(**SIZES[size], patch=2, channels=4, dtype=jnp.bfloat16, attention="cudnn")


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_takes_the_heads_of_every_unet(variant):
    fields = dict(VARIANTS[variant], channels=3, dtype=jnp.bfloat16, attention="cudnn")
    if variant == "ADM-128":
        # Four heads of 768 channels.
        with pytest.raises(ValueError, match=r"needs heads of .* up to 128, not 192"):
            UNet(**fields)
    else:
        UNet(**fields)


def test_it_is_refused_where_there_is_no_gpu():
    config = imagenet256_dit_s2.get_config()
    config.model.attention = "cudnn"
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        experiment.build_model(config, 4, 1000)


def test_it_is_refused_to_float32(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = digits.get_config()
    config.model.attention = "cudnn"
    with pytest.raises(ValueError, match="needs dtype bfloat16, not float32"):
        experiment.build_model(config, 1, 10)
    config = imagenet256_dit_s2.get_config()
    config.model.attention = "cudnn"
    assert experiment.build_model(config, 4, 1000).attention == "cudnn"
