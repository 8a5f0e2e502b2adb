"""Weightings that need the losses alone, or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import weigh_all, weigh_once

from ant_jax import mtl

LOSSES = np.array([0.3, 1.2, 0.05, 2.0])
PREFERENCE = (0.1, 0.2, 0.3, 0.4)


def gradient(objective, losses=LOSSES):
    return jax.grad(objective)(jnp.float32(losses))


# From TorchJD 0.18 in float64: the gradients of its objectives. PBI's is divided by the sum of h.
TORCHJD = {
    "geometric_mean": (
        mtl.geometric_mean(4),
        [0.362989765, 0.090747441, 2.177938587, 0.054448465],
    ),
    "pbi": (
        mtl.pbi(4, preference=PREFERENCE),
        np.array([-0.060546099, 2.244402464, -3.532755735, 2.911808487]) * np.sqrt(0.3),
    ),
    "cosmos": (
        mtl.cosmos(4, 0.5, PREFERENCE),
        [0.084023353, 0.213714311, 0.187374287, 0.396983553],
    ),
}


@pytest.mark.parametrize("name", TORCHJD)
def test_weights_are_those_of_torchjd(name):
    weighting, expected = TORCHJD[name]
    np.testing.assert_allclose(weigh_once(weighting, LOSSES), expected, rtol=2e-5)


def test_imtl_l_is_twice_uncertainty_on_k_times_the_losses():
    """Their objectives are the same up to the sign of s and a factor, which Adam does not see."""
    k, n = 4, 60
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 5, size=(n, k))
    counts = rng.random((n, k)) < 0.7
    weights, state = weigh_all(mtl.imtl_l(k, 0.1), losses, counts=counts)
    expected, other = weigh_all(mtl.uncertainty(k, 0.1), k * losses, counts=counts)
    present = np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(weights, 2 * expected * k / present, rtol=1e-4)
    np.testing.assert_allclose(state.log_scale, -other.log_variance, rtol=1e-4, atol=1e-5)
    assert np.ptp(state.log_scale) > 0.2


def test_imtl_l_starts_at_the_mean_and_settles_at_the_log_losses():
    weights, _ = weigh_all(mtl.imtl_l(4, 0.1), LOSSES, length=600)
    np.testing.assert_allclose(weights[0], 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(weights[-1], 1 / (4 * LOSSES), rtol=1e-2)


def test_imtl_l_stays_finite_for_a_loss_that_is_zero():
    weights, state = weigh_all(mtl.imtl_l(2, 2.5), [0, 1], length=60)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))
    assert weights[-1, 0] > 1e12
    losses = np.concatenate([np.zeros((60, 1)), np.full((60, 1), 1e5)])
    weights, _ = weigh_all(mtl.imtl_l(1, 2.5), losses)
    assert weights[-1] < weights[60], "it comes back"


def test_geometric_mean_sees_a_factor_of_one_loss_as_one_of_the_update():
    scale = np.array([1e-3, 1, 20, 4])
    weights = weigh_once(mtl.geometric_mean(4), LOSSES)
    # The gradient of s_i L_i is s_i times as long.
    scaled = weigh_once(mtl.geometric_mean(4), scale * LOSSES) * scale
    np.testing.assert_allclose(scaled / weights, np.prod(scale) ** 0.25, rtol=1e-5)
    np.testing.assert_allclose(weigh_once(mtl.geometric_mean(4), np.full(4, 7.0)), 0.25, rtol=1e-6)


def test_geometric_mean_of_many_losses_does_not_overflow():
    losses = np.concatenate([np.full(32, 1e-3), np.full(32, 1e3)])
    np.testing.assert_allclose(
        weigh_once(mtl.geometric_mean(64), losses), 1 / (64 * losses), rtol=1e-4
    )


# Mean of 3 losses an epoch, and 4 times the weights, by TorchJD 0.18 in float64.
DWA_LOSSES = np.array(
    [
        [0.259629, 1.682024, 1.595487, 0.554802],
        [1.76532, 0.211279, 0.738622, 0.385531],
        [0.955645, 1.613016, 0.53822, 0.19884],
        [0.868648, 0.477175, 0.272431, 1.202632],
        [0.667523, 1.37679, 0.479079, 1.890015],
        [0.793709, 0.300441, 1.295305, 1.861594],
        [0.936717, 1.913722, 1.049802, 0.907934],
        [1.278406, 1.990683, 1.902993, 0.974086],
        [1.539685, 1.045103, 1.105693, 1.592993],
        [0.887846, 1.495519, 1.451171, 1.870913],
    ]
)
DWA_WEIGHTS = np.array(
    [
        *[[1, 1, 1, 1]] * 6,
        *[[0.45262407, 0.416313251, 0.437256159, 2.69380652]] * 3,
        [0.941755023, 1.326959137, 1.13384108, 0.59744476],
    ]
)


def test_dwa_is_that_of_torchjd():
    weights, _ = weigh_all(mtl.dwa(4, 3), DWA_LOSSES)
    np.testing.assert_allclose(4 * weights, DWA_WEIGHTS, rtol=1e-5)


def test_dwa_counts_the_epochs_of_a_task_by_the_steps_at_which_it_is_present():
    """Task 0 is absent at every second step: its state is as if those did not exist."""
    losses = np.repeat(DWA_LOSSES, 2, axis=0)
    counts = np.ones_like(losses)
    counts[1::2, 0] = 0
    _, state = weigh_all(mtl.dwa(4, 3), losses, counts=counts)
    _, expected = weigh_all(mtl.dwa(4, 3), DWA_LOSSES)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), state, expected)
    assert state.steps[0] == 10 and state.steps[1] == 20


def test_dwa_survives_losses_of_zero_and_extreme_quotients():
    losses = np.array([[0, 1e-30, 1e-30], [0, 1e30, 1e30], [1, 1, 1e-30], [1, 1, 1]])
    weights, state = weigh_all(mtl.dwa(3, 1, 0.1), losses)
    assert np.isfinite(weights).all() and np.isfinite(state.last).all()
    np.testing.assert_allclose(weights[2], [0, 0.5, 0.5], atol=1e-6)


# The nadir of STCH below, at mu = 0.3; from TorchJD's objective of log(L / nadir) in float64.
NADIR = np.array([0.4, 1.0, 0.1, 2.5])
STCH = [0.4573, 0.5477, 0.7102, 0.0851]


def stch_sequence(scale=1.0):
    """Ten steps of warm-up, of which the last two have the mean NADIR, then one at LOSSES."""
    rng = np.random.default_rng(0)
    warmup = rng.uniform(0.5, 2, size=(8, 4))
    return scale * np.concatenate([warmup, [0.8 * NADIR, 1.2 * NADIR], [LOSSES]])


def test_stch_weighs_log_losses_and_then_their_smooth_maximum():
    losses = stch_sequence()
    weights, state = weigh_all(mtl.stch(4, 0.3, 10), losses)
    np.testing.assert_allclose(weights[:10], 1 / (4 * losses[:10]), rtol=1e-5)
    np.testing.assert_allclose(state.nadir, NADIR, rtol=1e-6)
    np.testing.assert_allclose(weights[10], STCH, atol=6e-5)
    objective = lambda x: 0.3 * jax.nn.logsumexp(jnp.log(x / NADIR) / 0.3)
    np.testing.assert_allclose(weights[10], gradient(objective), rtol=1e-4)


def test_stch_does_not_see_a_factor_of_a_loss():
    scale = np.array([1e-3, 1, 20, 4])
    weights, _ = weigh_all(mtl.stch(4, 0.3, 10), stch_sequence())
    scaled, _ = weigh_all(mtl.stch(4, 0.3, 10), stch_sequence(scale))
    np.testing.assert_allclose(scaled * scale, weights, rtol=1e-4)


@pytest.mark.parametrize("mu", [1.0, 1e-30])
def test_stch_is_fixed_weights_for_mu_1_and_the_maximum_for_a_small_one(mu):
    weights = weigh_all(mtl.stch(4, mu, 10), stch_sequence())[0][10]
    if mu == 1:
        np.testing.assert_allclose(weights * NADIR, (weights * NADIR)[0], rtol=1e-5)
    else:
        # Task 1 has improved least, by a factor of 1.2 / 1.
        np.testing.assert_allclose(weights, [0, 1 / 1.2, 0, 0], rtol=1e-5)


def test_random_weights_follow_seed_and_call_and_are_1_over_k_in_the_mean():
    draw = lambda seed, n=4: weigh_all(mtl.random(5, seed), np.zeros((n, 5)))[0]
    weights = draw(0, 4000)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert weights.min() > 0 and len(np.unique(weights[:, 0])) > 3900
    np.testing.assert_allclose(weights.mean(0), 0.2, atol=0.01)
    # The logarithms are normal, up to a constant of the call.
    logs = np.log(weights) - np.log(weights).mean(1, keepdims=True)
    np.testing.assert_allclose(logs.std(), np.sqrt(4 / 5), rtol=0.02)
    np.testing.assert_array_equal(draw(0), weights[:4])
    assert not np.isclose(draw(1), draw(0)).any()


def test_random_weights_of_the_present_keep_their_proportions():
    everyone = weigh_all(mtl.random(5), np.zeros((1, 5)))[0][0]
    some = weigh_all(mtl.random(5), np.zeros((1, 5)), counts=[[1, 0, 1, 1, 0]])[0][0]
    here = [0, 2, 3]
    np.testing.assert_allclose(some[here], everyone[here] / everyone[here].sum(), rtol=1e-5)
    assert not some[[1, 4]].any()


def test_pbi_and_cosmos_are_linear_on_the_ray_of_the_preference():
    for weighting in (mtl.pbi(4, preference=PREFERENCE), mtl.cosmos(4, 2.0, PREFERENCE)):
        weights = weigh_once(weighting, 3 * np.array(PREFERENCE))
        np.testing.assert_allclose(weights, PREFERENCE, atol=0.03)
    for weighting in (mtl.pbi(4, 0.0, (1, 2, 3, 4)), mtl.cosmos(4, 0.0, (1, 2, 3, 4))):
        np.testing.assert_allclose(weigh_once(weighting, LOSSES), PREFERENCE, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_pbi_does_not_depend_on_the_scale_and_the_penalty_of_cosmos_is_inverse_to_it(scale):
    pbi, cosmos = mtl.pbi(4), mtl.cosmos(4, 0.5 * scale)
    expected = weigh_once(pbi, LOSSES)
    np.testing.assert_allclose(weigh_once(pbi, scale * LOSSES), expected, rtol=1e-4)
    expected = weigh_once(mtl.cosmos(4, 0.5), LOSSES)
    np.testing.assert_allclose(weigh_once(cosmos, scale * LOSSES), expected, rtol=1e-4)


def test_the_penalty_of_cosmos_vanishes_for_the_largest_losses():
    for scale in (8e37, 3.2e38):
        weights = weigh_once(mtl.cosmos(4, 1.0, PREFERENCE), scale * np.array([1, 0.5, 0.2, 0]))
        np.testing.assert_allclose(weights, PREFERENCE, rtol=1e-6)


def test_pbi_and_cosmos_pull_towards_the_preference():
    """A loss that is above its share gets more weight, one far below a negative weight."""
    losses = [0.25, 0.25, 0.25, 2]
    for weighting in (mtl.pbi(4), mtl.cosmos(4, 10.0)):
        weights = weigh_once(weighting, losses)
        assert weights[3] > 0.25 and (weights[:3] < 0).all()


def test_pbi_and_cosmos_leave_absent_tasks_out_of_the_preference():
    counts = [[1, 1, 0, 1]]
    losses, here = LOSSES[None], [0, 1, 3]
    for method in (mtl.pbi, mtl.cosmos):
        weights = weigh_all(method(4, 0.5, PREFERENCE), losses, counts=counts)[0][0]
        alone = weigh_once(method(3, 0.5, (0.1, 0.2, 0.4)), LOSSES[here])
        np.testing.assert_allclose(weights[here], alone, rtol=1e-5)


@pytest.mark.parametrize("method", [mtl.pbi, mtl.cosmos])
@pytest.mark.parametrize("preference", [(1, 2), (1, 2, 0), (1, 2, -1), (1, 2, np.nan), 0.5])
def test_a_preference_that_can_not_be(method, preference):
    with pytest.raises(ValueError, match="preference must be 3 finite numbers > 0"):
        method(3, preference=preference)
