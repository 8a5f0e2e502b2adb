"""Tasks with several blocks of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl.backward import FORMS

# Task 0 is absent, and the blocks of task 2 are apart.
K, N, B = 4, 6, 24
TASK_OF_BLOCK = np.array([2, 1, 1, 2, 3, 2])
BLOCKS = np.arange(B) * N // B
_rng = np.random.default_rng(0)
PARAMS = np.float32(_rng.normal(size=5))
BATCH = {"x": np.float32(_rng.normal(size=(B, 5))), "y": np.float32(_rng.normal(size=B))}


def losses_fn(params, batch):
    return (jnp.tanh(batch["x"] @ params) - batch["y"]) ** 2


def backward(weighting, tasks, batch=BATCH, form="masked", k=K):
    state = mtl.init_combine(getattr(mtl, weighting)(K))
    method = getattr(mtl, weighting)(K)
    if k != K:
        # Traced, as in a step.
        method = mtl.pooled(method, jnp.asarray(TASK_OF_BLOCK))
    return mtl.backward(losses_fn, PARAMS, batch, method, state, tasks=tasks, form=form)


@pytest.mark.parametrize("name", ["db_mtl", "uncertainty"])
def test_blocks_of_a_task_are_the_task(name):
    batch = BATCH | {"y": BATCH["y"].copy()}
    batch["y"][-1] = np.nan

    def both():
        pooled = lambda batch, form="masked": mtl.by_task(
            backward(name, BLOCKS, batch, form, N), TASK_OF_BLOCK, K
        )
        found = [pooled(BATCH, form) for form in (FORMS if name == "db_mtl" else ["masked"])]
        return backward(name, TASK_OF_BLOCK[BLOCKS]), found, pooled(batch)

    want, found, damaged = jax.jit(both)()
    np.testing.assert_array_equal(want.counts, [0, 8, 12, 4])
    for each in found:
        assert jax.tree.structure(each) == jax.tree.structure(want)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), each, want
        )
    np.testing.assert_array_equal(np.isnan(damaged.losses), [False, False, True, False])
    assert np.isnan(damaged.state.weights[2])


def test_one_block_each_changes_no_bit():
    stats = mtl.TaskStats(np.float32([3, 1, 2]), np.float32(np.diag([3, 1, 2]) + 0.3), np.ones(3))
    seen = []

    def weigh(stats, state):
        seen.append(stats)
        return jnp.float32([0.3, 0.1, 0.7]), state

    method = mtl.pooled(mtl.Weighting(tuple, weigh, 3, frozenset()), np.arange(3))
    weights, _ = method.weigh(stats, ())
    np.testing.assert_array_equal(weights, np.float32([0.3, 0.1, 0.7]))
    jax.tree.map(np.testing.assert_array_equal, seen[0], stats)
