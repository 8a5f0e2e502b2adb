"""Optimality of MGDA, UPGrad, DualProj and CAGrad on hard Gram matrices."""

import functools

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl.cagrad import worst_case_shift
from ant_jax.mtl.cone import (
    complementarity,
    dual_cone_weights,
    min_norm_weights,
    project_on_simplex,
    unit_gram,
)

FAMILIES = sets.REGULAR + sets.OPPOSED
KS = (2, 3, 5, 8, 32)


@jax.jit
@jax.vmap
def units(gram):
    return unit_gram(gram, jnp.ones(len(gram), bool))


# A compilation each, shared by the tests: operations one by one would compile each of them.
shortest = jax.jit(jax.vmap(min_norm_weights))
projected = jax.jit(jax.vmap(dual_cone_weights))
nearest = jax.jit(jax.vmap(project_on_simplex))
shifts = jax.jit(jax.vmap(worst_case_shift, (0, None, None)))


@functools.cache
def compiled(name, k, *settings):
    weighting = getattr(mtl, name)(k, *settings)
    weigh = lambda gram: weighting.weigh(mtl.TaskStats(None, gram, jnp.ones(k)), ())[0]
    return jax.jit(jax.vmap(weigh))


def weigh(gram, name, k, *settings):
    """Weights of a method for a batch of Gram matrices, all tasks present."""
    return np.asarray(compiled(name, k, *settings)(jnp.float32(gram)), float)


@functools.cache
class Problem:
    """Sets of gradients as float32 rounds them, with what float64 makes of them."""

    def __init__(self, k, families=FAMILIES):
        # The larger problems take most of the time.
        sizes = {"n": 20 if k < 32 else 5}
        gradients = sets.draw(families, k, **sizes).astype(np.float32).astype(float)
        self.gram = sets.grams(gradients)
        self.norms = np.sqrt(np.einsum("nii->ni", self.gram))
        self.active = self.norms > 0
        norms = np.where(self.active, self.norms, 1)
        self.cosines = self.gram / norms[:, :, None] / norms[:, None]
        self.cosines[:, range(k), range(k)] = 1
        self.unit = units(jnp.float32(self.gram))


def apply(matrices, vectors):
    return np.einsum("nij,nj->ni", matrices, vectors)


@pytest.mark.parametrize("k", KS)
def test_min_norm_weights_are_optimal(k):
    """In lengths of the shortest gradient times those of each, (G x)_i >= x' G x."""
    problem = Problem(k)
    weights = np.asarray(shortest(problem.unit), float)
    assert (weights >= 0).all() and not weights[~problem.active].any()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    progress = apply(problem.gram, weights)
    squared = np.einsum("ni,ni->n", weights, progress)[:, None]
    norms = np.where(problem.active, problem.norms, np.inf)
    least = norms.min(1, keepdims=True)
    assert ((squared - progress) / norms / least).max() < 2e-6 * max(k, 5)
    trace = np.einsum("nii->n", problem.gram)[:, None] / k
    assert (weights * np.abs(progress - squared) / trace).max() < 1e-5


@pytest.mark.parametrize("k", KS)
def test_dual_cone_weights_are_optimal(k):
    """v >= u, G v >= 0, (v - u)' G v = 0, in units of the largest entry of v."""
    problem = Problem(k)
    # The mean, and one gradient alone.
    for start in (np.full(k, 1 / k), np.eye(k)[0]):
        start = np.where(problem.active, start, 0)
        weights = np.asarray(projected(problem.unit, jnp.float32(start)), float)
        assert (weights >= np.float32(start)).all()
        v, u = weights * problem.norms, np.float32(start) * problem.norms
        scale = np.abs(v).max(1, keepdims=True)
        scale[scale == 0] = 1
        inner = apply(problem.cosines, v / scale)
        assert inner[problem.active].min() > -1e-5
        assert np.abs((v - u) / scale * inner).max() < 1e-5


@pytest.mark.parametrize("c", [0.4, 0.9])
@pytest.mark.parametrize("k", [2, 8])
def test_the_worst_case_shift_is_optimal(k, c):
    """The dual value, <g0, g_x> + c |g0| |g_x|, bounds the worst progress from above."""
    families = tuple(f for f in FAMILIES if f not in (*sets.OPPOSED, sets._zero_row))
    problem = Problem(k, families)
    mean = np.full(k, 1 / k)
    v = np.asarray(shifts(problem.unit, jnp.float32(mean), c), float)
    assert (v >= 0).all()
    length = np.sqrt(np.einsum("i,nij,j->n", mean, problem.gram, mean))
    moved = np.sqrt(np.einsum("ni,nij,nj->n", v, problem.gram, v))
    np.testing.assert_allclose(moved, c * length, rtol=1e-5)
    progress = apply(problem.gram, mean + v)
    x = v / v.sum(1, keepdims=True)
    dual = np.einsum("i,nij,nj->n", mean, problem.gram, x) + c * length * np.sqrt(
        np.einsum("ni,nij,nj->n", x, problem.gram, x)
    )
    shortfall = (dual[:, None] - progress) / problem.norms / length[:, None]
    assert shortfall.max() < 1e-5


