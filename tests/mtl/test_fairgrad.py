"""FairGrad: solutions of G w = w^(-1/alpha) on hard Gram matrices."""

import functools
import importlib

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.fairgrad import fair_weights

ALPHAS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0)


@functools.cache
def _solve(k):
    """Compiled once for all alphas."""
    one = lambda gram, alpha: fair_weights(unit_gram(gram, jnp.ones(k, bool)), alpha)
    return jax.jit(jax.vmap(one, (0, None)))


def solve(gram, alpha):
    """The weights of all Gram matrices."""
    return np.asarray(_solve(gram.shape[-1])(jnp.float32(gram), alpha), np.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_solves_hard_gram_matrices(alpha):
    """Up to the rounding of the weights in float32, which is 2^-24 w^(1/alpha) |G| |w|."""
    k = 5
    gram = sets.grams(sets.draw(sets.REGULAR + sets.OPPOSED, k)).astype(np.float32)
    weights = solve(gram, alpha)
    active = np.einsum("nii->ni", gram) > 0
    assert np.isfinite(weights).all() and not weights[~active].any()
    regularised = gram * (1 + 1e-6 * np.eye(k))
    power = weights ** (1 / alpha)
    residual = np.abs(power * np.einsum("nij,nj->ni", regularised, weights) - 1)
    rounding = power * np.einsum("nij,nj->ni", np.abs(regularised), weights)
    # For a large alpha the weight of a gradient that is much larger than others can be below 1e-38.
    seen = active & (weights > 1e-30)
    assert seen.sum() > 0.95 * active.sum() and (alpha > 5 or (seen == active).all())
    solved = residual[seen] < 50 * 2.0**-24 * (1 + rounding[seen])
    # Within 60 iterations for all but a few of those that nearly cancel.
    assert solved.mean() > 0.97
    regular = np.arange(len(gram)) < 20 * len(sets.REGULAR)
    assert solved[np.nonzero(seen)[0] < regular.sum()].all()


def test_ends_where_float32_brings_no_further_gain(monkeypatch):
    """With fewer iterations allowed, the result is the same."""
    gram = sets.grams(sets.draw([sets._nearly_opposed], 8, n=150))
    expected = solve(gram, 5.0)
    module = importlib.import_module("ant_jax.mtl.fairgrad")
    monkeypatch.setattr(module, "_MAX_ITERATIONS", module._MAX_ITERATIONS // 2)
    _solve.cache_clear()
    np.testing.assert_array_equal(solve(gram, 5.0), expected)
    _solve.cache_clear()


@pytest.mark.parametrize("k", [2, 5])
def test_alpha_1_is_nash(k):
    gram = sets.grams(sets.draw(sets.REGULAR, k))
    np.testing.assert_allclose(
        sets.weigh(mtl.fairgrad(k), gram), k * sets.weigh(mtl.nash(k), gram), rtol=1e-3
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_and_identical_gradients_in_closed_form(alpha):
    squares = np.array([1e-4, 1, 1e2])
    gram = np.stack([np.diag(squares), np.full((3, 3), 4.0)])
    weights = solve(gram, alpha)
    power = -alpha / (1 + alpha)
    np.testing.assert_allclose(weights[0], squares**power, rtol=1e-4)
    np.testing.assert_allclose(weights[1], [12.0**power] * 3, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_weights_are_a_power_of_the_scale_of_the_gradients(alpha):
    """The same digits, so the solution does not depend on the scale."""
    gram = sets.grams(sets.draw([sets._random], 5))
    weights = solve(gram, alpha)
    for scale in (1e-16, 1e16):
        scaled = solve(scale * gram, alpha)
        np.testing.assert_allclose(scaled * scale ** (alpha / (1 + alpha)), weights, rtol=2e-4)


def test_a_larger_alpha_raises_the_least_progress():
    """Relative to the mean progress."""
    gram = sets.grams(sets.draw([sets._random], 5))
    ratios = []
    for alpha in (0.25, 1.0, 10.0):
        progress = np.einsum("nij,nj->ni", gram, solve(gram, alpha))
        assert (progress > 0).all()
        ratios.append(progress.min(1) / progress.mean(1))
    assert (ratios[0] < ratios[1]).all() and (ratios[1] < ratios[2]).all()


@pytest.mark.parametrize("alpha", [0, 0.1, 20])
def test_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match="alpha must be"):
        mtl.fairgrad(3, alpha)
