"""IMTL-G and ConFIG: equal projections on all gradients."""

import gradients as sets
import numpy as np
import pytest

from ant_jax import mtl

BOTH = pytest.mark.parametrize("method", [mtl.imtl_g, mtl.config])


def of_angles(degrees, norms):
    """Gradients in the plane."""
    angles = np.deg2rad(degrees)
    return np.array(norms)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def pseudo_inverse(gradients, cut=1e-5):
    """C^+ 1, and the norms."""
    norms = np.linalg.norm(gradients, axis=1)
    cosines = gradients @ gradients.T / np.outer(norms, norms)
    return np.linalg.pinv(cosines, rcond=cut, hermitian=True) @ np.ones(len(norms)), norms


@BOTH
@pytest.mark.parametrize("k", [2, 5])
def test_projections_on_all_gradients_are_equal(method, k):
    scales = np.random.default_rng(1).uniform(0.1, 10, size=(20, k, 1))
    gradients = scales * sets.draw([sets._random], k)
    gram = sets.grams(gradients)
    weights = sets.weigh(method(k), gram)
    norms = np.linalg.norm(gradients, axis=2)
    progress = np.einsum("nij,nj->ni", gram, weights) / norms
    np.testing.assert_allclose(progress, np.tile(progress[:, :1], k), rtol=1e-4)
    assert (progress > 0).all()
    if method is mtl.imtl_g:
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    else:
        # Its length is the mean of the projections of the gradients on it.
        length = np.sqrt(np.einsum("ni,nij,nj->n", weights, gram, weights))
        mean = (progress * norms).mean(1) / length
        np.testing.assert_allclose(length, mean, rtol=1e-4)


def test_the_length_of_config_is_exact_for_gradients_that_nearly_depend_on_each_other():
    """The sum of the norms over sqrt(1' C^-1 1), where C^-1 has numbers of 1e4."""
    k, rng = 5, np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(100, n, k)))[0] for n in (k, 10))
    singular = 10 ** rng.uniform(-2, 0, size=(100, 1, k))
    gradients = (left * singular) @ right.swapaxes(1, 2)
    gradients /= np.linalg.norm(gradients, axis=2, keepdims=True)
    gradients *= 10 ** rng.uniform(-3, 3, size=(100, k, 1))
    gradients = np.float32(gradients).astype(float)
    gram = sets.grams(gradients)
    found = np.linalg.norm(
        np.einsum("nk,nkp->np", sets.weigh(mtl.config(k), gram), gradients), axis=1
    )
    norms = np.linalg.norm(gradients, axis=2)
    cosines = gram / norms[:, :, None] / norms[:, None]
    solution = np.linalg.solve(cosines, np.ones((100, k, 1)))[..., 0]
    length = norms.mean(1) / np.sqrt(solution.sum(1))
    np.testing.assert_allclose(found, length, rtol=1e-5)


def test_imtl_g_of_two_tasks_in_closed_form():
    """Whatever the angle."""
    gradients = np.stack([of_angles([0, angle], [2, 6]) for angle in (1, 60, 120, 179)])
    weights = sets.weigh(mtl.imtl_g(2), sets.grams(gradients))
    np.testing.assert_allclose(weights, np.tile([6 / 8, 2 / 8], (4, 1)), rtol=1e-4)


def beyond(norm):
    """The middle one of three gradients points beyond the plane through the ends of the others."""
    middle = np.array([1, 1, 0.5]) / 1.5
    return np.stack([[1, 0, 0], norm * middle, [0, 1, 0]])


def test_imtl_g_never_increases_all_losses():
    """If the sum of v is negative, the update is the paper's with its sign turned."""
    gradients = beyond(norm=0.02)
    u, norms = pseudo_inverse(gradients)
    paper = u / norms / (u / norms).sum()
    assert (gradients @ (gradients.T @ paper) < 0).all()
    weights = sets.weigh(mtl.imtl_g(3), sets.grams(gradients)[None])[0]
    np.testing.assert_allclose(weights, -paper, rtol=1e-4)