@pytest.mark.parametrize("k", [3, 8])
def test_cagrad_keeps_both_of_two_opposed_gradients(k):
    """Then no progress is possible for both: the optimum is 0, as far as float32 resolves it."""
    c = 0.9
    problem = Problem(k, (sets._opposed,))
    progress = apply(problem.gram, weigh(problem.gram, "cagrad", k, c)) * (1 + c**2)
    mean = np.sqrt(problem.gram.sum((1, 2))) / k
    cosine = progress[:, [0, -1]] / problem.norms[:, [0, -1]] / mean[:, None]
    before = problem.gram.mean(2)[:, [0, -1]] / problem.norms[:, [0, -1]] / mean[:, None]
    # Within reach are those whose conflict the shift can cancel.
    reach = np.abs(before).max(1) < 0.8 * c
    assert reach.any() and cosine[reach].min() > -1e-3


def test_cagrad_is_the_mean_for_c_0_and_mgda_for_a_large_c():
    k = 5
    gram = Problem(k, (sets._random,)).gram
    np.testing.assert_allclose(weigh(gram, "cagrad", k, 0.0), 1 / k, rtol=1e-6)
    large = weigh(gram, "cagrad", k, 1e4)
    mgda = weigh(gram, "mgda", k)
    np.testing.assert_allclose(large / large.sum(1, keepdims=True), mgda, rtol=1e-2, atol=1e-3)


def test_two_gradients_have_the_closed_form():
    gram = sets.grams(np.random.default_rng(0).normal(size=(20, 2, 4)))
    aa, ab, bb = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    first = np.clip((bb - ab) / (aa - 2 * ab + bb), 0, 1)
    found = weigh(gram, "mgda", 2)
    np.testing.assert_allclose(found, np.stack([first, 1 - first], 1), atol=2e-5)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj", "cagrad"])
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_weights_do_not_depend_on_the_scale_of_the_gradients(name, scale):
    """The update, because the weights of gradients that depend linearly are not unique."""
    problem = Problem(5, sets.REGULAR)
    progress = [
        apply(problem.cosines, weigh(factor * problem.gram, name, 5) * problem.norms)
        for factor in (1, scale)
    ]
    size = np.abs(progress[0]).max(1, keepdims=True)
    np.testing.assert_allclose(progress[1] / size, progress[0] / size, atol=1e-5)


@pytest.mark.parametrize("name", ["upgrad", "mgda"])
def test_the_update_conflicts_with_no_gradient(name):
    problem = Problem(5)
    weights = weigh(problem.gram, name, 5)
    inner = apply(problem.cosines, weights * problem.norms)
    length = np.abs(weights * problem.norms).max(1, keepdims=True)
    assert (inner[problem.active] / np.broadcast_to(length, inner.shape)[problem.active]).min() > (
        -1e-5
    )


def test_upgrad_is_the_mean_without_conflict():
    gradients = np.abs(np.random.default_rng(0).normal(size=(5, 8)))
    weights = weigh((gradients @ gradients.T)[None], "upgrad", 5)
    np.testing.assert_allclose(weights, 0.2, rtol=1e-6)


def test_a_problem_that_is_not_finite_ends():
    z = jax.jit(complementarity)(jnp.full((3, 3), jnp.nan), jnp.ones(3))
    assert z.shape == (3,)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_projection_on_the_simplex_is_the_nearest_point(k):
    """z >= 0, sum 1, and x - z is largest, and equal, where z is positive."""
    rng = np.random.default_rng(k)
    x = rng.normal(size=(200, k)) * 10 ** rng.uniform(-3, 3, (200, 1))
    x[:50] = np.round(x[:50])
    x[50:60] += 1e4
    x = x.astype(np.float32)
    present = rng.random((200, k)) < 0.7
    z = np.asarray(nearest(x, present), float)
    some = present.any(1)
    assert not z[~present].any() and (z >= 0).all() and not z[~some].any()
    np.testing.assert_allclose(z[some].sum(1), 1, rtol=2e-6)
    moved = np.where(present, x - z, -np.inf)[some]
    least = np.where(z > 0, x - z, np.inf)[some].min(1)
    assert ((moved.max(1) - least) <= 1e-6 * (1 + np.abs(x[some]).max(1))).all()


def test_the_projection_of_what_is_not_finite_is_not_finite():
    assert not np.isfinite(nearest(np.float32([[0, np.nan, 1]]), np.ones((1, 3), bool))).all()
