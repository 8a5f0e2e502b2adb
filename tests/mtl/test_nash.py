"""Nash-MTL: the bargaining solution on hard Gram matrices."""

import functools

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats
from ant_jax.mtl.nash import NashState, bargaining_solution

KS = range(2, 9)


def _regularised(gram):
    """G with 1e-6 added to its unit diagonal, float64."""
    gram = np.asarray(gram, np.float64)
    return gram + 1e-6 * gram * np.eye(gram.shape[-1])


def _check(gram, alpha):
    """Largest |alpha_i (G alpha)_i - 1| of each matrix, and how much rounding alpha moves it."""
    alpha = np.asarray(alpha, np.float64)
    active = np.einsum("nii->ni", gram) > 0
    assert np.isfinite(alpha).all()
    np.testing.assert_array_equal(alpha > 0, active)
    regularised = _regularised(gram)
    residual = alpha * np.einsum("nij,nj->ni", regularised, alpha) - 1
    floor = 2.0**-24 * alpha * np.einsum("nij,nj->ni", abs(regularised), alpha)
    return np.where(active, abs(residual), 0).max(1), floor.max(1)


@functools.cache
def _weigh(k):
    """Weights of Nash for a batch of Gram matrices, all present, from the first state."""
    weighting = mtl.nash(k)
    weigh = lambda gram: weighting.weigh(TaskStats(None, gram, jnp.ones(k)), weighting.init())[0]
    return jax.jit(jax.vmap(weigh))


@pytest.mark.parametrize("k", KS)
def test_solves_hard_gram_matrices(k):
    """Residuals in float32 are below 1e-3, but for gradients of which positive multiples cancel.

    There b = alpha |g| is about 1/sqrt(1e-6) = 1000, and float32 has no alpha of residual below
    1e-3: rounding alpha moves alpha_i (G alpha)_i by 2^-24 alpha_i (|G| |alpha|)_i, about 0.1.
    The test in float64 below shows that this rounding is all the error.
    """
    gradients = sets.draw(sets.REGULAR + sets.OPPOSED, k)
    gram = sets.grams(gradients).astype(np.float32)
    weights = np.asarray(_weigh(k)(gram), np.float64)
    residual, floor = _check(gram, k * weights)
    regular = np.arange(len(gram)) < 20 * len(sets.REGULAR)
    assert (residual[regular] < 1e-3).all()
    assert (residual <= 4 * floor + 1e-3).all()
    # |sum_i alpha_i g_i|^2 = alpha^T G alpha is the number of gradients that bargain.
    norms = np.linalg.norm(np.einsum("nk,nkp->np", weights, gradients), axis=1)
    bargaining = (np.einsum("nii->ni", gram) > 0).sum(1)
    np.testing.assert_allclose(norms[regular], np.sqrt(bargaining[regular]) / k, rtol=1e-4)


def test_solves_opposed_gradients_too_in_float64():
    """The same code, all k at once: a smaller set is padded by garbage that is not active."""
    grams, active = [], []
    for k in KS:
        gram = sets.grams(sets.draw(sets.REGULAR + sets.OPPOSED, k))
        padding = ((0, 0), (0, 8 - k), (0, 8 - k))
        grams.append(np.pad(gram, padding, constant_values=-7))
        active.append(np.einsum("nii->ni", grams[-1]) > 0)
    # Sets from which Newton without damping leaves alpha > 0.
    steep = [np.random.default_rng(seed).normal(size=(8, 3)) for seed in (3, 654, 848)]
    grams.append(sets.grams(np.stack(steep)))
    active.append(np.ones((3, 8), bool))
    grams, active = np.concatenate(grams), np.concatenate(active)
    with jax.enable_x64(True):
        alpha = jax.jit(jax.vmap(bargaining_solution))(jnp.asarray(grams), jnp.asarray(active))
    assert alpha.dtype == np.float64
    residual, _ = _check(np.where(active[:, :, None] & active[:, None], grams, 0), alpha)
    assert residual.max() < 1e-3


