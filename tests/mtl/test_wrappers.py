import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats

K = 4


def random_stats(rng, counts=None):
    g = rng.normal(size=(K, 20)) * 10 ** rng.uniform(-1, 1)
    counts = np.ones(K) if counts is None else counts
    return TaskStats(np.float32(rng.uniform(1, 9, K)), np.float32(g @ g.T), np.float32(counts))


def test_scaled_is_the_method_on_scaled_losses():
    rng = np.random.default_rng(0)
    stats, scale = random_stats(rng), np.float32([0.3, 2, 0.7, 1])
    seen = []

    def weigh(stats, state):
        seen.append(stats)
        return jnp.float32([1, 2, 3, 4]), state

    weighting = mtl.scaled(mtl.Weighting(tuple, weigh, K, frozenset({"losses", "gram"})), scale)
    weights, _ = weighting.weigh(stats, weighting.init())
    np.testing.assert_allclose(seen[0].losses, stats.losses * scale, rtol=1e-6)
    np.testing.assert_allclose(seen[0].gram, stats.gram * np.outer(scale, scale), rtol=1e-6)
    np.testing.assert_array_equal(seen[0].counts, stats.counts)
    np.testing.assert_allclose(weights, scale * [1, 2, 3, 4], rtol=1e-6)
    with pytest.raises(ValueError, match=r"scale must have shape \(4,\), got \(3,\)"):
        mtl.scaled(mtl.nash(K), jnp.ones(3))


def test_nash_does_not_see_a_scale():
    stats, nash = random_stats(np.random.default_rng(0)), mtl.nash(K)
    expected, _ = jax.jit(nash.weigh)(stats, nash.init())
    weights, _ = jax.jit(mtl.scaled(nash, [0.3, 2.0, 0.7, 1.0]).weigh)(stats, nash.init())
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_every_renews_each_third_call_and_keeps_the_state_in_between():
    rng = np.random.default_rng(0)
    plain, weighting = mtl.pcgrad(K), mtl.every(mtl.pcgrad(K), 3)
    weigh, alone = jax.jit(weighting.weigh), jax.jit(plain.weigh)
    state = weighting.init()
    for call in range(7):
        stats, before = random_stats(rng), state
        weights, state = weigh(stats, state)
        assert state.count == call + 1
        if call % 3 == 0:
            expected, _ = alone(stats, jnp.int32(call // 3))
            assert state.state == call // 3 + 1
        else:
            assert state.state == before.state
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        mtl.every(plain, 0)


def test_every_and_tasks_that_are_absent():
    """A task's weight is that of the last renewal at which it was present."""
    rng = np.random.default_rng(0)
    nash, weighting = mtl.nash(K), mtl.every(mtl.nash(K), 2)
    weigh = jax.jit(weighting.weigh)
    compiled = jax.jit(nash.weigh)
    alone = lambda stats: np.asarray(compiled(stats, nash.init())[0])
    # A renewal, without task 3.
    first = random_stats(rng, [1, 1, 1, 0])
    weights, state = weigh(first, weighting.init())
    np.testing.assert_allclose(weights, alone(first), rtol=1e-5)
    # None is due, but task 3 is here for the first time.
    second = random_stats(rng, [0, 1, 1, 1])
    weights, state = weigh(second, state)
    np.testing.assert_allclose(weights, alone(second), rtol=1e-5)
    # One is due, without task 1.
    third = random_stats(rng, [1, 0, 1, 1])
    _, state = weigh(third, state)
    # None is due: each task has its weight of the last renewal that it took part in.
    weights, _ = weigh(random_stats(rng, [1, 1, 0, 1]), state)
    expected = np.where([0, 1, 0, 0], alone(second), alone(third)) * [1, 1, 0, 1]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_clipped_bounds_the_norm_of_the_update_by_the_current_gram_matrix():
    rng = np.random.default_rng(0)
    inner = mtl.every(mtl.nash(K), 3)
    weighting = mtl.clipped(inner, 0.4)
    assert weighting.needs == {"gram"} == mtl.clipped(mtl.linear(K), 1.0).needs
    weigh, free = jax.jit(weighting.weigh), jax.jit(inner.weigh)
    state, clipped = weighting.init(), []
    for _ in range(9):
        stats = random_stats(rng)
        plain, _ = free(stats, state)
        weights, state = weigh(stats, state)
        norm = np.sqrt(plain @ stats.gram @ plain)
        clipped.append(norm > 0.4)
        np.testing.assert_allclose(weights, plain * min(1, 0.4 / norm), rtol=1e-4)
    assert any(clipped) and not all(clipped)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, np.nan])
def test_a_norm_that_can_not_be(max_norm):
    with pytest.raises(ValueError, match="max_norm must be > 0"):
        mtl.clipped(mtl.nash(K), max_norm)


def test_cr_mogm_is_an_exponential_average_of_each_task_s_weights():
    rng = np.random.default_rng(0)
    nash, weighting = mtl.nash(K), mtl.cr_mogm(mtl.nash(K), 0.8)
    weigh, alone = jax.jit(weighting.weigh), jax.jit(nash.weigh)
    state, mean, known = weighting.init(), np.zeros(K), np.zeros(K, bool)
    for counts in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]):
        stats, present = random_stats(rng, counts), np.array(counts) > 0
        found = np.asarray(alone(stats, nash.init())[0])
        mean = np.where(present, np.where(known, 0.8 * mean + 0.2 * found, found), mean)
        known |= present
        weights, state = weigh(stats, state)
        np.testing.assert_allclose(weights, np.where(present, mean, 0), rtol=1e-4)
    for decay in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="decay must be >= 0 and < 1"):
            mtl.cr_mogm(nash, decay)
