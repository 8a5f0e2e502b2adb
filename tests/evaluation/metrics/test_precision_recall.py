import tracemalloc

import numpy as np
import pytest

from ant_jax.evaluation import precision_and_recall
from ant_jax.evaluation.metrics import precision_recall as module


def _brute_force(real, fake, k):
    def distances(a, b):
        return np.array([[np.sum((x - y) ** 2) for y in b] for x in a.astype(np.float64)])

    def covered(a, b):
        # Place 0 is the point itself.
        return np.mean((distances(a, b) <= np.sort(distances(b, b), axis=1)[:, k]).any(axis=1))

    return covered(fake, real), covered(real, fake)


def _gaussians(rng, n, m):
    return rng.standard_normal((n, 5)), 0.8 * rng.standard_normal((m, 5)) + 0.2


def _far_from_the_origin(rng, n, m):
    return tuple((1e4 + x).astype(np.float32) for x in _gaussians(rng, n, m))


def _lattice(rng, n, m):
    return rng.integers(0, 3, (n, 3)).astype(np.float32), rng.integers(0, 4, (m, 3)) * 1.0


def _copies(rng, n, m):
    real = 10 + rng.standard_normal((n, 4))
    return np.concatenate([real, real[: n // 2]]), real[rng.integers(0, n, m)]


def _two_scales(rng, n, m):
    """Clusters whose inner distances are below the rounding of their outer ones."""
    centres = 1e3 * rng.standard_normal((3, 4))
    return tuple(
        centres[rng.integers(0, 3, s)] + 1e-9 * rng.standard_normal((s, 4)) for s in (n, m)
    )


@pytest.mark.parametrize("draw", [_gaussians, _far_from_the_origin, _lattice, _copies, _two_scales])
@pytest.mark.parametrize(("n", "m", "k"), [(30, 41, 3), (40, 20, 1), (12, 33, 5)])
def test_brute_force_exactly(draw, n, m, k, monkeypatch):
    # Several blocks, with and without a rest.
    monkeypatch.setattr(module, "_BLOCK_SIZE", 150)
    monkeypatch.setattr(module, "_CHUNK", 4)
    real, fake = draw(np.random.default_rng(n), n, m)
    assert precision_and_recall(real, fake, k) == _brute_force(real, fake, k)


def test_by_hand():
    # Real balls reach 1 far and are closed; those of the others reach 1.5, 0.5, 0.5 and 5.5.
    real, fake = np.array([[0.0], [1], [2], [3]]), np.array([[2.5], [4], [4.5], [10]])
    assert precision_and_recall(real, fake, k=1) == (0.5, 0.75)


def test_equal_distances_in_high_dimension_are_equal():
    """Mirrored neighbours lie on the rim; all numbers are exact but the set's mean."""
    rng = np.random.default_rng(0)
    offsets = rng.integers(-1024, 1025, (20, 2048)) / 1024
    centres = 100.0 * np.arange(20)[:, None]
    real = np.concatenate([centres + np.zeros(2048), centres + offsets])
    assert precision_and_recall(real, centres - offsets, k=1) == (1, 1)


def test_a_point_just_outside_in_high_dimension():
    v = np.random.default_rng(0).standard_normal(2048)
    # The last two real points are each other's neighbours, far away.
    real = np.stack([0 * v, v, 0 * v + 100, 0 * v + 100.001])
    assert precision_and_recall(real, np.stack([-v, -v * (1 + 1e-14)]), k=1).precision == 0.5


def test_sets_of_copies():
    point, others = np.full((6, 3), 0.1), np.random.default_rng(0).standard_normal((8, 3))
    # A ball of radius 0 still holds its own point.
    assert precision_and_recall(point, point) == (1, 1)
    assert precision_and_recall(others, point).recall == 0
    assert precision_and_recall(np.concatenate([others, point[:1]]), point) == (1, 1 / 9)


def test_the_sets_change_roles():
    real, fake = _gaussians(np.random.default_rng(0), 50, 40)
    precision, recall = precision_and_recall(real, fake)
    assert precision != recall
    assert precision_and_recall(fake, real) == (recall, precision)


@pytest.mark.parametrize("collapsed", [False, True])
def test_nearly_all_is_decided_by_the_matrix_product(collapsed, monkeypatch):
    pairs = []
    differences = module._differences
    monkeypatch.setattr(
        module, "_differences", lambda *args: pairs.append(len(args[2])) or differences(*args)
    )
    real, fake = _gaussians(np.random.default_rng(0), 150, 100)
    precision_and_recall(real, fake[:1].repeat(100, axis=0) if collapsed else fake)
    # The radii themselves.
    assert sum(pairs) == 3 * (150 + 100)


def test_memory_is_bounded_by_the_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_SIZE", 2**14)
    real, fake = np.random.default_rng(0).standard_normal((2, 1000, 2))
    tracemalloc.start()
    precision_and_recall(real, fake)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 8 * 2**14 < 8 * 1000**2 / 4


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        (np.zeros((5, 2)), np.zeros((5, 3)), 3, "width 2,.*width 3"),
        (np.zeros((3, 2)), np.zeros((5, 2)), 3, "more than 3 real features, got 3"),
        (np.zeros((5, 2)), np.zeros((1, 2)), 1, "more than 1 fake features, got 1"),
        (np.zeros(5), np.zeros((5, 2)), 3, r"real features must be .*\(5,\)"),
        (np.zeros((5, 2)), np.zeros((5, 0)), 3, r"fake features must be .*\(5, 0\)"),
        (np.zeros((5, 2)), np.full((5, 2), np.inf), 3, "fake features are not finite"),
        (np.zeros((5, 2)), np.zeros((5, 2)), 0, "k must be positive"),
    ],
)
def test_errors(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        precision_and_recall(real, fake, k)