def test_imtl_g_is_the_paper_s_for_weights_of_both_signs():
    gradients = beyond(norm=1.0)
    u, norms = pseudo_inverse(gradients)
    weights = sets.weigh(mtl.imtl_g(3), sets.grams(gradients)[None])[0]
    assert weights[1] < 0
    np.testing.assert_allclose(weights, u / norms / (u / norms).sum(), rtol=1e-4)


def test_imtl_g_has_bounded_weights_if_their_sum_vanishes():
    u, _ = pseudo_inverse(beyond(1.0))
    norm = -u[1] / (u[0] + u[2])
    gram = np.stack([sets.grams(beyond(factor * norm)) for factor in (0.999, 1.0, 1.001)])
    weights = sets.weigh(mtl.imtl_g(3), gram)
    np.testing.assert_allclose(np.abs(weights).sum(1), 100, rtol=1e-3)
    assert (np.einsum("nij,nj->ni", gram, weights) > 0).all()
    np.testing.assert_allclose(weights[0], weights[2], rtol=0.05)


@BOTH
def test_dependent_gradients_have_the_pseudo_inverse(method):
    for seed in range(3):
        gradients = np.random.default_rng(seed).normal(size=(5, 3))
        u, norms = pseudo_inverse(gradients)
        update = gradients.T @ (u / norms)
        if method is mtl.imtl_g:
            update /= max(abs((u / norms).sum()), 0.1 * np.abs(u / norms).sum())
        else:
            unit = update / np.linalg.norm(update)
            update = max((gradients @ unit).mean(), 0) * unit
        weights = sets.weigh(method(5), sets.grams(gradients)[None])[0]
        np.testing.assert_allclose(gradients.T @ weights, update, rtol=1e-3, atol=1e-5)


def test_config_is_0_where_the_projections_add_up_to_less():
    gradients = of_angles([0, 180 - 41.4096, 180 + 41.4096], [10, 1, 1])
    u, norms = pseudo_inverse(gradients)
    assert (gradients @ (gradients.T @ (u / norms))).sum() < -1
    weights = sets.weigh(mtl.config(3), sets.grams(gradients)[None])[0]
    np.testing.assert_array_equal(weights, 0)


@BOTH
def test_gradients_that_cancel_give_0_and_identical_ones_themselves(method):
    gradients = np.stack([of_angles([30, 210], [1, 3]), of_angles([20, 20], [3, 3])])
    weights = sets.weigh(method(2), sets.grams(gradients))
    np.testing.assert_array_equal(weights[0], 0)
    np.testing.assert_allclose(weights[1], 0.5, rtol=1e-6)


@BOTH
def test_rounding_errors_of_gradients_that_cancel_have_no_direction(method):
    """Three at 120 degrees of each other, in random planes: C 1 is 0 only up to rounding."""
    rng = np.random.default_rng(0)
    planes = np.linalg.qr(rng.normal(size=(50, 20, 2)))[0]
    gradients = of_angles([0, 120, 240], [1, 1, 1]) @ planes.swapaxes(1, 2)
    gradients *= rng.uniform(0.1, 10, size=(50, 3, 1))
    np.testing.assert_array_equal(sets.weigh(method(3), sets.grams(gradients)), 0)


@BOTH
def test_direction_does_not_depend_on_the_norms(method):
    gradients = sets.draw([sets._random], 5)
    scales = 10 ** np.random.default_rng(0).uniform(-3, 3, size=(20, 5, 1))
    directions = []
    for g in (gradients, scales * gradients):
        update = np.einsum("nk,nkp->np", sets.weigh(method(5), sets.grams(g)), g)
        directions.append(update / np.linalg.norm(update, axis=1, keepdims=True))
    np.testing.assert_allclose(directions[0], directions[1], atol=1e-4)
