"""Schedules against formulas written out independently."""

import math

import numpy as np
import pytest

from ant_jax import diffusion


def _betas(name, num_timesteps):
    betas = []
    for t in range(num_timesteps):
        if name == "linear":
            fraction = t / (num_timesteps - 1) if num_timesteps > 1 else 0
            beta = (1e-4 + fraction * (0.02 - 1e-4)) * 1000 / num_timesteps
        elif name == "ldm":
            fraction = t / (num_timesteps - 1) if num_timesteps > 1 else 0
            root = math.sqrt(0.0015) + fraction * (math.sqrt(0.0195) - math.sqrt(0.0015))
            beta = root * root * 1000 / num_timesteps
        else:
            now, after = (
                math.cos((u / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1)
            )
            beta = 1 - after / now
        betas.append(min(beta, 0.999))
    return betas


@pytest.mark.parametrize("num_timesteps", [1, 2, 20, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine", "ldm"])
def test_schedule(name, num_timesteps):
    alphas_bar = diffusion.alphas_bar(name, num_timesteps)
    assert alphas_bar.shape == (num_timesteps,)
    assert alphas_bar.dtype == np.float64
    expected = np.exp(np.cumsum([math.log1p(-beta) for beta in _betas(name, num_timesteps)]))
    np.testing.assert_allclose(alphas_bar, expected, rtol=1e-9)
    assert np.all((alphas_bar > 0) & (alphas_bar < 1))
    assert np.all(np.diff(alphas_bar) < 0)


def test_published_end_points():
    # Ho et al. 2020: "D_KL(q(x_T|x_0) || N(0, I)) about 1e-5", that is alphas_bar[-1] = 4.04e-5.
    linear = diffusion.alphas_bar("linear", 1000)
    np.testing.assert_allclose(linear[[0, -1]], [1 - 1e-4, 4.036e-5], rtol=1e-3)
    # The cosine passes one half where (u + s) / (1 + s) = 1/2, apart from the norming by f(0).
    cosine = diffusion.alphas_bar("cosine", 1000)
    assert abs(np.searchsorted(-cosine, -0.5) - 1000 * (1.008 / 2 - 0.008)) < 2


def test_schedule_errors():
    with pytest.raises(ValueError, match=r"'sigmoid'.*cosine.*linear"):
        diffusion.alphas_bar("sigmoid", 10)
    with pytest.raises(ValueError, match="at least 1"):
        diffusion.alphas_bar("linear", 0)


def test_log_snr():
    alphas_bar = np.array([1 - 1e-12, 0.8, 0.5, 1e-30])
    expected = [12 * math.log(10), math.log(4), 0, -30 * math.log(10)]
    np.testing.assert_allclose(diffusion.log_snr(alphas_bar), expected, atol=1e-4)
