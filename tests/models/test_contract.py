"""What `ant_jax.models` promises of every network in its folder."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import models
from ant_jax.interop import read_state, write_state
from ant_jax.models.remat import REMAT
from ant_jax.published_weights import OWN_NAMES, from_torch, to_torch
from ant_jax.settings import names_in, resolve

NAMES = names_in(models, nn.Module)
# Settings that compile sooner than the defaults.
SMALL = {
    "dit": dict(width=16, depth=1, heads=2, patch=2),
    "unet": dict(width=64, channel_mult=(1, 1), num_res_blocks=1, attention_factors=()),
}
# For what takes long to compile and needs each kind of module once.
SMALLEST = {"unet": dict(channel_mult=(1,))}
CLASSES = 5
EXAMPLES = 3


def build(name, num_classes=CLASSES, learned_variance=True, dtype=jnp.float32, **settings):
    return models.build_network(
        resolve(models, name, nn.Module),
        SMALL.get(name, {}) | settings,
        channels=3,
        num_classes=num_classes,
        learned_variance=learned_variance,
        dtype=dtype,
    )


def inputs_of(model):
    """Images whose sides are odd multiples of what they must be multiples of."""
    multiple = models.input_multiple(model)
    shape = (EXAMPLES, 3 * multiple, 5 * multiple, 3)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = np.array([0, CLASSES - 1, CLASSES]) if models.num_classes(model) else None
    return x, np.array([0, 57, 999]), labels


def shapes_of(model):
    return jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs_of(model))


@functools.cache
def random_params(model):
    """Without the zeros of the initialisation, where most of a network is inert."""
    rng = np.random.default_rng(1)
    _, shapes = shapes_of(model)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


@functools.cache
def compiled(name):
    return jax.jit(build(name).apply)


@functools.cache
def output_of(name):
    return np.asarray(compiled(name)(random_params(build(name)), *inputs_of(build(name))))


def test_the_networks_are_found_by_their_names():
    assert {"dit", "unet"} <= set(NAMES)
    # Helpers of networks are not listed.
    assert not {"attention", "network", "norms", "remat", "timesteps"} & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_settings_have_defaults_that_are_allowed_and_fit_each_other(name):
    network = resolve(models, name, nn.Module)
    settings = models.network_settings(network)
    for setting in settings.values():
        assert setting.problem(setting.default) is None
    model = models.build_network(network, {}, channels=3)
    assert model is models.build_network(network, {}, channels=3)
    assert {field: getattr(model, field) for field in settings} == {
        field: setting.default for field, setting in settings.items()
    }
    meaning = models.meaning_of(network)
    assert meaning and not {"remat", "attention"} & set(meaning)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("num_classes", [0, CLASSES])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_types(name, num_classes, learned_variance):
    model = build(name, num_classes, learned_variance, jnp.bfloat16)
    inputs = inputs_of(model)
    output, params = shapes_of(model)
    assert output.shape == (*inputs[0].shape[:-1], 6 if learned_variance else 3)
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert set(params) == {"params"}
    apply = functools.partial(model.apply, capture_intermediates=True)
    _, state = jax.eval_shape(apply, params, *inputs)
    activations = {leaf.dtype for leaf in jax.tree.leaves(state["intermediates"])}
    assert jnp.dtype(jnp.bfloat16) in activations


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_finite_numbers(name):
    model = build(name, **SMALLEST.get(name, {}))
    output, params = jax.jit(model.init_with_output)(jax.random.key(0), *inputs_of(model))
    for leaf in (output, *jax.tree.leaves(params)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_their_own_noise_level_and_label_alone(name):
    apply, params, output = compiled(name), random_params(build(name)), output_of(name)
    x, t, y = inputs_of(build(name))
    scale = abs(output).max()
    assert np.isfinite(scale)
    order = np.array([2, 0, 1])
    permuted = apply(params, x[order], t[order], y[order])
    np.testing.assert_allclose(permuted, output[order], rtol=1e-4, atol=1e-5 * scale)
    for inputs in ((x, t + 1, y), (x, t, (y + 1) % (CLASSES + 1))):
        assert (abs(apply(params, *inputs) - output).max(axis=(1, 2, 3)) > 1e-4 * scale).all()
    # One program for all noise levels and labels.
    assert apply._cache_size() == 1
    assert apply(params, x, np.float32([0.1, 0.5, 999.5]), y).shape == output.shape


@pytest.mark.parametrize("name", NAMES)
def test_remat_changes_neither_parameters_nor_gradients(name):
    if "remat" not in models.network_settings(resolve(models, name, nn.Module)):
        pytest.skip("keeps everything for its backward pass")
    networks = [build(name, remat=remat, **SMALLEST.get(name, {})) for remat in REMAT]
    shapes = [shapes_of(build(name, remat=remat))[1] for remat in REMAT]
    assert all(each == shapes[0] for each in shapes)
    inputs = inputs_of(networks[0])
    loss = lambda params, model: jnp.mean(model.apply(params, *inputs) ** 2)
    gradient = jax.jit(jax.grad(loss), static_argnames="model")
    # "dots" has a policy of its own; how often "blocks" computes is counted network by network.
    gradients = [gradient(random_params(networks[0]), model=model) for model in networks[::2]]
    largest = max(abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(gradients[0]))
    assert np.isfinite(largest)
    for plain, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_read_again(name, tmp_path):
    model = build(name)
    params = random_params(model)["params"]
    weights = models.weights_module(type(model))
    x = inputs_of(model)[0]
    for names in (OWN_NAMES, *([weights.exported(model, x.shape[1:], {})] if weights else [])):
        write_state(tmp_path / "x.safetensors", to_torch(params, names))
        template = shapes_of(model)[1]["params"]
        read = from_torch(read_state(tmp_path / "x.safetensors"), template, names)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), read, params)
