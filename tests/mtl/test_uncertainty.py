import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats


def test_uncertainty_stays_finite_for_a_loss_that_is_zero():
    """Without an end it overflows after 3500 steps of 0.025; here after 35 of 2.5."""
    weighting = mtl.uncertainty(2, 2.5)
    weigh = jax.jit(weighting.weigh)
    state = weighting.init()
    for _ in range(50):
        weights, state = weigh(TaskStats(jnp.array([0.0, 1.0]), None, jnp.ones(2)), state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))
    assert weights[0] > 1e15


@pytest.mark.parametrize("learning_rate", [None, 0.1])
def test_uncertainty_is_adam_on_the_log_variances(learning_rate):
    """w = exp(-s) / (2k) from the s before its update; an absent task's Adam stands still."""
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
        weights, state = weigh(TaskStats(losses[step], None, present[step]), state)
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
    losses = np.float32([0.5, 8])
    stats = TaskStats(losses, None, np.ones(2))

    def step(state, _):
        weights, state = weighting.weigh(stats, state)
        return state, weights

    weights = jax.lax.scan(step, weighting.init(), length=400)[1]
    np.testing.assert_allclose(weights[0], 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(weights[-1], 1 / (2 * losses), rtol=1e-2)
