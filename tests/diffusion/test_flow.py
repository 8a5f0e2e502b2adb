"""Flow matching against closed forms."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import Partial

from ant_jax.diffusion import Flow
from ant_jax.diffusion.loss_weights.min_snr import MinSNR
from ant_jax.diffusion.samplers import SampleOptions, ddim, dpm_solver, heun

SPACES = ("velocity", "x0", "epsilon")
DENSITIES = {
    "uniform": Flow(),
    "logit_normal": Flow(density="logit_normal", mean=-0.5, std=1.3),
    "mode": Flow(density="mode", mode=1.29),
    "ends": Flow(density="mode", mode=-0.9),
    "shifted": Flow(density="logit_normal", shift=3.0),
}
MEAN = np.array([0.5, -0.3])
COVARIANCE = np.array([[0.30, 0.12], [0.12, 0.20]])


@pytest.mark.parametrize("name", DENSITIES)
def test_quantile_and_cdf_are_inverse(name):
    flow, u = DENSITIES[name], np.linspace(0, 1, 257)
    t = flow.quantile(u)
    assert t[0] == 0 and t[-1] == 1 and (np.diff(t) > 0).all()
    np.testing.assert_allclose(flow.cdf(t), u, atol=1e-12)
    # float32 has no levels between the last below 1 and 1.
    single = jnp.asarray(u, jnp.float32)
    np.testing.assert_allclose(flow.quantile(single), t, atol=2e-6)
    np.testing.assert_allclose(flow.cdf(jnp.asarray(t, jnp.float32)), u, atol=2e-5)


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_that_of_the_paper(name):
    """The derivative of the distribution function, by Esser et al. 2024, section 3.1."""
    flow, step = DENSITIES[name], 1e-5
    t = np.linspace(0.05, 0.95, 19)
    density = (flow.cdf(t + step) - flow.cdf(t - step)) / (2 * step)
    if name == "uniform":
        expected = np.ones_like(t)
    elif name in ("logit_normal", "shifted"):
        # Of t' = 3 t / (1 + 2 t), which has the odds of t times 3.
        logit = np.log(t / (1 - t)) - np.log(flow.shift)
        expected = scipy.stats.norm.pdf((logit - flow.mean) / flow.std) / (flow.std * t * (1 - t))
    else:
        # |d t / d u| of eq. 20 at the u that gives t, found on a fine grid.
        u = np.linspace(0, 1, 200_001)
        of_u = 1 - u - flow.mode * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
        slope = np.abs(np.gradient(of_u, u))
        expected = 1 / np.interp(t, of_u[::-1], slope[::-1])
    np.testing.assert_allclose(density, expected, rtol=2e-4)


def test_levels_follow_the_density_inside_an_interval():
    flow = DENSITIES["logit_normal"]
    low, high = np.float64(0.3), np.float64(0.8)
    u = (np.arange(4000) + 0.5) / 4000
    t = flow.level(low, high, u)
    inside = lambda edge: (flow.cdf(edge) - flow.cdf(low)) / (flow.cdf(high) - flow.cdf(low))
    for edge in (0.35, 0.5, 0.7):
        np.testing.assert_allclose((t < edge).mean(), inside(edge), atol=1e-3)


@pytest.mark.parametrize("prediction", SPACES)
@pytest.mark.parametrize("loss", SPACES)
def test_losses_are_the_errors_in_their_space(prediction, loss):
    """Of a network that is wrong by a known amount, where nothing is divided by less than 0.05."""
    flow, plain = Flow(prediction, loss), Flow(prediction, prediction)
    rng = np.random.default_rng(0)
    x0, noise, error = rng.normal(size=(3, 6, 2, 2, 1)).astype(np.float32)
    t = jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9, 0.95], jnp.float32)
    denoise = lambda *_: flow.target(x0, t, noise) + error
    x, levels = flow.noised(x0, t, noise), np.asarray(t)[:, None, None, None]
    found = flow.predict(denoise, x, t)
    wrong = {
        "x0": found.x0 - x0,
        "epsilon": found.noise - noise,
        "velocity": (found.noise - found.x0) - (noise - x0),
    }
    expected = np.mean(np.square(wrong[loss]), axis=(1, 2, 3))
    np.testing.assert_allclose(flow.losses(denoise, x0, t, noise), expected, rtol=2e-4)
    np.testing.assert_allclose((1 - levels) * found.x0 + levels * found.noise, x, atol=1e-5)
    if loss == prediction:
        np.testing.assert_allclose(plain.losses(denoise, x0, t, noise), expected, rtol=2e-4)


@pytest.mark.parametrize("prediction", SPACES)
def test_loss_weights_multiply_the_error_of_the_noise(prediction):
    flow = Flow(prediction, "epsilon", loss_weight=MinSNR(5.0))
    plain = dataclasses.replace(flow, loss_weight=None)
    t = jnp.asarray([0.2, 0.25, 0.5, 0.9], jnp.float32)
    x0, noise = np.random.default_rng(0).normal(size=(2, 4, 2, 2, 1)).astype(np.float32)
    denoise = lambda x, t, y: jnp.sin(3 * x)
    ratio = flow.losses(denoise, x0, t, noise) / plain.losses(denoise, x0, t, noise)
    snr = ((1 - np.asarray(t, np.float64)) / np.asarray(t, np.float64)) ** 2
    np.testing.assert_allclose(ratio, np.minimum(snr, 5) / snr, rtol=1e-4)
    with pytest.raises(ValueError, match="needs loss = 'epsilon', got 'velocity'"):
        Flow(loss_weight=MinSNR(5.0))


def _optimal_velocity(x, t, y):
    """E[noise - x0 | x_t] for Gaussian data, by the covariances of both with x_t."""
    del y
    t = t[0]
    covariance = (1 - t) ** 2 * jnp.asarray(COVARIANCE) + t**2 * jnp.eye(2)
    slope = (t * jnp.eye(2) - (1 - t) * jnp.asarray(COVARIANCE)) @ jnp.linalg.inv(covariance)
    return -MEAN + jnp.einsum("ij,bhwj->bhwi", slope, x - (1 - t) * MEAN)


@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [(ddim, "even"), *itertools.product([heun, dpm_solver], ["even", "karras", "log_snr"])],
)
def test_the_optimal_velocity_returns_a_gaussian(sampler, spacing):
    num_steps = 400 if sampler is ddim else 60
    options = SampleOptions(num_steps, spacing, clip_x0=False)
    samples = sampler()(
        Flow(), Partial(_optimal_velocity), (1, 128, 128, 2), jax.random.key(0), options
    )
    points = np.asarray(samples, np.float64).reshape(-1, 2)
    # Four standard errors of 16384 points.
    np.testing.assert_allclose(points.mean(0), MEAN, atol=0.018)
    np.testing.assert_allclose(np.cov(points.T), COVARIANCE, atol=0.016)


def _mixture_velocity(x, t, y):
    """The optimal velocity for two points at -1 and 0.5 with weights 1/4 and 3/4, deviation 0.1."""
    del y
    t, means = t[0], jnp.array([-1.0, 0.5])
    variance = (1 - t) ** 2 * 0.01 + t**2
    ahead = x[..., None] - (1 - t) * means
    share = jax.nn.softmax(jnp.log(jnp.array([0.25, 0.75])) - ahead**2 / (2 * variance), -1)
    x0 = means + (1 - t) * 0.01 / variance * ahead
    noise = t / variance * ahead
    return (share * (noise - x0)).sum(-1)


def test_the_optimal_velocity_returns_a_mixture():
    options = SampleOptions(60, clip_x0=False)
    points = heun()(
        Flow(shift=2.0), Partial(_mixture_velocity), (1, 64, 64, 1), jax.random.key(0), options
    )
    points = np.sort(np.asarray(points, np.float64).ravel())
    left = points < -0.3
    # Four standard errors of 4096 points.
    np.testing.assert_allclose(left.mean(), 0.25, atol=0.027)
    np.testing.assert_allclose(points[left].mean(), -1, atol=0.02)
    np.testing.assert_allclose(points[~left].mean(), 0.5, atol=0.01)
    np.testing.assert_allclose([points[left].std(), points[~left].std()], 0.1, rtol=0.1)


def test_shift_moves_the_levels_of_sampling_as_those_of_training():
    steps, shifted = Flow().steps(4), Flow(shift=3.0).steps(4)
    odds = lambda t: t[:-1] / (1 - t[:-1])
    np.testing.assert_allclose(odds(shifted.t), 3 * odds(steps.t))
    assert shifted.t[-1] == 1 and shifted.start == 1
    u = np.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(
        Flow(shift=3.0).quantile(u) / (1 - Flow(shift=3.0).quantile(u)), 3 * u / (1 - u)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "v"}, "prediction must be one of"),
        ({"loss": "eps"}, "loss must be one of"),
        ({"density": "normal"}, "density must be one of"),
        ({"std": 0.0}, "std must be positive"),
        ({"shift": -1.0}, "shift must be positive"),
        ({"mode": 2.0}, "mode must be from -1.0 to 1.75"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Flow(**settings)
    with pytest.raises(ValueError, match="must have the shape"):
        Flow().predict(lambda x, t, y: x[..., :1], jnp.ones((1, 2, 2, 3)), jnp.ones(1))
