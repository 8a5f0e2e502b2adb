"""Loss weights against their formulas; all of the folder by what they promise."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import settings
from ant_jax.diffusion import loss_weights
from ant_jax.diffusion.loss_weights.min_snr import MinSNR
from ant_jax.diffusion.loss_weights.p2 import P2

NAMES = settings.names_in(loss_weights, loss_weights.LossWeight)
LOG_SNR = np.array([8.0, 2.0, math.log(5.0), 0.0, -3.0])


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite_in_float64_and_float32_and_equal_by_their_settings(name):
    make = settings.resolve(loss_weights, name, loss_weights.LossWeight)
    weight = make()
    assert weight == make() and hash(weight) == hash(make())
    extreme = np.array([800.0, 80.0, *LOG_SNR, -1e3])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        weights = weight(extreme)
    assert weights.dtype == np.float64 and np.isfinite(weights).all() and (weights >= 0).all()
    single = weight(jnp.asarray(extreme))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, weights, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (1.0, 0.5), (3.0, 2.0), (2.0, 0.0)])
def test_p2(k, gamma):
    expected = [1 / (k + math.exp(x)) ** gamma for x in LOG_SNR]
    np.testing.assert_allclose(P2(k, gamma)(LOG_SNR), expected)


@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr(gamma):
    expected = [min(math.exp(x), gamma) / math.exp(x) for x in LOG_SNR]
    np.testing.assert_allclose(MinSNR(gamma)(LOG_SNR), expected)


def test_defaults_are_the_papers():
    assert P2() == P2(k=1.0, gamma=1.0) and MinSNR() == MinSNR(gamma=5.0)


def test_errors():
    with pytest.raises(ValueError, match="k must be positive"):
        P2(k=0)
    with pytest.raises(ValueError, match="gamma must be positive"):
        MinSNR(gamma=0)
