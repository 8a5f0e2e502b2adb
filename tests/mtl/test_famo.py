"""FAMO: the exact update, its first-order form, and how far they are apart."""

import jax
import jax.numpy as jnp
import numpy as np
from sequences import weigh_all, weigh_once

from ant_jax import mtl
from ant_jax.mtl.famo import exact_update, famo_weights, first_order_changes

K = 4
ALL = np.ones(K, bool)
# Losses before and after a step, and the weights, by TorchJD 0.18 in float64.
BEFORE = np.array(
    [
        [1.310227, 0.612595, 0.17785, 0.131403],
        [1.132887, 1.876638, 1.650122, 0.105203],
        [1.74004, 1.128776, 0.669453, 0.903106],
        [1.269232, 0.828987, 1.994699, 1.963587],
        [0.356683, 1.470828, 1.098173, 0.68946],
        [1.185907, 0.711552, 1.22917, 0.742031],
    ]
)
AFTER = np.array(
    [
        [1.307073, 0.618433, 0.173012, 0.129765],
        [1.13616, 1.696537, 1.629592, 0.0969],
        [1.571949, 1.032733, 0.656381, 0.882933],
        [1.246722, 0.810795, 1.960018, 1.85887],
        [0.34181, 1.480739, 1.111445, 0.650116],
        [1.123047, 0.716414, 1.139759, 0.723319],
    ]
)
WEIGHTS = np.array(
    [
        [0.048835503, 0.104450076, 0.359772796, 0.486941625],
        [0.07999912, 0.048293797, 0.052244566, 0.819462517],
        [0.149398934, 0.222869092, 0.364905794, 0.26282618],
        [0.27385108, 0.398638711, 0.166050702, 0.161459507],
        [0.498129467, 0.113108086, 0.155997463, 0.232764985],
        [0.202673248, 0.315520352, 0.192260683, 0.289545718],
    ]
)
LOGITS = [0.04467506937570961, -0.015109715166166302, 0.038780939820943494, -0.07093637968420233]


def test_the_exact_update_is_that_of_torchjd():
    update, weigh = jax.jit(exact_update), jax.jit(famo_weights)
    state = mtl.famo(K).init()
    for before, after, weights in zip(BEFORE, AFTER, WEIGHTS, strict=True):
        np.testing.assert_allclose(weigh(state, before, ALL), weights, rtol=1e-4)
        state = update(state, before, after, ALL)
    np.testing.assert_allclose(state.logits, LOGITS, rtol=1e-3)


class Quadratic:
    """K losses of 6 parameters, (x - c)' A (x - c) / 2 + b, in float64."""

    def __init__(self):
        rng = np.random.default_rng(0)
        a = rng.normal(size=(K, 6, 6))
        self.a, self.c = a @ a.swapaxes(1, 2) / 6, rng.normal(size=(K, 6))
        self.b = rng.uniform(0.1, 2, size=K)

    def losses(self, x):
        return np.einsum("ki,kij,kj->k", x - self.c, self.a, x - self.c) / 2 + self.b

    def jacobian(self, x):
        return np.einsum("kij,kj->ki", self.a, x - self.c)


def test_the_first_order_change_converges_to_the_true_one():
    """The error is quadratic in the step size, so it vanishes relative to the change."""
    problem, x = Quadratic(), np.random.default_rng(1).normal(size=6)
    losses, jacobian = problem.losses(x), problem.jacobian(x)
    gram = jacobian @ jacobian.T
    weights = np.asarray(famo_weights(mtl.famo(K).init(), losses, ALL), float)
    relative = []
    for eta in (0.1, 0.01, 0.001):
        after = problem.losses(x - eta * weights @ jacobian)
        true = np.log(losses / after)
        found = first_order_changes(jnp.float32(losses), jnp.float32(gram), weights, ALL, eta)
        relative.append(np.abs(found - true).max() / np.abs(true).max())
    assert relative[2] < 2e-3
    np.testing.assert_allclose(relative[1:], np.divide(relative[:-1], 10), rtol=0.3)


