"""Linear scalarisation and vanilla."""

import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl, settings
from ant_jax.mtl import TaskStats


def test_linear_is_the_mean_over_the_present():
    weigh = mtl.linear(4).weigh
    for present in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]):
        weights, state = weigh(TaskStats(None, None, jnp.float32(present)), ())
        np.testing.assert_array_equal(weights, np.float32(present) / max(sum(present), 1))
        assert weights.dtype == np.float32
        assert state == ()


def test_linear_with_fixed_weights():
    weigh = mtl.linear(3, (0.5, 0.0, 2.0)).weigh
    weights, _ = weigh(TaskStats(None, None, jnp.array([4, 1, 2])), ())
    np.testing.assert_array_equal(weights, np.float32([0.5, 0, 2]))
    weights, _ = weigh(TaskStats(None, None, jnp.array([4, 1, 0])), ())
    np.testing.assert_array_equal(weights, np.float32([0.5, 0, 0]))


@pytest.mark.parametrize(
    "weights", [(1.0, 2.0), (1.0, -1.0, 1.0), (1.0, np.nan, 1.0), (0.0, 0.0, 0.0), 1.0]
)
def test_fixed_weights_that_can_not_be(weights):
    with pytest.raises(ValueError, match="weights must be 3 finite numbers >= 0, not all 0"):
        mtl.linear(3, weights)


def test_what_a_setting_of_weights_may_be():
    setting = settings.settings_of(mtl.linear, {"k"})["weights"]
    for weights in ((), (0.3, 0.7), (0, 1)):
        assert setting.problem(weights) is None
    for weights in ((0, 0), (-1, 2), (True, 1), ("1", "2"), (float("nan"), 1), [1.0], "0.3,0.7"):
        assert "k numbers >= 0" in setting.problem(weights)


def test_vanilla_is_the_share_of_the_examples():
    weigh = mtl.vanilla(3).weigh
    for counts in ([2, 0, 6], [1, 1, 2], [0, 0, 0]):
        weights, state = weigh(TaskStats(None, None, jnp.float32(counts)), ())
        np.testing.assert_array_equal(weights, np.float32(counts) / max(sum(counts), 1))
        assert state == ()
