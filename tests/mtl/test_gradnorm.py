"""GradNorm and DB-MTL: rules on losses and norms of gradients."""

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import weigh_all, weigh_once

from ant_jax import mtl

NORMS = np.array([0.2, 1.0, 3.0])


def gram(norms=NORMS):
    """Any cosines: the rules see the norms alone."""
    cosines = 0.7 * np.eye(3) + 0.3
    return norms[:, None] * cosines * norms


def test_gradnorm_moves_its_logits_along_the_gradient_of_the_paper_s_objective():
    """The targets are constants; Adam's first moment after one step is a tenth of the gradient.

    With alpha = 1 the norm of task 1 would be above its target, not below it.
    """
    alpha, first, losses = 0.7, np.array([1.0, 2.0, 0.5]), np.array([0.9, 0.9, 0.825])
    weighting = mtl.gradnorm(3, alpha)
    weigh = jax.jit(weighting.weigh)
    stats = lambda losses: mtl.TaskStats(np.float32(losses), np.float32(gram()), np.ones(3))
    _, state = weigh(stats(first), weighting.init())
    logits = jnp.array([0.3, -0.2, 0.1])
    state = state._replace(logits=logits, adam=weighting.init().adam)
    weights, after = weigh(stats(losses), state)
    np.testing.assert_allclose(weights, jax.nn.softmax(logits), rtol=1e-6)
    np.testing.assert_array_equal(after.first, np.float32(first))

    ratio = losses / first
    rate = ratio / ratio.mean()

    def objective(logits):
        lengths = jax.nn.softmax(logits) * NORMS / NORMS.max()
        return jnp.abs(lengths - jax.lax.stop_gradient(lengths.mean()) * rate**alpha).sum()

    np.testing.assert_allclose(
        after.adam[0].mu, 0.1 * jax.jit(jax.grad(objective))(logits), rtol=1e-5
    )


def test_gradnorm_starts_at_the_mean_and_makes_the_norms_equal():
    weights, _ = weigh_all(mtl.gradnorm(3, learning_rate=0.01), np.ones(3), gram(), length=1500)
    np.testing.assert_allclose(weights[0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    lengths = weights[-100:].mean(0) * NORMS
    np.testing.assert_allclose(lengths / lengths.mean(), 1, atol=0.03)


def test_gradnorm_gives_a_slow_task_a_longer_gradient():
    """Once losses have fallen to these parts of the first, the norms have the rates' relations."""
    rest = np.array([0.2, 0.4, 0.6])
    losses = np.concatenate([np.full((1, 3), 5.0), np.broadcast_to(5 * rest, (1500, 3))])
    weights, _ = weigh_all(mtl.gradnorm(3, 1.0, 0.01), losses, gram())
    lengths = weights[-100:].mean(0) * NORMS
    np.testing.assert_allclose(lengths / lengths.mean(), rest / rest.mean(), atol=0.05)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_gradnorm_does_not_depend_on_the_scale_of_losses_and_gradients(scale):
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.5, 2, size=(30, 3))
    expected, _ = weigh_all(mtl.gradnorm(3), losses, gram())
    weights, _ = weigh_all(mtl.gradnorm(3), scale * losses, scale**2 * gram())
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_gradnorm_leaves_a_task_without_gradient_out():
    norms = np.array([0.0, 1.0, 3.0])
    weights, state = weigh_all(mtl.gradnorm(3), np.ones(3), gram(norms), length=50)
    assert not weights[:, 0].any() and state.logits[0] == 0
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert weights[-1, 1] > weights[-1, 2] > 0
    # Nor does its loss count in the mean of the others.
    losses = np.random.default_rng(0).uniform(0.1, 5, size=(50, 3)) * [1e3, 1, 1]
    losses[0] = 1
    weights, _ = weigh_all(mtl.gradnorm(3), losses, gram(norms))
    others, _ = weigh_all(mtl.gradnorm(2), losses[:, 1:], gram(norms)[1:, 1:])
    np.testing.assert_allclose(weights[:, 1:], others, rtol=1e-5)


def test_gradnorm_survives_a_first_loss_of_zero_and_losses_that_vanish():
    losses = np.array([[0.0, 1e-20, 1], [1, 1e25, 1], [0, 0, 0], [1, 1, 1]])
    weights, state = weigh_all(mtl.gradnorm(3), losses, gram())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))


def test_db_mtl_adds_gradients_of_log_losses_of_one_length():
    k = 5
    rng = np.random.default_rng(0)
    gradients = sets.draw([sets._random, sets._scales_apart], k, n=4)
    losses = rng.uniform(0.1, 4, size=(len(gradients), k))
    weigh = lambda loss, gram: mtl.db_mtl(k).weigh(mtl.TaskStats(loss, gram, jnp.ones(k)), ())[0]
    grams = sets.grams(gradients)
    weights = jax.jit(jax.vmap(weigh))(np.float32(losses), np.float32(grams))
    logs = gradients / losses[..., None]
    lengths = np.linalg.norm(logs, axis=-1, keepdims=True)
    expected = (logs / lengths).mean(1) * lengths.max(1)
    updates = np.einsum("nk,nkp->np", np.asarray(weights, float), gradients)
    np.testing.assert_allclose(updates, expected, atol=1e-4 * lengths.max())
    each = np.linalg.norm(np.asarray(weights)[..., None] * gradients, axis=-1)
    np.testing.assert_allclose(each, lengths.max(1) / k + 0 * each, rtol=1e-4)


def test_db_mtl_does_not_see_a_factor_of_a_loss():
    scale, losses = np.array([1e-3, 20, 4]), np.array([0.3, 1.2, 2.0])
    weights = weigh_once(mtl.db_mtl(3), losses, gram())
    scaled = weigh_once(mtl.db_mtl(3), scale * losses, scale[:, None] * gram() * scale)
    np.testing.assert_allclose(scaled * scale, weights, rtol=1e-5)
    equal = weigh_once(mtl.db_mtl(3), np.full(3, 0.5), np.ones((3, 3)))
    np.testing.assert_allclose(equal, 1 / 3 / 0.5, rtol=1e-6)


def test_db_mtl_leaves_a_task_without_gradient_out():
    weights = weigh_once(mtl.db_mtl(3), np.ones(3), gram(np.array([0.0, 1.0, 2.0])))
    np.testing.assert_allclose(weights, [0, 2 / 3, 1 / 3], rtol=1e-6)
