"""Gradient cosine similarity in closed form."""

import gradients as sets
import jax
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats

# Cosines with the one in the middle: 0.6, -0.8, 0.
GRADIENTS = np.array([(6.0, 8.0), (2.0, 0.0), (-4.0, 3.0), (0.0, 5.0)])


@pytest.mark.parametrize(("weighted", "first"), [(True, 0.6), (False, 1)])
def test_the_cosine_with_the_main_gradient_is_the_weight(weighted, first):
    weights = sets.weigh(mtl.gcosim(4, 1, weighted), sets.grams(GRADIENTS)[None])[0]
    np.testing.assert_allclose(4 * weights, [first, 1, 0, 0], rtol=1e-6)


def test_the_main_task_never_has_less_progress_than_alone():
    gram = sets.grams(sets.draw(sets.REGULAR + sets.OPPOSED, 5))
    weights = sets.weigh(mtl.gcosim(5, 2), gram)
    progress = 5 * np.einsum("nj,nj->n", gram[:, 2], weights)
    assert (progress >= gram[:, 2, 2] * (1 - 1e-6)).all()


def test_without_the_main_task_there_is_no_update():
    gram = np.float32(sets.grams(GRADIENTS))
    weigh = jax.jit(mtl.gcosim(4, 1).weigh)
    weights, _ = weigh(TaskStats(None, gram, np.float32([1, 0, 1, 1])), ())
    np.testing.assert_array_equal(weights, 0)
    # An absent auxiliary task is not counted.
    weights, _ = weigh(TaskStats(None, gram, np.float32([1, 1, 0, 0])), ())
    np.testing.assert_allclose(weights, [0.3, 0.5, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("main", [-1, 4])
def test_main_is_one_of_the_tasks(main):
    with pytest.raises(ValueError, match="main must be an integer >= 0 and <= 3"):
        mtl.gcosim(4, main)
