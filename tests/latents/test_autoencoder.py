import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.interop import WeightsError, from_torch, read_state, to_torch, write_state
from ant_jax.latents.autoencoder import Autoencoder, autoencoder
from ant_jax.latents.autoencoder_weights import AUTOENCODER

RECORDED = Path(__file__).parents[1] / "data" / "autoencoder"
_spec = importlib.util.spec_from_file_location("record", RECORDED / "record.py")
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)

TINY = dict(width=32, multipliers=(1, 2, 2), blocks=1)
MODELS = {
    "kl": Autoencoder(**TINY),
    "vq": Autoencoder(**TINY, latent_channels=3, codebook=50),
    "attention": Autoencoder(
        **TINY,
        attention_factors=(4,),
        middle_attention=False,
        latent_channels=3,
        inner_channels=6,
        codebook=50,
    ),
}


def paper_name(name):
    """What the paper's code calls a weight that diffusers calls so; both as of 2024."""
    parts = name.split(".")
    if parts[1] == "mid_block":
        kind, number, *rest = parts[2:]
        inner = {"resnets": f"block_{int(number) + 1}", "attentions": "attn_1"}[kind]
        parts = [parts[0], "mid", inner, *rest]
    elif parts[1] in ("down_blocks", "up_blocks"):
        way = parts[1].removesuffix("_blocks")
        level = int(parts[2]) if way == "down" else 2 - int(parts[2])
        inner = {"resnets": ["block", parts[4]], "attentions": ["attn", parts[4]]}.get(
            parts[3], [f"{way}sample"]
        )
        parts = [parts[0], way, str(level), *inner, *parts[5:]]
    text = ".".join(parts)
    for theirs, papers in (
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ):
        text = text.replace(theirs, papers)
    return text


def load(name, names):
    """The recording, and its weights by the names of diffusers or of the paper's code."""
    with np.load(RECORDED / f"{name}.npz") as stored:
        recorded = dict(stored)
    state = {}
    for key, shape in zip(recorded["names"], recorded["shapes"], strict=True):
        value = record.weight(str(key), tuple(map(int, str(shape).split())))
        if names == "paper":
            key = paper_name(str(key))
            if ".attn" in key and value.ndim == 2:
                value = value[:, :, None, None]
        state[str(key)] = value
    return recorded, state


@functools.cache
def template(name):
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return shapes["params"]


@functools.cache
def compiled(name, method):
    return jax.jit(functools.partial(MODELS[name].apply, method=method))


@pytest.mark.parametrize("names", ["diffusers", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_others_give_their_numbers(name, names):
    recorded, state = load(name, names)
    variables = {"params": from_torch(state, template(name), AUTOENCODER)}
    images = recorded["images"].transpose(0, 2, 3, 1)
    latent = compiled(name, "encode")(variables, images)
    assert_close(latent.mean, recorded["mean"])
    assert_close(latent.std, recorded["std"])
    mean = recorded["mean"].transpose(0, 2, 3, 1)
    decoded = compiled(name, "decode")(variables, mean)
    assert_close(decoded, recorded["decoded"])


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_back_to_where_they_came_from(tmp_path, name):
    state = load(name, "paper")[1]
    params = from_torch(state, template(name), AUTOENCODER)
    write_state(tmp_path / "x.safetensors", to_torch(params, AUTOENCODER))
    written = read_state(tmp_path / "x.safetensors")
    assert set(written) == set(state)
    for key, value in written.items():
        np.testing.assert_array_equal(value, state[key], strict=True)


@pytest.mark.parametrize("dtype", [np.int8, np.complex64])
def test_weights_that_are_no_floating_numbers_are_refused(dtype):
    state = load("kl", "paper")[1]
    state["quant_conv.weight"] = state["quant_conv.weight"].astype(dtype)
    with pytest.raises(WeightsError, match=r"quant_conv\.weight is of the type .*, not of a float"):
        from_torch(state, template("kl"), AUTOENCODER)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(value):
    state = load("kl", "paper")[1]
    name = "decoder.conv_in.bias"
    state[name] = state[name].astype(np.float64)
    state[name][3] = value
    with pytest.raises(WeightsError, match=r"1 of the 64 values of decoder\.conv_in\.bias are NaN"):
        from_torch(state, template("kl"), AUTOENCODER)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_what_is_no_weight_of_the_autoencoder_is_passed_over(prefix):
    state = load("kl", "paper")[1]
    expected = from_torch(state, template("kl"), AUTOENCODER)
    checkpoint = {prefix + key: value for key, value in state.items()}
    checkpoint |= {prefix + "loss.logvar": np.zeros(()), "model_ema.decay": np.zeros(())}
    if prefix:
        checkpoint |= {"model.diffusion_model.out.2.bias": np.zeros(3), "betas": np.zeros(5)}
    params = from_torch(checkpoint, template("kl"), AUTOENCODER)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(WeightsError, match=r"this autoencoder: 1 unexpected: decoder\.extra\.bias"):
        from_torch(
            {**checkpoint, prefix + "decoder.extra.bias": np.zeros(3)}, template("kl"), AUTOENCODER
        )


def assert_close(ours, theirs):
    theirs = theirs.transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max() + 1e-30)


# Of the network that the reference builds by each config of its model zoo, without its loss.
PUBLISHED = {
    "KL-f4": 55_312_063,
    # Of Stable Diffusion, too.
    "KL-f8": 83_653_863,
    "KL-f16": 69_610_963,
    "KL-f32": 103_880_131,
    # 55.3 M in the paper's table 8.
    "VQ-f4": 55_322_782,
    "VQ-f4-noattn": 53_219_486,
    "VQ-f8": 67_717_295,
    "VQ-f8-n256": 67_652_783,
    "VQ-f16": 69_593_371,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    model = autoencoder(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


def test_bfloat16_activations_leave_parameters_and_results_in_float32():
    model = Autoencoder(**TINY, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    latent = jax.eval_shape(lambda v, x: model.apply(v, x, method="encode"), shapes, images)
    assert latent.mean.shape == latent.std.shape == (2, 4, 4, 4)
    assert latent.mean.dtype == latent.std.dtype == jnp.float32
    decoded = jax.eval_shape(model.apply, shapes, images)
    assert decoded.shape == images.shape and decoded.dtype == jnp.float32


def test_a_latent_on_the_codebook_is_its_own_neighbour():
    model = MODELS["vq"]
    params = from_torch(load("vq", "diffusers")[1], template("vq"), AUTOENCODER)
    codes = params["embedding"][np.arange(50).reshape(1, 5, 10)]
    near = codes + np.random.default_rng(0).normal(0, 1e-3, codes.shape)
    quantise = lambda latents: model.apply(
        {"params": params}, latents, method=lambda module, x: module._quantise(x)
    )
    np.testing.assert_array_equal(quantise(np.float32(near)), codes)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="width must be a multiple of 32, not 40"):
        Autoencoder(width=40)
    with pytest.raises(ValueError, match=r"attention_factors must be among \[1, 2, 4\], not 8"):
        Autoencoder(**TINY, attention_factors=(8,))
    for shape in ((1, 16, 18, 3), (1, 16, 16, 1)):
        with pytest.raises(ValueError, match=r"with H and W multiples of 4, not \(1, 16"):
            jax.eval_shape(MODELS["kl"].init, jax.random.key(0), jnp.zeros(shape))