def test_residuals_are_those_that_the_docstring_gives():
    """Random, parallel and scaled gradients, and those of which a sum cancels to a part of them."""
    rng, grams = np.random.default_rng(0), []
    for k in (2, 3, 5, 8):
        for cancel in (None, 1, 0.3, 0.1, 0.05, 0.02, 0.01, 0.003, 1e-3, 0):
            g = rng.normal(size=(20, k, 32))
            if cancel is not None:
                g[:, -1] = -(rng.dirichlet(np.ones(k), 20)[:, :-1, None] * g[:, :-1]).sum(1)
                g /= np.linalg.norm(g, axis=2, keepdims=True)
                g += cancel * rng.normal(size=g.shape) / np.sqrt(32)
            g *= 10 ** rng.uniform(-5, 5, size=(20, k, 1))
            grams.append(np.pad(sets.grams(g), ((0, 0), (0, 8 - k), (0, 8 - k))))
        parallel = 1 + 10 ** rng.uniform(-5, 0, size=(20, 1, 1)) * rng.normal(size=(20, k, 32))
        grams.append(np.pad(sets.grams(parallel), ((0, 0), (0, 8 - k), (0, 8 - k))))
    grams = np.concatenate(grams).astype(np.float32)
    alpha = jax.jit(jax.vmap(bargaining_solution))(grams, np.einsum("nii->ni", grams) > 0)
    residual, _ = _check(grams, alpha)
    b = (alpha * np.sqrt(np.einsum("nii->ni", grams))).max(1)
    assert b.min() < 1 and b.max() > 1000
    assert (residual <= 2e-6 + 1e-6 * b**2).all()


def test_two_tasks_in_closed_form():
    """With unit diagonal and cosine c, alpha_i = 1 / (|g_i| sqrt(1 + c))."""
    gram = np.array([[4.0, -3.0], [-3.0, 9.0]], np.float32)
    expected = 1 / np.sqrt(np.diag(gram) * (1 - 0.5))
    np.testing.assert_allclose(2 * _weigh(2)(gram[None])[0], expected, rtol=1e-5)


def test_a_gradient_and_its_opposite_in_closed_form():
    """Only the 1e-6 on the diagonal is left, give or take the last bit of the cosine, 6 % of it."""
    squares = np.float32(np.linspace(1, 7, 50))
    gram = squares[:, None, None] * np.float32([[1, -1], [-1, 1]])
    expected = 1000 / np.sqrt(squares)
    np.testing.assert_allclose(2 * _weigh(2)(gram), np.stack([expected] * 2, 1), rtol=0.1)


def test_one_task_gives_the_unit_gradient():
    gram = np.float32([[[1e-8]], [[1]], [[1e8]], [[0]]])
    np.testing.assert_allclose(_weigh(1)(gram)[:, 0], [1e4, 1, 1e-4, 0], rtol=1e-5)


def test_update_is_invariant_to_the_scale_of_a_loss():
    k = 5
    gradients = sets.draw([sets._random], k, n=50)
    scales = 10 ** np.random.default_rng(0).uniform(-3, 3, size=(50, k, 1))
    updates = []
    for g in (gradients, scales * gradients):
        weights = np.asarray(_weigh(k)(sets.grams(g).astype(np.float32)), np.float64)
        updates.append(np.einsum("nk,nkp->nkp", weights, g))
    np.testing.assert_allclose(updates[0], updates[1], atol=1e-4 * abs(updates[0]).max())


BAD = {
    "nan everywhere": np.full((3, 3), np.nan),
    "nan pair": [[1, np.nan, 0], [np.nan, 1, 0], [0, 0, 1]],
    "inf": np.diag([np.inf, 1, 1]) + np.inf * np.ones((3, 3)),
}


@pytest.fixture(scope="module")
def weigh3():
    return jax.jit(mtl.nash(3).weigh)


@pytest.mark.parametrize("bad", BAD)
def test_keeps_the_previous_solution_where_there_is_no_finite_one(weigh3, bad):
    stats = TaskStats(None, jnp.float32(BAD[bad]), jnp.ones(3))
    alpha = jnp.float32([1, 2, 3])
    _, state = weigh3(stats, NashState(alpha))
    np.testing.assert_array_equal(state.alpha, alpha)
    # From the first state on nothing that is not finite enters it, and the next call recovers.
    _, state = weigh3(stats, mtl.nash(3).init())
    assert np.isfinite(state.alpha).all()
    weights, _ = weigh3(TaskStats(None, jnp.diag(jnp.float32([1, 4, 16])), jnp.ones(3)), state)
    np.testing.assert_allclose(weights, np.float32([1, 1 / 2, 1 / 4]) / 3, rtol=1e-5)


def test_first_fallback_is_one_over_the_norm(weigh3):
    gram = jnp.float32([[4, np.nan, 0], [np.nan, 16, 0], [0, 0, 64]])
    _, state = weigh3(TaskStats(None, gram, jnp.ones(3)), mtl.nash(3).init())
    np.testing.assert_allclose(state.alpha, [1 / 2, 1 / 4, 1 / 8], rtol=1e-6)
