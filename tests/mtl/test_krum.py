"""Krum on gradients whose distances are known."""

import gradients as sets
import jax
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats


def of_points(points, **settings):
    """Weights for gradients of two numbers each."""
    points = np.array(points, float)
    return sets.weigh(mtl.krum(len(points), **settings), sets.grams(points)[None])[0]


CLUSTER = [(10, 0), (11, 0), (12, 1), (9, 1), (10, 2)]


def test_an_outlier_is_never_selected():
    """The middle one is nearest to its neighbours; the outlier has the largest gradient."""
    weights = of_points([*CLUSTER, (-1e3, 500)], outliers=1)
    np.testing.assert_array_equal(weights, [1, 0, 0, 0, 0, 0])
    several = of_points([*CLUSTER, (-1e3, 500)], outliers=1, selected=5)
    np.testing.assert_allclose(several, [0.2] * 5 + [0])


def test_distances_are_squared():
    """Two neighbours at 0 and 3 score 0 + 9, two at 2 score 4 + 4: the sums are 3 and 4."""
    points = [(5, 5), (5, 5), (50, 5), (52, 5), (50, 7), (5, 8)]
    np.testing.assert_array_equal(of_points(points, outliers=2), [0, 0, 1, 0, 0, 0])


def test_two_nearest_neighbours_share_the_weight():
    np.testing.assert_array_equal(of_points([(1, 0), (5, 0), (6, 0)]), [0, 0.5, 0.5])
    np.testing.assert_array_equal(of_points([(1, 0), (5, 0)]), [0.5, 0.5])


def test_nearly_equal_gradients_are_told_from_others():
    """Distances of 1e-3 of the norm, where the differences of squares cancel."""
    weights = of_points([(1000, 0), (1000, 1), (1000, -1), (1000, 30), (0, 1)], outliers=1)
    np.testing.assert_array_equal(weights, [1, 0, 0, 0, 0])


def test_absent_tasks_and_tasks_without_gradient_do_not_count():
    points = np.array([(0, 0), (0.1, 0), (10, 0), (11, 0), (12, 1)])
    stats = TaskStats(None, np.float32(points @ points.T), np.float32([1, 0, 1, 1, 1]))
    weights, _ = jax.jit(mtl.krum(5, selected=5).weigh)(stats, ())
    np.testing.assert_allclose(weights, [0, 0, 1 / 3, 1 / 3, 1 / 3])
    # Three are left: one neighbour each, and both of the nearest pair are selected.
    weights, _ = jax.jit(mtl.krum(5).weigh)(stats, ())
    np.testing.assert_array_equal(weights, [0, 0, 0.5, 0.5, 0])


@pytest.mark.parametrize(
    "settings", [{"outliers": 3}, {"outliers": -1}, {"selected": 6}, {"selected": 0}]
)
def test_numbers_out_of_range_are_errors(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        mtl.krum(5, **settings)
