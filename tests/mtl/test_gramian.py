"""The Gram matrix and the smallest cosine against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl.combine import weighted_sum
from ant_jax.mtl.gramian import keeping_axes
from ant_jax.platforms import making_for

pairwise_cosines = jax.jit(mtl.pairwise_cosines)


def _flat(stacked):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


@pytest.fixture(params=["cpu", "gpu"])
def form(request):
    """The sums have the form that they have on these devices."""
    with making_for(request.param):
        yield


@pytest.mark.usefixtures("form")
def test_gramian_of_a_tree_of_mixed_shapes_and_types():
    rng = np.random.default_rng(0)
    stacked = {
        "kernel": jnp.float32(rng.normal(size=(3, 4, 5))),
        "bias": [jnp.float32(rng.normal(size=(3, 7))), jnp.float16(rng.normal(size=(3, 2)))],
        "scalar": jnp.float32(rng.normal(size=3)),
        "half": jnp.asarray(rng.normal(size=(3, 300)), jnp.bfloat16),
        "none": None,
    }
    flat = _flat(stacked)
    gram = jax.jit(lambda stacked: mtl.gramian(stacked))(stacked)
    assert gram.dtype == np.float32
    # In bfloat16 the products of the last leaf would be off by 1e-3.
    np.testing.assert_allclose(gram, flat @ flat.T, atol=1e-5 * (flat @ flat.T).max())
    np.testing.assert_array_equal(gram, gram.T)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weighted_sum(dtype):
    rng = np.random.default_rng(0)
    leaf, weights = jnp.asarray(rng.normal(size=(4, 3, 5)), dtype), jnp.float32(rng.normal(size=4))
    exact = np.einsum("k,kij->ij", np.float64(weights), np.asarray(leaf, np.float64))
    found = jax.jit(lambda *args: weighted_sum(*args))(weights, leaf)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.float64(found), exact, rtol=2 * jnp.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(512, 512), (513, 513)])
def test_long_gradients_are_summed_accurately(shape):
    rng = np.random.default_rng(0)
    stacked = jnp.float32(rng.normal(size=(5, *shape)))
    flat, gramian = _flat(stacked), lambda stacked: mtl.gramian(stacked)
    # One sum from end to end would be off by 6e-5.
    np.testing.assert_allclose(
        jax.jit(gramian)(stacked), flat @ flat.T, atol=1e-6 * (flat @ flat.T).max()
    )
    has_product = "dot_general" in str(jax.make_jaxpr(gramian)(stacked))
    assert has_product == (shape == (513, 513))


@pytest.mark.parametrize("k", [1, 5, 9])
def test_on_gpus_few_tasks_need_no_product(k):
    rng = np.random.default_rng(0)
    stacked = jnp.float32(rng.normal(size=(k, 3, 4))), jnp.float32(rng.normal(size=k))
    # In a function of its own, because JAX keeps what it has traced.
    traced = lambda f, *args: str(jax.make_jaxpr(lambda *args: f(*args))(*args))
    has_product = lambda *args: "dot_general" in traced(*args)
    assert has_product(mtl.gramian, stacked) and has_product(weighted_sum, stacked[1], stacked[0])
    with making_for("gpu"):
        assert has_product(mtl.gramian, stacked) == (k > 8)
        assert not has_product(weighted_sum, stacked[1], stacked[0])
        gram = jax.jit(lambda stacked: mtl.gramian(stacked))(stacked)
        with keeping_axes():
            # Of sharded gradients.
            assert has_product(mtl.gramian, stacked)
    flat = _flat(stacked)
    np.testing.assert_allclose(gram, flat @ flat.T, atol=1e-5 * (flat @ flat.T).max())


def test_pairwise_cosines():
    rng = np.random.default_rng(0)
    for scale in (1e-5, 1, 1e5):
        g = scale * rng.normal(size=(5, 3))
        unit = g / np.linalg.norm(g, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(5, 1)]
        g[2] *= 100
        np.testing.assert_allclose(
            pairwise_cosines(jnp.float32(g @ g.T)), cosines, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("gram", "expected"),
    [
        ([[4, 1], [1, 1]], [0.5]),
        ([[4, 0, 1], [0, 0, 0], [1, 0, 1]], [np.nan, 0.5, np.nan]),  # a row without a gradient
        ([[1, -1], [-1, 1]], [-1]),
        ([[4, 0], [0, 0]], [np.nan]),
        ([[3]], []),
    ],
)
def test_pairwise_cosines_of_small_matrices(gram, expected):
    np.testing.assert_allclose(pairwise_cosines(jnp.float32(gram)), expected, rtol=1e-6)
