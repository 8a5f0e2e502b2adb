"""PCGrad on the Gram matrix against the textbook algorithm on explicit vectors."""

import importlib

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats
from ant_jax.mtl.pcgrad import projection_orders

FAMILIES = sets.REGULAR + sets.OPPOSED


def _textbook(gradients, orders, present):
    """Algorithm 1 of Yu et al. (2020) on the vectors of the present clusters."""
    projected = []
    for i in np.flatnonzero(present):
        g = gradients[i].copy()
        for j in orders[i]:
            if j == i or not present[j] or not gradients[j].any():
                continue
            inner = g @ gradients[j]
            if inner < 0:
                g -= inner / (gradients[j] @ gradients[j]) * gradients[j]
        projected.append(g)
    return np.mean(projected, 0)


def _weigh_all_present(gram, seed, count):
    k = len(gram)
    return mtl.pcgrad(k, seed).weigh(TaskStats(None, gram, jnp.ones(k)), count)[0]


_jitted = jax.jit(_weigh_all_present)


def _weigh(gram, seed=0, count=0):
    return np.asarray(_jitted(np.float32(gram), np.int32(seed), np.int32(count)), np.float64)


@pytest.mark.parametrize(("k", "p"), [(3, 50), (8, 4)])
def test_equals_the_textbook_on_explicit_vectors(k, p):
    """Every set of gradients has its own count, hence its own orders, and 1 to k present."""
    seed = 10 + k
    gradients = sets.draw(FAMILIES, k, p=p)
    n = len(gradients)
    rng = np.random.default_rng(k)
    present = rng.random((n, k)) < rng.choice([1, 0.7], size=(n, 1))
    present[:, 0] = True

    counts = jnp.arange(n)
    orders = np.asarray(jax.jit(jax.vmap(lambda count: projection_orders(seed, count, k)))(counts))
    weigh = jax.jit(jax.vmap(mtl.pcgrad(k, seed).weigh))
    stats = TaskStats(None, sets.grams(gradients).astype(np.float32), present)
    weights, after = weigh(stats, counts)

    np.testing.assert_array_equal(after, counts + 1)
    updates = np.einsum("nk,nkp->np", np.asarray(weights, np.float64), gradients)
    for i in range(n):
        expected = _textbook(gradients[i], orders[i], present[i])
        scale = np.linalg.norm(gradients[i], axis=-1).max()
        np.testing.assert_allclose(updates[i], expected, atol=2e-5 * scale)


@pytest.fixture
def weigh_in_order(monkeypatch):
    """Weights of a Gram matrix with given orders, (k, k)."""

    def weigh(gram, orders):
        module = importlib.import_module("ant_jax.mtl.pcgrad")
        monkeypatch.setattr(module, "projection_orders", lambda seed, count, k: jnp.array(orders))
        return _weigh_all_present(jnp.float32(gram), 0, jnp.int32(0))

    return weigh


def test_gradient_is_not_projected_on_itself(weigh_in_order):
    """g_0 at 0 degrees, projected on those at 170 and 250, points 160 degrees away from itself."""
    angles = np.deg2rad([0, 170, 250])
    gradients = np.stack([np.cos(angles), np.sin(angles)], 1)
    orders = np.array([[1, 2, 0]] * 3)
    weights = weigh_in_order(gradients @ gradients.T, orders)
    expected = _textbook(gradients, orders, np.ones(3, bool))
    np.testing.assert_allclose(weights @ gradients, expected, atol=1e-6)


def test_equivariant_under_relabelling_if_the_orders_are(weigh_in_order):
    k = 5
    rng = np.random.default_rng(0)
    g = rng.normal(size=(k, 4))
    gram = g @ g.T
    orders = np.stack([rng.permutation(k) for _ in range(k)])
    relabel = rng.permutation(k)  # the new task i is the old task relabel[i]
    weights = weigh_in_order(gram, orders)
    relabelled = weigh_in_order(gram[relabel][:, relabel], np.argsort(relabel)[orders[relabel]])
    assert np.ptp(weights) > 0.1
    np.testing.assert_allclose(relabelled, weights[relabel], rtol=1e-5)


def test_without_conflict_equals_linear():
    g = np.abs(np.random.default_rng(0).normal(size=(5, 20)))
    np.testing.assert_allclose(_weigh(g @ g.T), 0.2, rtol=1e-6)


@pytest.mark.parametrize("cosine", [-1.0, -0.9, -0.1, 0.5])
def test_two_tasks_in_closed_form(cosine):
    """A conflict adds -<g_0, g_1> / |g_j|^2 / 2 to w_j; exactly opposed tasks cancel."""
    norms = np.array([0.5, 3.0])
    gram = np.outer(norms, norms) * [[1, cosine], [cosine, 1]]
    weights = _weigh(gram)
    expected = (1 + max(0, -cosine) * norms[::-1] / norms) / 2
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    # Neither task is made worse to first order.
    assert (gram @ weights >= -1e-6).all()
    if cosine == -1:
        np.testing.assert_allclose(gram @ weights, 0, atol=1e-6)


def test_weights_do_not_change_with_a_common_scale():
    g = np.random.default_rng(0).normal(size=(5, 4))
    expected = _weigh(g @ g.T)
    assert np.ptp(expected) > 0.1
    for scale in (2.0**-20, 2.0**20):
        np.testing.assert_array_equal(_weigh(scale**2 * g @ g.T), expected)


def test_orders_are_permutations_that_depend_on_seed_and_count_alone():
    draw = jax.jit(projection_orders, static_argnums=2)
    orders = [np.asarray(draw(seed, count, 5)) for seed in (0, 1) for count in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(5), (5, 1)))
        assert len(np.unique(order, axis=0)) > 1  # each task has its own
    assert len({order.tobytes() for order in orders}) == 4
    np.testing.assert_array_equal(draw(1, 1, 5), orders[-1])


def test_orders_follow_the_state():
    g = np.random.default_rng(0).normal(size=(5, 3))
    weighting = mtl.pcgrad(5, seed=3)
    weigh = jax.jit(weighting.weigh)
    gram, present = np.float32(g @ g.T), jnp.ones(5, bool)
    state, seen = weighting.init(), []
    for call in range(3):
        assert state == call
        weights, state = weigh(TaskStats(None, gram, present), state)
        seen.append(np.asarray(weights))
        np.testing.assert_allclose(_weigh(gram, 3, call), weights, rtol=1e-5)
    assert not np.allclose(seen[0], seen[1])
    assert not np.allclose(_weigh(gram, 4), seen[0])
