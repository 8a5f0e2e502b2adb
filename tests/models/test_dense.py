"""The dense layer of the networks against Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.models.dense import Dense


def compiled_gradient(layer, params, x):
    loss = lambda params: jnp.sum(jnp.sin(layer.apply(params, x)))
    return jax.jit(jax.grad(loss)).lower(params).compile()


def test_the_gradient_is_that_of_flax_without_a_transposed_copy():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 8)), jnp.float32)
    params = nn.Dense(16).init(jax.random.key(0), x)
    ours, theirs = (compiled_gradient(layer(16), params, x) for layer in (Dense, nn.Dense))
    jax.tree.map(np.testing.assert_array_equal, ours(params), theirs(params))
    assert " transpose(" in theirs.as_text() and " transpose(" not in ours.as_text()