def test_a_run_by_first_order_changes_is_near_one_by_exact_ones():
    """Gradient descent on the quadratic losses, in steps that are small against the curvature."""
    problem, eta, n = Quadratic(), 0.003, 100
    weighting = mtl.famo(K, step_size=eta)
    weigh, update = jax.jit(weighting.weigh), jax.jit(exact_update)
    x = y = np.random.default_rng(1).normal(size=6)
    first = exact = weighting.init()
    for _ in range(n):
        jacobian = problem.jacobian(x)
        stats = mtl.TaskStats(
            np.float32(problem.losses(x)), np.float32(jacobian @ jacobian.T), np.ones(K)
        )
        weights, first = weigh(stats, first)
        x = x - eta * np.asarray(weights, float) @ jacobian
        before = problem.losses(y)
        weights = np.asarray(famo_weights(exact, before, ALL), float)
        y = y - eta * weights @ problem.jacobian(y)
        exact = update(exact, before, problem.losses(y), ALL)
    assert np.ptp(exact.logits) > 0.5
    np.testing.assert_allclose(first.logits, exact.logits, atol=0.05)


GRAM = np.array([[4.0, 1, 0, 0.5], [1, 1, 0.3, 0], [0, 0.3, 2, -0.5], [0.5, 0, -0.5, 1]])


def test_the_update_is_the_exact_one_for_losses_that_fell_by_the_first_order_change():
    losses, eta = np.array([1.0, 0.5, 2.0, 0.1]), 0.01
    weighting = mtl.famo(K, eta, 0.05, 0.1)
    state = weighting.init()._replace(logits=jnp.float32([0.2, -0.3, 0, 1]))
    weights, after = jax.jit(weighting.weigh)(
        mtl.TaskStats(jnp.float32(losses), jnp.float32(GRAM), np.ones(K)), state
    )
    fallen = losses * np.exp(-eta * (GRAM @ np.asarray(weights, float)) / losses)
    expected = jax.jit(exact_update)(state, losses, fallen, ALL, 0.05, 0.1)
    np.testing.assert_allclose(after.logits, expected.logits, rtol=1e-4)
    np.testing.assert_allclose(after.adam[0].mu, expected.adam[0].mu, rtol=1e-3)


def test_only_the_weight_decay_sees_the_size_of_the_step():
    rng = np.random.default_rng(0)
    losses = np.float32(rng.uniform(0.5, 2, size=(60, K)))

    @jax.jit
    @jax.vmap
    def run(eta, decay):
        weighting = mtl.famo(K, eta, weight_decay=decay)

        def step(state, row):
            stats = mtl.TaskStats(row, jnp.float32(GRAM), jnp.ones(K))
            weights, state = weighting.weigh(stats, state)
            return state, weights

        return jax.lax.scan(step, weighting.init(), losses)[1]

    eta = np.float32([0.01, 0.0003, 0.3] * 2 + [0.3])
    decay = np.float32([0, 0, 0, 1e-3, 3e-5, 3e-2, 1e-3])
    weights = np.asarray(run(eta, decay))
    np.testing.assert_allclose(weights[1:3], weights[[0, 0]], rtol=1e-3)
    np.testing.assert_allclose(weights[4:6], weights[[3, 3]], rtol=1e-3)
    assert np.abs(weights[6] / weights[3] - 1).max() > 0.01


def test_without_logits_all_weighted_losses_are_equal_and_the_weights_add_up_to_1():
    losses = np.array([1.0, 0.5, 2.0, 0.1])
    weights = weigh_once(mtl.famo(K), losses, GRAM)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(weights * losses, (weights * losses)[0], rtol=1e-5)


def test_a_loss_that_falls_faster_than_the_others_loses_weight():
    gram = np.diag([4.0, 1, 1, 1])
    weights, state = weigh_all(mtl.famo(K), np.ones(K), gram, length=20)
    assert weights[-1, 0] < weights[0, 0] == 0.25 and state.logits[0] < 0
    assert (state.logits[1:] > 0).all()


def test_a_task_without_gradient_is_left_out():
    gram = np.diag([0.0, 1, 2, 3])
    weights, state = weigh_all(mtl.famo(K), np.ones(K), gram, length=20)
    assert not weights[:, 0].any() and state.logits[0] == 0
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
