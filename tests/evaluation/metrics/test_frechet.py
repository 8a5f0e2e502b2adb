import numpy as np
import pytest
import scipy.linalg

from ant_jax.evaluation import covariance, frechet_distance, merge, moments


def _gaussian(seed, d, rank=None):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((d, rank or d))
    return rng.standard_normal(d), root @ root.T


def test_diagonal_covariances_have_a_closed_form():
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 2.0])
    mean = np.array([1.0, -2.0, 0.5])
    expected = 1 + 4 + 0.25 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    got = frechet_distance(mean, np.diag(a), np.zeros(3), np.diag(b))
    assert got == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_have_a_closed_form():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    a, b = np.arange(1.0, 7.0), np.arange(6.0, 0.0, -1.0) ** 2
    zero = np.zeros(6)
    got = frechet_distance(zero, (q * a) @ q.T, zero, (q * b) @ q.T)
    assert got == pytest.approx(np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_general_covariances_agree_with_the_matrix_square_root(seed):
    (m1, s1), (m2, s2) = _gaussian(seed, 8), _gaussian(seed + 10, 8)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(expected, rel=1e-8)


def test_zero_between_a_gaussian_and_itself_even_if_singular():
    for rank in (20, 3):
        mean, cov = _gaussian(0, 20, rank)
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-10


def test_rank_deficient_covariances():
    # Gaussians on orthogonal axes share nothing; on a common axis they are one-dimensional ones.
    d, zero = 30, np.zeros(30)
    first, second = np.zeros((d, d)), np.zeros((d, d))
    first[0, 0], second[1, 1] = 4.0, 9.0
    assert frechet_distance(zero, first, zero, second) == pytest.approx(13, abs=1e-10)
    direction = np.random.default_rng(0).standard_normal(d)
    direction /= np.linalg.norm(direction)
    line = np.outer(direction, direction)
    assert frechet_distance(zero, 4 * line, zero, 9 * line) == pytest.approx(1, abs=1e-6)


def test_invariant_under_rotations():
    (m1, s1), (m2, s2) = _gaussian(1, 7, 3), _gaussian(2, 7, 5)
    q = np.linalg.qr(np.random.default_rng(3).standard_normal((7, 7)))[0]
    rotated = frechet_distance(q @ m1, q @ s1 @ q.T, q @ m2, q @ s2 @ q.T)
    assert rotated == pytest.approx(frechet_distance(m1, s1, m2, s2), rel=1e-6)


def test_moments_are_numpys_mean_and_covariance():
    x = np.random.default_rng(0).standard_normal((50, 4))
    statistics = moments(x)
    assert statistics.count == 50
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(covariance(statistics), np.cov(x, rowvar=False), atol=1e-13)


def test_streaming_equals_one_batch_even_far_from_zero():
    x = 1e4 + np.random.default_rng(0).standard_normal((101, 5))
    total = moments(x[:1])
    for part in (x[1:2], x[2:60], x[60:]):
        total = merge(total, moments(part))
    assert total.count == 101
    np.testing.assert_allclose(total.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance(total), np.cov(x, rowvar=False), atol=1e-10)


def test_errors():
    eye, zero = np.eye(2), np.zeros(2)
    with pytest.raises(ValueError, match="at least 2"):
        covariance(moments(np.ones((1, 3))))
    with pytest.raises(ValueError, match="not finite"):
        moments(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="shape"):
        moments(np.ones(3))
    with pytest.raises(ValueError, match="shape"):
        moments(np.ones((0, 3)))
    with pytest.raises(ValueError, match="widths 2 and 3"):
        merge(moments(np.ones((2, 2))), moments(np.ones((2, 3))))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        frechet_distance(zero, eye, np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        frechet_distance(zero, eye, zero, np.ones((2, 1)))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(zero, eye, zero, eye * np.nan)
