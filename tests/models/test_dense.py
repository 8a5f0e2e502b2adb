"""The dense layer of the networks against Flax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.models.linear import Dense, SplitDense
from ant_jax.platforms import making_for


def compiled_gradient(layer, params, x):
    loss = lambda params: jnp.sum(jnp.sin(layer.apply(params, x)))
    return jax.jit(jax.grad(loss)).lower(params).compile()


def test_the_gradient_is_that_of_flax_without_a_transposed_copy():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 8)), jnp.float32)
    params = nn.Dense(16).init(jax.random.key(0), x)
    ours, theirs = (compiled_gradient(layer(16), params, x) for layer in (Dense, nn.Dense))
    jax.tree.map(np.testing.assert_array_equal, ours(params), theirs(params))
    assert " transpose(" in theirs.as_text() and " transpose(" not in ours.as_text()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_forms_of_all_platforms_agree(platform):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    params = nn.Dense(16).init(jax.random.key(0), x)
    loss = lambda layer: lambda params: jnp.sum(jnp.sin(layer.apply(params, x)))
    with making_for(platform):
        ours = jax.value_and_grad(loss(Dense(16)))(params)
        form = str(jax.make_jaxpr(loss(Dense(16)))(params))
    assert ("reshape" in form) == (platform != "tpu")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, ours, jax.value_and_grad(loss(nn.Dense(16)))(params))


def test_an_activation_is_computed_again_and_not_kept():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)
    layer, plain = Dense(1024, activation=nn.gelu), Dense(1024)
    params = layer.init(jax.random.key(0), x)

    def kept(function):
        """Elements of the widest rows that the backward pass gets from the forward pass."""
        _, pullback = jax.vjp(function, params, x)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.shape[-1:] == (1024,))

    ours, theirs = layer.apply, lambda *args: nn.gelu(plain.apply(*args))
    np.testing.assert_array_equal(jax.jit(ours)(params, x), jax.jit(theirs)(params, x))
    gradient = lambda f: jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, x)))))(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, gradient(ours), gradient(theirs))
    kernel = 256 * 1024
    assert kept(ours) - kernel <= 64 * 1024 + 1024 < kept(theirs) - kernel


def test_parts_are_those_of_one_layer():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    split, whole = SplitDense(18, 3), Dense(18)
    params = split.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, whole.init(jax.random.key(0), x))
    joined = lambda params: jnp.concatenate(split.apply(params, x), -1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(joined(params), whole.apply(params, x))
    loss = lambda apply: lambda params: jnp.sum(jnp.sin(apply(params)))
    ours, theirs = jax.grad(loss(joined)), jax.grad(loss(lambda params: whole.apply(params, x)))
    jax.tree.map(close, ours(params), theirs(params))
