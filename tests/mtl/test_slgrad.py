"""SLGrad against explicit gradients of the single examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inspection import largest_array, run_example

from ant_jax import mtl

INPUTS, WIDTH, K = 8, 16, 2


@functools.cache
def network(batch):
    """Losses (K, B) of a small network, its parameters and a validation gradient."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"trunk": array(INPUTS, WIDTH) / 3, "heads": array(WIDTH, K) / 4}

    def losses(params, x, y):
        return ((jnp.tanh(x @ params["trunk"]) @ params["heads"] - y) ** 2).T

    x, y = array(batch, INPUTS), array(batch, K)
    main_loss = lambda params: losses(params, array(5, INPUTS), array(5, K))[0].mean()
    return lambda params: losses(params, x, y), params, jax.jit(jax.grad(main_loss))(params)


def flat(tree, leading=0):
    """The leaves of a pytree as one float64 array; the first axes stay."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(*leaf.shape[:leading], -1) for leaf in leaves], -1)


def compare(losses_fn, params, v):
    both = lambda params, v: (mtl.slgrad(losses_fn, params, v), jax.jacrev(losses_fn)(params))
    found, jacobian = jax.jit(both)(params, v)
    shape = found.losses.shape
    each = flat(jacobian, len(shape))
    positive = np.maximum(each @ flat(v), 0)
    weights = positive / (positive.sum() or 1)
    gradient = np.tensordot(weights, each, len(shape))
    np.testing.assert_allclose(found.weights, weights, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(flat(found.gradient), gradient, rtol=1e-3, atol=1e-5)
    return found


def test_all_tasks_on_each_example():
    losses_fn, params, v = network(batch=12)
    found = compare(losses_fn, params, v)
    weights = np.asarray(found.weights)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert (weights == 0).any() and (weights[1] > 0).any()
    assert flat(found.gradient) @ flat(v) > 0
    assert found.losses.shape == weights.shape == (K, 12)


def test_each_example_of_one_task():
    losses_fn, params, v = network(batch=12)
    of_one = lambda params: losses_fn(params)[jnp.arange(12) % K, jnp.arange(12)]
    compare(of_one, params, v)


def test_shared_parameters_alone():
    """Where v is 0, the gradients of the examples do not count, but are part of the update."""
    losses_fn, params, v = network(batch=12)
    found = compare(losses_fn, params, v | {"heads": jnp.zeros_like(v["heads"])})
    assert np.any(found.gradient["heads"])


def test_no_example_that_helps():
    losses_fn, params, _ = network(batch=12)
    each = flat(jax.jit(jax.jacrev(losses_fn))(params), 2).reshape(-1, flat(params).size)
    # More parameters than losses: the inner products can all be -1.
    v, *_ = np.linalg.lstsq(each, -np.ones(len(each)), rcond=None)
    v = jax.flatten_util.ravel_pytree(params)[1](jnp.asarray(v, jnp.float32))
    found = compare(losses_fn, params, v)
    assert not np.any(found.weights) and not np.any(flat(found.gradient))
    opposite = compare(losses_fn, params, jax.tree.map(jnp.negative, v))
    np.testing.assert_allclose(opposite.weights, 1 / each.shape[0], rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e12])
def test_equal_gradients_give_that_gradient(scale):
    direction = jnp.asarray([1.0, 2.0, -3.0])
    losses_fn = lambda params: jnp.full((2, 5), scale) * (params @ direction)
    found = mtl.slgrad(losses_fn, jnp.ones(3), direction * scale)
    np.testing.assert_allclose(found.gradient, direction * scale, rtol=1e-5)


def test_a_loss_that_is_not_finite_shows():
    losses_fn = lambda params: params * jnp.asarray([1.0, jnp.nan, 2.0])
    assert np.isnan(mtl.slgrad(losses_fn, jnp.float32(1), jnp.float32(1)).gradient)


def test_no_array_holds_the_gradients_of_the_examples():
    batch = 64
    losses_fn, params, v = network(batch)
    activations = batch * WIDTH
    assert activations < batch * INPUTS * WIDTH
    for function in (mtl.slgrad_weights, mtl.slgrad):
        assert largest_array(lambda p, v: function(losses_fn, p, v), params, v) <= activations  # noqa: B023
    singly = jax.jacrev(lambda params: losses_fn(params)[0])
    assert largest_array(singly, params) >= batch * INPUTS * WIDTH


def test_the_example_of_the_docstring_runs():
    found, before, after = run_example(mtl.slgrad, "found", "before", "after")
    np.testing.assert_allclose(found.weights.sum(), 1, rtol=1e-6)
    assert after < before


@pytest.mark.parametrize(
    "find",
    [
        lambda wrong: mtl.slgrad(lambda params: wrong.mean() * params, 1.0, 1.0),
        lambda wrong: mtl.lookahead_weights(lambda params: wrong * params, lambda p: p, 1.0, 0.1),
        lambda wrong: mtl.lookahead_weights(lambda p: wrong[0] * p, lambda p: wrong[0] * p, 1.0, 1),
        lambda wrong: mtl.rep_mtl(lambda features: wrong * features.sum(), wrong),
    ],
)
def test_losses_of_another_shape_are_refused(find):
    with pytest.raises(ValueError, match=r"must return .* got the shapes? \("):
        find(jnp.ones((2, 3)))
