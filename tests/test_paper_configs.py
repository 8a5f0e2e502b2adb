"""The configs of the paper's experiments, without their data and without allocating a weight."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ant_jax import compiled_step, experiment, state_layout
from ant_jax import config as config_lib
from ant_jax.models.dit import DiT
from configs import digits

# Millions of parameters, and the height, width and channels of the network's input.
PAPER = {
    "ffhq256_adm": (94, (256, 256, 3)),
    "celebahq256_adm": (94, (256, 256, 3)),
    "ffhq256_ldm": (274, (64, 64, 3)),
    "celebahq256_ldm": (274, (64, 64, 3)),
    "imagenet256_dit_s2": (33, (32, 32, 4)),
    "imagenet256_dit_b2": (130, (32, 32, 4)),
    "imagenet256_dit_l2": (458, (32, 32, 4)),
    "imagenet256_dit_xl2": (675, (32, 32, 4)),
    "imagenet256_dtr_l2": (458, (32, 32, 4)),
    "imagenet256_sit_s2": (33, (32, 32, 4)),
    "imagenet256_sit_b2": (130, (32, 32, 4)),
    "imagenet256_sit_l2": (458, (32, 32, 4)),
    "imagenet256_sit_xl2": (675, (32, 32, 4)),
    "cifar10_edm": (57, (32, 32, 3)),
}
# With a block of each kind, where the slow test has all of them.
FAMILIES = {
    "ffhq256_adm": {"model.channel_mult": (1, 2), "model.attention_factors": (2,)},
    "imagenet256_dit_s2": {"model.depth": 1},
    "imagenet256_sit_s2": {"model.depth": 1},
}
METHODS = ("vanilla", "linear", "uncertainty", "pcgrad", "nash")


def completed(name, argument):
    """A config as its command makes it."""
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    if config.data.name == "folder":
        config.data.dir = "images"
    if config.autoencoder.name:
        config.autoencoder.weights = "weights.safetensors"
        config.autoencoder.latents = "latents"
    if config.evaluation.features == "inception":
        config.evaluation.weights = "inception.pth"
    return config


def build(config, shape):
    classes = 10 if config.data.get("builder") == "cifar10" else 1000
    return experiment.build(config, shape[-1], classes if config.model.conditional else 0)


def test_every_config_of_the_paper_is_here():
    names = {path.stem for path in Path(digits.__file__).parent.glob("*256_*.py")}
    assert names | {"cifar10_edm"} == set(PAPER)


def num_params(model, shape):
    """Of a DiT, whose blocks are alike, from those of one and of two blocks."""
    if isinstance(model, DiT):
        one, two = (_num_params(model.clone(depth=depth), shape) for depth in (1, 2))
        return one + (model.depth - 1) * (two - one)
    return _num_params(model, shape)


@functools.cache
def _num_params(model, shape):
    params = jax.eval_shape(lambda: experiment.init_params(model, shape, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PAPER)
def test_it_builds_and_its_network_has_the_published_size(name):
    config = completed(name, "nash,timestep")
    assert (config.method.name, config.clusters.name) == ("nash", "timestep")
    millions, shape = PAPER[name]
    setup = build(config, shape)
    assert setup.image_shape == shape
    assert round(num_params(setup.model, shape) / 1e6) == millions
    assert f"{millions} M parameters" in (importlib.import_module(f"configs.{name}").__doc__) or (
        name.startswith("celebahq")
    )


@pytest.mark.parametrize("name", PAPER)
def test_the_argument_chooses_the_method_and_every_method_fits_the_batch(name, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for method in METHODS:
        config = completed(name, f"{method},snr")
        config_lib.validate(config)
        setup = build(config, PAPER[name][1])
        experiment.check_batch(config, setup)
        assert (setup.draw == "uniform") == (method == "vanilla")


@pytest.mark.parametrize(
    ("name", "sampler", "timesteps", "end"),
    [
        ("ffhq256_adm", "ddpm", [0, 4, 8], 999),
        ("celebahq256_adm", "ddpm", [0, 4, 8], 999),
        ("ffhq256_ldm", "ddim", [1, 6, 11], 996),
        ("celebahq256_ldm", "ddim", [1, 6, 11], 996),
        ("imagenet256_dit_l2", "ddpm", [0, 4, 8], 999),
    ],
)
def test_samplers_are_those_that_the_configs_claim(name, sampler, timesteps, end):
    config = completed(name, "vanilla")
    settings = config.sampler
    process = config_lib.build_process(config)
    used = process.steps(settings.num_steps, settings.spacing)
    assert settings.name == sampler
    assert used.t[:3].tolist() == timesteps
    assert used.t[-1] == end
    with_noise = used.noise[0] > 0
    assert with_noise == (sampler == "ddim")


@pytest.mark.parametrize(("name", "calls"), [("imagenet256_sit_xl2", 250), ("cifar10_edm", 35)])
def test_samplers_call_the_network_as_often_as_in_the_papers(name, calls):
    assert experiment.nfe(completed(name, "vanilla")) == calls


def trace(name, method, monkeypatch, changes=None):
    """The train step as a program for one device, of shapes alone."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = completed(name, f"{method},snr")
    config_lib.update(config, changes or {})
    setup = build(config, PAPER[name][1])
    state = state_layout.abstract_state(config, setup)
    examples = (config.data.batch_size,)
    pixels = not config.autoencoder.name
    batch = {
        "image": jax.ShapeDtypeStruct(
            (*examples, *setup.image_shape), jnp.uint8 if pixels else jnp.float32
        ),
        "label": jax.ShapeDtypeStruct(examples, jnp.int32),
    }
    traced = jax.jit(compiled_step.training_step(config, setup)).trace(state, batch)
    after, metrics = traced.out_info
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)
    assert metrics["cluster_losses"].shape == (config.clusters.k,)
    # As bfloat16 as the config says: the matrix products of the network, both ways.
    products = [line for line in str(traced.jaxpr).splitlines() if "dot_general[" in line]
    bfloat16 = config.model.dtype == "bfloat16"
    assert any("bf16[" in line for line in products) == bfloat16


@pytest.mark.parametrize("name", FAMILIES)
def test_the_train_step_of_each_family_is_traced(name, monkeypatch):
    trace(name, "uncertainty", monkeypatch, FAMILIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vanilla", "uncertainty", "pcgrad", "nash"])
@pytest.mark.parametrize("name", PAPER)
def test_the_train_step_of_every_config_is_traced(name, method, monkeypatch):
    trace(name, method, monkeypatch)
