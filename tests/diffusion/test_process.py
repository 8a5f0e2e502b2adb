"""What every process of the folder promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import diffusion, settings
from ant_jax.diffusion import Process
from ant_jax.tasks import clusters

NAMES = settings.names_in(diffusion, Process)
SHAPE = (64, 2, 2, 3)


@pytest.fixture(params=NAMES)
def process(request):
    return settings.resolve(diffusion, request.param, Process)()


def _levels(process, n):
    """(n,) levels spread by the process's density, in NumPy."""
    low = np.zeros(n, int if isinstance(process.span, int) else float)
    return process.level(low, low + process.span, (np.arange(n) + 0.5) / n)


def _example(process):
    """Data, levels over the whole span and noise."""
    rng = np.random.default_rng(0)
    x0 = rng.uniform(-1, 1, SHAPE).astype(np.float32)
    noise = rng.normal(size=SHAPE).astype(np.float32)
    return x0, jnp.asarray(_levels(process, SHAPE[0])), noise


def test_the_folder_is_not_empty():
    assert "gaussian" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_equal_settings_give_an_equal_process(name):
    make = settings.resolve(diffusion, name, Process)
    assert make() == make() and hash(make()) == hash(make())


def test_levels_stay_in_their_interval(process):
    """For intervals of all sizes, and u up to the largest float32 below 1."""
    ends = np.unique(_levels(process, 200))
    low, high = (np.asarray(jnp.asarray(ends[i])) for i in np.triu_indices(len(ends), 1))
    last, level_of = None, jax.jit(process.level)
    for u in (0.0, 1e-7, 0.3, 0.5, 0.9999, np.nextafter(np.float32(1), np.float32(0))):
        level = level_of(low, high, np.full(low.shape, u, np.float32))
        assert level.dtype == low.dtype
        level = np.asarray(level)
        assert np.all((low <= level) & (level < high))
        assert last is None or np.all(level >= last)
        last = level


def test_log_snr_falls_and_is_that_of_the_noised_data(process):
    t = np.unique(_levels(process, 200))
    log_snr = process.log_snr(t)
    assert log_snr.dtype == np.float64 and (np.diff(log_snr) < 0).all()
    one, none = jnp.ones((len(t), 1, 1, 1)), jnp.zeros((len(t), 1, 1, 1))
    signal, noise = process.noised(one, t, none), process.noised(none, t, one)
    np.testing.assert_allclose(2 * np.log(signal / noise).ravel(), log_snr, rtol=1e-3, atol=1e-3)


def test_log_sigma_is_that_of_the_process_and_finite_at_the_ends(process):
    t = _levels(process, 40)[1:-1]
    found = clusters.log_sigma(process, t)
    np.testing.assert_allclose(found, -process.log_snr(t) / 2, rtol=1e-2, atol=1e-2)
    assert np.isfinite(clusters.log_sigma(process, np.array([0, process.span]))).all()


def test_losses_of_a_perfect_network_are_zero_and_of_others_not(process):
    x0, t, noise = _example(process)
    target = process.target(x0, t, noise)
    y = jnp.arange(SHAPE[0])

    def denoise(x, t, labels):
        assert x.shape == SHAPE and t.shape == SHAPE[:1] and labels is y
        return target

    losses = jax.jit(lambda: process.losses(denoise, x0, t, noise, y))()
    assert losses.shape == SHAPE[:1] and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, 0, atol=1e-10)
    zero = lambda x, t, y: jnp.zeros(x.shape, jnp.bfloat16)
    losses, gradient = jax.jit(
        jax.value_and_grad(
            lambda scale: process.losses(lambda *_: scale * target, x0, t, noise).sum()
        )
    )(0.5)
    assert np.isfinite(losses) and np.isfinite(gradient) and losses > 0
    losses = process.losses(zero, x0, t, noise)
    assert losses.dtype == jnp.float32 and (np.asarray(losses) > 0).all()


def test_without_loss_weight(process):
    x0, t, noise = _example(process)
    losses = process.losses(lambda x, t, y: jnp.zeros_like(x), x0, t, noise)
    plain = dataclasses.replace(process, loss_weight=None)
    assert plain.loss_weight is None
    unweighted = plain.losses(lambda x, t, y: jnp.zeros_like(x), x0, t, noise)
    assert np.isfinite(unweighted).all()
    if process.loss_weight is None:
        np.testing.assert_array_equal(losses, unweighted)


def test_a_perfect_network_predicts_data_and_noise(process):
    x0, t, noise = _example(process)
    target = process.target(x0, t, noise)
    x = process.noised(x0, t, noise)
    prediction = process.predict(lambda *_: target, x, t)
    one, none = jnp.ones_like(x), jnp.zeros_like(x)
    signal, sigma = process.noised(one, t, none), process.noised(none, t, one)
    # Where little is left of one of them, float32 can't tell it from x.
    np.testing.assert_allclose(signal * (prediction.x0 - x0), 0, atol=1e-5)
    np.testing.assert_allclose(sigma * (prediction.noise - noise), 0, atol=1e-5)


def test_steps_rise_from_the_end_to_the_most_noise(process):
    steps = process.steps(10)
    assert steps.t.shape == (10,) and (np.diff(steps.t) > 0).all()
    for powers in (steps.signal, steps.noise):
        assert powers.shape == (11,) and powers.dtype == np.float64
    assert (np.diff(steps.noise / np.maximum(steps.signal, 1e-300)) > 0).all()
    assert steps.noise[0] == 0
    with np.errstate(divide="ignore"):
        log_snr = np.log(steps.signal[1:]) - np.log(steps.noise[1:])
    np.testing.assert_allclose(log_snr, process.log_snr(steps.t), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="spacing"):
        process.steps(10, "no such")
