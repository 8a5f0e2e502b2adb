"""GradVac on the Gram matrix against the algorithm on explicit vectors."""

import importlib

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats
from ant_jax.mtl.gradvac import GradvacState
from ant_jax.mtl.pcgrad import projection_orders


def textbook(gradients, orders, phi, beta, present):
    """The mean corrected gradient, and the new averages."""
    phi, corrected = phi.copy(), []
    for i in np.flatnonzero(present):
        g = gradients[i].copy()
        for j in orders[i]:
            if j == i or not present[j]:
                continue
            norm, other = np.linalg.norm(g), np.linalg.norm(gradients[j])
            cosine, target = g @ gradients[j] / norm / other, phi[i, j]
            if cosine < target:
                sine = np.sqrt(1 - target**2)
                factor = norm * (target * np.sqrt(1 - cosine**2) - cosine * sine) / (other * sine)
                g += factor * gradients[j]
                after = g @ gradients[j] / np.linalg.norm(g) / other
                np.testing.assert_allclose(after, target, atol=1e-9)
            phi[i, j] = (1 - beta) * target + beta * cosine
        corrected.append(g)
    return np.mean(corrected, 0), phi


@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_equals_the_textbook_over_several_calls(beta):
    k, seed = 5, 3
    rng = np.random.default_rng(0)
    weighting = mtl.gradvac(k, beta, seed)
    weigh, state, phi = jax.jit(weighting.weigh), weighting.init(), np.zeros((k, k))
    orders_of = jax.jit(lambda count: projection_orders(seed, count, k))
    common = rng.normal(size=12)
    for call in range(12):
        # They agree at first, and conflict later.
        gradients = rng.normal(size=(k, 12)) + (1 if call < 6 else 0.2) * common
        gradients *= rng.uniform(0.1, 10, size=(k, 1))
        present = np.ones(k, bool) if call % 3 else rng.random(k) < 0.6
        stats = TaskStats(None, np.float32(gradients @ gradients.T), jnp.float32(present))
        weights, state = weigh(stats, state)
        update, phi = textbook(gradients, np.asarray(orders_of(call)), phi, beta, present)
        scale = np.abs(update).max()
        np.testing.assert_allclose(np.asarray(weights) @ gradients, update, atol=1e-4 * scale)
        np.testing.assert_allclose(state.phi, phi, atol=1e-5)
    assert state.count == 12 and np.abs(phi).max() > beta / 2


def test_is_pcgrad_for_beta_0():
    k = 5
    gram = jnp.float32(sets.grams(sets.draw([sets._random, sets._scales_apart], k, p=4)))
    counts = jnp.arange(len(gram))
    stats = TaskStats(None, gram, jnp.ones((len(gram), k)))
    state = GradvacState(jnp.zeros((len(gram), k, k)), counts)
    vaccine, after = jax.jit(jax.vmap(mtl.gradvac(k, 0.0, 7).weigh))(stats, state)
    surgery, _ = jax.jit(jax.vmap(mtl.pcgrad(k, 7).weigh))(stats, counts)
    scale = np.abs(surgery).max(1, keepdims=True)
    np.testing.assert_allclose(vaccine / scale, surgery / scale, atol=1e-5)
    np.testing.assert_array_equal(after.phi, 0)
    np.testing.assert_array_equal(after.count, counts + 1)


def test_two_unit_gradients_reach_the_average_cosine():
    """Each is turned: at cosine c towards phi by (phi s_c - c s_phi) / s_phi of the other."""
    cosine, phi = -0.5, 0.6
    state = GradvacState(jnp.float32([[0, phi], [phi, 0]]), jnp.int32(0))
    stats = TaskStats(None, jnp.float32([[1, cosine], [cosine, 1]]), jnp.ones(2))
    weights, after = jax.jit(mtl.gradvac(2, 0.25).weigh)(stats, state)
    factor = (phi * np.sqrt(0.75) - cosine * 0.8) / 0.8
    np.testing.assert_allclose(weights, [(1 + factor) / 2] * 2, rtol=1e-5)
    expected = 0.75 * phi + 0.25 * cosine
    np.testing.assert_allclose(after.phi, [[0, expected], [expected, 0]], rtol=1e-6)


def test_stays_finite_at_averages_of_1():
    k = 5
    gram = jnp.float32(np.tile(sets.grams(sets.draw(sets.REGULAR + sets.OPPOSED, k)), (2, 1, 1)))
    n = len(gram)
    stats = TaskStats(None, gram, jnp.ones((n, k)))
    phi = jnp.where(jnp.arange(n)[:, None, None] < n // 2, -jnp.ones((k, k)), 1)
    state = GradvacState(phi, jnp.arange(n))
    weights, after = jax.jit(jax.vmap(mtl.gradvac(k, 0.5).weigh))(stats, state)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert (np.abs(after.phi) <= 1).all()


def test_beta_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="beta must be"):
        mtl.gradvac(3, 1.5)


def test_a_gradient_that_a_correction_cancels_is_not_corrected_further(monkeypatch):
    """Gradients 0 and 1 are opposed: what float32 leaves of them has no cosine with gradient 2."""
    module = importlib.import_module("ant_jax.mtl.gradvac")
    in_order = lambda seed, count, k: jnp.tile(jnp.arange(k), (k, 1))
    monkeypatch.setattr(module, "projection_orders", in_order)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(50, 3, 20))
    gradients[:, 1] = -rng.uniform(0.1, 10, size=(50, 1)) * gradients[:, 0]
    weighting = mtl.gradvac(3, 0.5)
    weigh = lambda gram: weighting.weigh(TaskStats(None, gram, jnp.ones(3)), weighting.init())[1]
    phi = np.asarray(jax.jit(jax.vmap(weigh))(jnp.float32(sets.grams(gradients))).phi)
    np.testing.assert_allclose(phi[:, 0, 1], -0.5, rtol=1e-5)
    np.testing.assert_array_equal(phi[:, :2, 2], 0)
