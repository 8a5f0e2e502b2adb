"""Aligned-MTL against its definition in float64."""

import gradients as sets
import numpy as np
import pytest

from ant_jax import mtl

SCALES = {"min": lambda s: s[0], "median": lambda s: s[(len(s) - 1) // 2], "rmse": np.mean}


def expected(gram, scale, rank):
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[-rank:], vectors[:, -rank:]
    mean = np.full(len(gram), 1 / len(gram))
    return vectors @ (np.sqrt(SCALES[scale](values) / values) * (vectors.T @ mean))


@pytest.mark.parametrize("scale", SCALES)
def test_orthogonal_gradients_in_closed_form(scale):
    """All get the length of the chosen one."""
    length = {"min": 1, "median": 2, "rmse": np.sqrt(30 / 4)}[scale]
    weights = sets.weigh(mtl.aligned_mtl(4, scale), np.diag([9.0, 1, 16, 4])[None])[0]
    np.testing.assert_allclose(weights, length / np.array([3, 1, 4, 2]) / 4, rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [20, 3])
def test_equals_the_definition(scale, p):
    """Also for five gradients in three dimensions."""
    gradients = sets.draw([sets._random], 5, p=p)
    gram = sets.grams(gradients)
    weights = sets.weigh(mtl.aligned_mtl(5, scale), gram)
    rank = min(5, p)
    for found, matrix in zip(weights, gram, strict=True):
        right = expected(matrix, scale, rank)
        np.testing.assert_allclose(found, right, atol=1e-4 * np.abs(right).max())
    if p == 20:
        squared = np.einsum("ni,nij,nj->n", weights, gram, weights)
        chosen = [SCALES[scale](np.linalg.eigvalsh(matrix)) for matrix in gram]
        np.testing.assert_allclose(squared, np.array(chosen) / 5, rtol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_a_direction_that_float32_does_not_resolve_does_not_count(scale):
    """Two gradients that differ by 1e-5 are one: the smallest eigenvalue is that of the third."""
    g = np.array([[1, 0, 0], [1, 1e-5, 0], [0, 0, 1]])
    weights = sets.weigh(mtl.aligned_mtl(3, scale), sets.grams(g)[None])[0]
    right = expected(g @ g.T, scale, rank=2)
    np.testing.assert_allclose(g.T @ weights, g.T @ right, atol=1e-5)


def test_identical_gradients_give_themselves_and_opposed_ones_0():
    gram = np.stack([np.full((3, 3), 5.0), np.zeros((3, 3)), np.zeros((3, 3))])
    gram[1, :2, :2] = [[4, -4], [-4, 4]]
    weights = sets.weigh(mtl.aligned_mtl(3), gram)
    np.testing.assert_allclose(weights[0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(weights[1:], 0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_weights_do_not_depend_on_the_scale_of_the_gradients(scale):
    gram = sets.grams(sets.draw([sets._random], 5))
    weights = sets.weigh(mtl.aligned_mtl(5), gram)
    np.testing.assert_allclose(sets.weigh(mtl.aligned_mtl(5), scale * gram), weights, rtol=1e-3)


def test_another_scale_is_an_error():
    with pytest.raises(ValueError, match="scale must be"):
        mtl.aligned_mtl(3, "mean")
