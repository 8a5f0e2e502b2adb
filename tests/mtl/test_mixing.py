"""PiKE, which chooses the share of each task in the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl.mixing import block_statistics, blocks_of

K, N, SIZE = 3, 12, 5
TASKS = np.array([0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
COUNTS = np.full(N, SIZE, np.float32)


def test_norms_and_variances_have_no_bias():
    """Gradients of examples with known mean and variance, in blocks of 5."""
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(K, 7)), np.array([0.5, 1.0, 3.0])
    draws = 4000
    noise = rng.normal(size=(draws, N, SIZE, 7)).mean(2)
    blocks = means[TASKS] + deviations[TASKS][:, None] * noise
    grams = np.float32(np.einsum("dbp,dcp->dbc", blocks, blocks))
    of = jax.jit(jax.vmap(lambda gram: block_statistics(gram, COUNTS, TASKS, K)))
    norms, variances = (np.asarray(each).mean(0) for each in of(grams))
    np.testing.assert_allclose(norms, (means**2).sum(1), rtol=0.02, atol=0.05)
    # The sum over the 7 entries.
    np.testing.assert_allclose(variances, 7 * deviations**2, rtol=0.02)


def test_shares_move_every_third_step_by_the_rule_of_the_paper():
    rng = np.random.default_rng(0)
    rate, noise = 0.3, 0.7
    weighting = mtl.pike(mtl.vanilla(K), rate, noise, blocks=4, every=3)
    rule, state = weighting.blocks, weighting.init()
    learn, tasks = jax.jit(rule.learn), jax.jit(rule.tasks)
    np.testing.assert_array_equal(tasks(state), np.arange(N) * K // N)
    shares, found = np.full(K, 1 / K), []
    for step in range(9):
        jacobian = rng.normal(size=(N, 20)) * (1 + TASKS[:, None])
        gram = jacobian @ jacobian.T
        found.append(block_statistics(gram, COUNTS, TASKS, K))
        state = learn(state, mtl.TaskStats(None, np.float32(gram), COUNTS), TASKS)
        if step % 3 == 2:
            norms, variances = np.mean(found[-3:], 0)
            shares = shares * np.exp(rate * norms - rate * noise * variances / (2 * N * SIZE))
            shares = shares / shares.sum()
        np.testing.assert_allclose(np.exp(state.log_shares), shares, rtol=1e-3, atol=2e-4)
    assert state.count == 9 and np.ptp(shares) > 0.05
    # The blocks follow the shares, and stay in the order of the tasks.
    counts = np.bincount(tasks(state), minlength=K)
    np.testing.assert_array_equal(counts, jax.jit(lambda each: blocks_of(each, N))(shares))
    assert (np.diff(tasks(state)) >= 0).all()


def test_a_share_can_come_back():
    weighting = mtl.pike(mtl.vanilla(2), 1.0, every=1)
    state, learn = weighting.init(), jax.jit(weighting.blocks.learn)
    tasks, counts = np.arange(8) // 4, np.ones(8, np.float32)
    long_first = np.kron(np.diag([1e4, 1]), np.ones((4, 4))).astype(np.float32)
    for gram in (long_first, long_first[::-1, ::-1]):
        state = learn(state, mtl.TaskStats(None, gram, counts), tasks)
        assert np.isfinite(state.log_shares).all()
    np.testing.assert_array_equal(np.bincount(weighting.blocks.tasks(state)), [2, 6])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_blocks_are_all_given_away(k):
    rng, of = np.random.default_rng(k), jax.jit(blocks_of, static_argnums=1)
    for n in (2 * k, 4 * k, 7 * k):
        np.testing.assert_array_equal(of(jnp.full(k, 1 / k), n), np.full(k, n // k))
        for _ in range(5):
            shares = rng.dirichlet(np.full(k, 0.3)).astype(np.float32)
            found = np.asarray(of(shares, n))
            assert found.sum() == n and found.min() >= 2
            assert np.abs(found - 2 - shares * (n - 2 * k)).max() < 1 + 1e-3


def test_rules_are_found_inside_other_wrappers():
    """Whatever the order of wrappers, the rules find their own part of the state."""
    levels = np.linspace(-1, 1, 4, dtype=np.float32)
    stats = mtl.TaskStats(None, np.eye(N, dtype=np.float32), COUNTS)
    pike = lambda method: mtl.pike(method, 0.5, every=1)
    learned = lambda method: mtl.level_uncertainty(method, 0.1)

    @functools.partial(jax.jit, static_argnames="weighting")
    def learned_by(weighting):
        state = weighting.blocks.learn(weighting.init(), stats, TASKS)
        gradient = weighting.levels.gradient(state, levels, np.ones(4, np.float32) * 3)
        state = weighting.levels.update(state, gradient)
        return weighting.blocks.tasks(state), weighting.levels.weights(state, levels)

    found = []
    for wrap in (
        lambda method: pike(learned(method)),
        lambda method: learned(pike(method)),
        lambda method: mtl.every(mtl.cr_mogm(learned(pike(method)), 0.9), 2),
    ):
        found.append(learned_by(weighting=wrap(mtl.linear(K))))
    for each in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, each, found[0])


def test_what_can_not_be():
    weighting = mtl.pike(mtl.vanilla(K), 1.0)
    with pytest.raises(ValueError, match=r"only mtl\.pooled does that"):
        mtl.combine(weighting)
    with pytest.raises(ValueError, match=r"only mtl\.pooled does that"):
        state, tasks = mtl.init_combine(weighting), np.zeros(3, int)
        mtl.backward(lambda p, x: x * p, 1.0, np.ones(3), weighting, state, tasks=tasks)
    with pytest.raises(ValueError, match="rate must be > 0 and noise >= 0, got 0 and 1"):
        mtl.pike(mtl.vanilla(K), 0)
    with pytest.raises(ValueError, match="blocks must be an integer >= 2, got 1"):
        mtl.pike(mtl.vanilla(K), 1.0, blocks=1)
    with pytest.raises(ValueError, match="tasks of blocks already"):
        mtl.pike(weighting, 1.0)
