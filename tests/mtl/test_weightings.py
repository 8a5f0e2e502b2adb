"""Linear and uncertainty weighting, and what holds for every weighting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl

METHODS = {
    "linear": mtl.linear,
    "uncertainty": mtl.uncertainty,
    "pcgrad": mtl.pcgrad,
    "nash": mtl.nash,
    "nash, stale": lambda k: mtl.nash(k, update_every=2),
}
K = 5


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    """(name, weighting, jitted weigh), compiled once for all tests."""
    weighting = METHODS[request.param](K)
    return request.param, weighting, jax.jit(weighting.weigh)


def _gram(rng, k=K):
    g = rng.normal(size=(k, 4))
    return np.float32(g @ g.T)


def _losses(rng, k=K):
    return np.float32(rng.uniform(0.1, 4 * k, size=k))


def test_absent_clusters_get_weight_zero_and_are_not_read(method):
    """All but one present, one, none at all; an absent cluster's loss and row are garbage or 0."""
    _, weighting, weigh = method
    rng = np.random.default_rng(0)
    state = other = weighting.init()
    for present in rng.permutation(np.tri(K + 1, K, -1, dtype=bool)):
        losses, gram = _losses(rng), _gram(rng)
        weights, state = weigh(losses, gram, present, state)
        np.testing.assert_array_equal(weights == 0, ~present)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))
        empty = np.where(present[:, None] & present, gram, 0)
        zeros, other = weigh(np.where(present, losses, 0), empty, present, other)
        np.testing.assert_allclose(weights, zeros, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, other)


def test_zero_gradients_give_finite_weights_for_every_method(method):
    _, weighting, weigh = method
    weights, state = weigh(
        np.zeros(K, np.float32), np.zeros((K, K)), np.ones(K, bool), weighting.init()
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))


@pytest.mark.parametrize("method", ["linear", "uncertainty", "nash", "nash, stale"], indirect=True)
def test_equivariant_under_relabelling(method):
    name, weighting, weigh = method
    rng = np.random.default_rng(0)
    relabel = np.array([3, 0, 4, 1, 2])
    state = other = weighting.init()
    for _ in range(3):
        losses, gram, present = _losses(rng), _gram(rng), rng.random(K) < 0.8
        weights, state = weigh(losses, gram, present, state)
        relabelled, other = weigh(
            losses[relabel], gram[relabel][:, relabel], present[relabel], other
        )
        np.testing.assert_allclose(relabelled, weights[relabel], rtol=1e-4)
    assert name == "linear" or np.ptp(weights[present]) > 1e-3


@pytest.mark.parametrize("method", ["linear", "uncertainty"], indirect=True)
def test_methods_of_losses_alone_do_not_read_the_gram_matrix(method):
    _, weighting, weigh = method
    assert not weighting.needs_gram
    rng = np.random.default_rng(0)
    losses, present = _losses(rng), np.ones(K, bool)
    expected = weigh(losses, None, present, weighting.init())
    found = weigh(losses, np.full((K, K), np.nan), present, weighting.init())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("method", ["linear", "pcgrad", "nash", "nash, stale"], indirect=True)
def test_methods_of_gradients_do_not_read_the_losses(method):
    _, weighting, weigh = method
    assert not weighting.needs_losses
    gram, present = _gram(np.random.default_rng(0)), np.ones(K, bool)
    expected = weigh(None, gram, present, weighting.init())
    found = weigh(np.full(K, np.nan), gram, present, weighting.init())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_uncertainty_stays_finite_for_a_loss_that_is_zero():
    """Without an end it overflows after 3500 steps of 0.025; here after 35 of 2.5."""
    weighting = mtl.uncertainty(2, 2.5)
    weigh = jax.jit(weighting.weigh)
    state = weighting.init()
    for _ in range(50):
        weights, state = weigh(jnp.array([0.0, 1.0]), None, jnp.ones(2, bool), state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))
    assert weights[0] > 1e15


def test_linear_is_the_mean_over_the_present():
    weigh = mtl.linear(4).weigh
    for present in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]):
        weights, state = weigh(None, None, jnp.array(present, bool), ())
        np.testing.assert_array_equal(weights, np.float32(present) / max(sum(present), 1))
        assert weights.dtype == np.float32
        assert state == ()


@pytest.mark.parametrize("learning_rate", [None, 0.1])
def test_uncertainty_is_adam_on_the_log_variances(learning_rate):
    """w = exp(-s) / (2k) from the s before its update; an absent cluster's Adam stands still."""
    k, steps = 4, 25
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 20, size=(steps, k)).astype(np.float32)
    present = rng.random((steps, k)) < 0.6
    present[:2] = [[True, True, True, False], [False, True, True, False]]
    weighting = mtl.uncertainty(k, **({"learning_rate": learning_rate} if learning_rate else {}))
    weigh = jax.jit(weighting.weigh)
    state = weighting.init()

    lr, b1, b2, eps = learning_rate or 0.025, 0.9, 0.999, 1e-8
    s, m, v, count = np.zeros((4, k))
    for step in range(steps):
        weights, state = weigh(losses[step], None, present[step], state)
        expected = np.where(present[step], np.exp(-s) / (2 * k), 0)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        for i in np.flatnonzero(present[step]):
            gradient = 0.5 * (1 - np.exp(-s[i]) * losses[step, i] / k)
            count[i] += 1
            m[i] = b1 * m[i] + (1 - b1) * gradient
            v[i] = b2 * v[i] + (1 - b2) * gradient**2
            m_hat, v_hat = m[i] / (1 - b1 ** count[i]), v[i] / (1 - b2 ** count[i])
            s[i] -= lr * m_hat / (np.sqrt(v_hat) + eps)
        np.testing.assert_allclose(state.log_variance, s, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.adam[0].mu, m, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(state.adam[0].nu, v, rtol=1e-4, atol=1e-9)
        np.testing.assert_array_equal(state.adam[0].count, count)


def test_uncertainty_starts_at_one_over_2k_and_settles_at_the_loss():
    """At the minimum exp(s_i) = L_i / k, hence w_i = 1 / (2 L_i)."""
    weighting = mtl.uncertainty(2, learning_rate=0.1)
    losses, present = np.float32([0.5, 8]), np.ones(2, bool)

    def step(state, _):
        weights, state = weighting.weigh(losses, None, present, state)
        return state, weights

    weights = jax.lax.scan(step, weighting.init(), length=400)[1]
    np.testing.assert_allclose(weights[0], 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(weights[-1], 1 / (2 * losses), rtol=1e-2)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_wrong_k_is_an_error(make, k):
    with pytest.raises(ValueError, match="k, the number of clusters"):
        make(k)


@pytest.mark.parametrize(
    "bad", [{"update_every": 0}, {"max_norm": 0.0}, {"max_norm": -1.0}, {"max_norm": np.nan}]
)
def test_wrong_arguments_of_nash_are_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        mtl.nash(2, **bad)


def test_linear_with_fixed_weights():
    weigh = mtl.linear(3, [0.5, 0.0, 2.0]).weigh
    weights, _ = weigh(jnp.ones(3), None, jnp.array([True, True, True]), ())
    np.testing.assert_array_equal(weights, np.float32([0.5, 0, 2]))
    weights, _ = weigh(jnp.ones(3), None, jnp.array([True, True, False]), ())
    np.testing.assert_array_equal(weights, np.float32([0.5, 0, 0]))


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0], [1.0, np.nan, 1.0], 1.0])
def test_fixed_weights_that_can_not_be(weights):
    with pytest.raises(ValueError, match="weights must be 3 finite numbers >= 0"):
        mtl.linear(3, weights)
