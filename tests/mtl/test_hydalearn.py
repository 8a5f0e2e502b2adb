"""HydaLearn from the Gram matrix and by real steps."""

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inspection import largest_array, run_example

from ant_jax import mtl
from ant_jax.mtl import TaskStats

GRAM = np.float32([[4, 2, -1], [2, 9, 6], [-1, 6, 16]])


def weigh(gram, main=0, counts=None):
    k = len(gram)
    stats = TaskStats(
        None, jnp.asarray(gram, jnp.float32), jnp.ones(k) if counts is None else counts
    )
    return np.asarray(mtl.hydalearn(k, main).weigh(stats, ())[0])


@pytest.mark.parametrize(
    ("main", "gains"), [(0, [4, 2, 0]), (1, [2, 9, 6]), (2, [0, 6, 16]), (-1, [5, 17, 21])]
)
def test_weights_are_in_the_ratio_of_the_gains(main, gains):
    np.testing.assert_allclose(weigh(GRAM, main), np.array(gains) / np.sum(gains), rtol=1e-6)


def test_an_absent_task_counts_neither_as_main_task_nor_in_the_mean():
    without_main = weigh(GRAM, 0, np.float32([0, 1, 1]))
    np.testing.assert_array_equal(without_main, 0)
    in_mean = weigh(GRAM, -1, np.float32([1, 1, 0]))
    np.testing.assert_allclose(in_mean, np.float32([6, 11, 0]) / 17, rtol=1e-6)


def test_equal_gradients_give_that_gradient():
    np.testing.assert_allclose(weigh(np.full((4, 4), 1e-15)), 0.25, rtol=1e-6)


def test_the_mean_does_not_depend_on_the_labels():
    order = [2, 0, 1]
    np.testing.assert_allclose(weigh(GRAM[order][:, order], -1), weigh(GRAM, -1)[order], rtol=1e-6)


def test_the_update_does_not_raise_the_main_loss_to_first_order():
    k = 5
    grams = sets.grams(sets.draw(sets.REGULAR + sets.OPPOSED, k, n=5)).astype(np.float32)
    stats = TaskStats(None, grams, np.ones((len(grams), k), np.float32))
    for main in (-1, 2):
        each = jax.jit(jax.vmap(lambda stats: mtl.hydalearn(k, main).weigh(stats, ())[0]))  # noqa: B023
        weights = np.asarray(each(stats), np.float64)
        progress = np.einsum("ni,nij->nj", weights, grams)
        progress = progress.mean(1) if main == -1 else progress[:, main]
        diagonals = np.diagonal(grams, axis1=1, axis2=2)
        assert (progress >= -1e-6 * diagonals.max(1)).all()
        assert np.all((weights >= 0) & (weights <= 1))


@pytest.mark.parametrize("main", [3, -2])
def test_a_main_task_that_does_not_exist_is_an_error(main):
    with pytest.raises(ValueError, match="main must be an integer >= -1 and <= 2"):
        mtl.hydalearn(3, main)


def network(rng, inputs=5, width=7, k=3, n=11, dtype=np.float64):
    """Task losses of a small network; the targets of the last task oppose those of the first."""
    x, y = rng.normal(size=(n, inputs)).astype(dtype), rng.normal(size=(n, k)).astype(dtype)
    y[:, -1] = -y[:, 0]
    params = {"in": rng.normal(size=(inputs, width)), "out": rng.normal(size=(width, 1)) / 3}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)

    def task_losses(params):
        return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2, 0)

    return task_losses, params


def test_real_steps_have_the_weights_of_the_gram_matrix_in_the_limit():
    """The error of a forward difference is of first order in the step."""
    with jax.enable_x64(True):
        task_losses, params = network(np.random.default_rng(3))
        jacobian = jax.jit(jax.jacrev(task_losses))(params)
        rows = np.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(jacobian)], 1)
        gains = rows @ rows[0]
        limit = np.maximum(gains, 0) / np.maximum(gains, 0).sum()
        np.testing.assert_allclose(weigh(rows @ rows.T), limit, rtol=1e-5)
        assert 0 < (limit > 0).sum() < 3

        rates = 2.0 ** -np.arange(4, 16)
        main_loss = lambda params: task_losses(params)[0]
        found = jax.jit(
            lambda rates: jax.lax.map(
                lambda rate: mtl.lookahead_weights(task_losses, main_loss, params, rate), rates
            )
        )
        weights, exact = map(np.asarray, found(rates))
    errors = np.abs(weights - limit).max(1)
    orders = np.log2(errors[:-1] / errors[1:])
    np.testing.assert_allclose(orders[-6:], 1, atol=0.02)
    assert errors[-1] < 1e-4
    np.testing.assert_allclose(exact[-1] / rates[-1], gains, rtol=1e-3)


def test_gains_are_those_of_explicit_steps_also_of_a_metric():
    rng = np.random.default_rng(1)
    task_losses, params = network(rng, dtype=np.float32)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    # The share of wrong signs: without a derivative, of other examples.
    errors = lambda params: jnp.mean(jnp.tanh(x @ params["in"]) @ params["out"] < x[:, :1])

    @jax.jit
    def by_steps(params):
        jacobian = jax.jacrev(task_losses)(params)
        ahead = lambda i: jax.tree.map(lambda p, g: p - 0.2 * g[i], params, jacobian)
        explicit = jnp.stack([errors(params) - errors(ahead(i)) for i in range(3)])
        return mtl.lookahead_weights(task_losses, errors, params, 0.2), explicit

    (weights, gains), explicit = by_steps(params)
    np.testing.assert_allclose(gains, explicit, atol=2e-6)
    assert (np.asarray(gains) != 0).any()
    positive = np.maximum(gains, 0)
    np.testing.assert_allclose(weights, positive / max(positive.sum(), 1e-9), rtol=1e-5)


def test_steps_hold_one_gradient_at_a_time():
    task_losses, params = network(np.random.default_rng(0), 40, 50, 6, dtype=np.float32)
    steps = lambda params: mtl.lookahead_weights(task_losses, task_losses_of_main, params, 0.1)
    task_losses_of_main = lambda params: task_losses(params)[0]
    assert largest_array(steps, params) == 40 * 50
    assert largest_array(jax.jacrev(task_losses), params) >= 6 * 40 * 50


def test_the_example_of_the_docstring_runs():
    weights, gradient = run_example(mtl.lookahead_weights, "weights", "gradient")
    assert gradient.shape == (2, 2)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
