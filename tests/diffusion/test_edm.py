"""EDM against the formulas of Karras et al. 2022."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.diffusion import EDM
from ant_jax.diffusion.loss_weights.p2 import P2

PROCESS = EDM()


def _sigma(t):
    return np.exp(np.log(0.002) + np.asarray(t, np.float64) * np.log(80 / 0.002))


def test_training_noise_is_log_normal():
    u = (np.arange(2000) + 0.5) / 2000
    log_sigma = np.log(_sigma(PROCESS.quantile(u)))
    np.testing.assert_allclose(log_sigma.mean(), -1.2, atol=1e-3)
    np.testing.assert_allclose(log_sigma.std(), 1.2, rtol=2e-3)
    t = np.linspace(0, 1, 101)
    np.testing.assert_allclose(PROCESS.quantile(PROCESS.cdf(t)), t, atol=1e-9)
    # In float32 the density has no more digits near its upper end.
    single = np.linspace(0, 0.9, 101, dtype=np.float32)
    there_and_back = jax.jit(lambda t: PROCESS.quantile(PROCESS.cdf(t)))
    np.testing.assert_allclose(there_and_back(single), single, atol=3e-3)


def test_preconditioning_and_loss_are_those_of_the_paper():
    """Table 1 and eq. 8: c_skip, c_out, c_in, and the weight of the squared error of x0."""
    t = jnp.asarray([0.0, 0.2, 0.5, 0.55, 0.8, 1.0], jnp.float32)
    x0, noise = np.random.default_rng(0).normal(size=(2, 6, 2, 2, 1))
    sigma = _sigma(t)[:, None, None, None]
    x, data = x0 + sigma * noise, 0.5
    network = lambda x, t, y: jnp.sin(x) + t[:, None, None, None]
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / np.sqrt(sigma**2 + data**2)
    c_in = 1 / np.sqrt(sigma**2 + data**2)
    denoised = skip * x + out * (np.sin(c_in * x) + np.asarray(t)[:, None, None, None])
    found = PROCESS.predict(network, jnp.float32(x), t)
    np.testing.assert_allclose(found.x0, denoised, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.noise, (x - denoised) / sigma, rtol=2e-4, atol=2e-4)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    expected = np.mean(weight * (denoised - x0) ** 2, axis=(1, 2, 3))
    losses = PROCESS.losses(network, jnp.float32(x0), t, jnp.float32(noise))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_loss_weights_multiply_the_error_of_the_noise():
    process, t = EDM(loss_weight=P2(1.0, 1.0)), jnp.asarray([0.3, 0.6, 0.9], jnp.float32)
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
    network = lambda x, t, y: jnp.cos(x)
    found = process.predict(network, process.noised(x0, t, noise), t)
    snr = 1 / _sigma(t) ** 2
    expected = np.mean(np.square(found.noise - noise), axis=(1, 2, 3)) / (1 + snr)
    np.testing.assert_allclose(process.losses(network, x0, t, noise), expected, rtol=1e-3)


def test_steps_are_those_of_the_paper():
    """Eq. 5 with rho = 7."""
    steps = PROCESS.steps(18, "karras")
    i = np.arange(18)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(np.sqrt(steps.noise[1:]), sigma[::-1], rtol=1e-9)
    assert (steps.signal == 1).all() and steps.start == pytest.approx(80)
    assert PROCESS.steps(1, "karras").start == pytest.approx(80)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.0}, "std must be positive"),
        ({"sigma_data": -0.5}, "sigma_data must be positive"),
        ({"sigma_min": 90.0}, "sigma_max = 80.0 must be above sigma_min = 90.0"),
        ({"mean": 30.0}, "nearly 0 between"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        EDM(**settings)
    with pytest.raises(ValueError, match="must have the shape"):
        PROCESS.predict(lambda x, t, y: x[..., :1], jnp.ones((1, 2, 2, 3)), jnp.ones(1))
