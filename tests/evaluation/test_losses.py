import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ant_jax.diffusion import GaussianDiffusion, alphas_bar
from ant_jax.evaluation import interval_losses

T = 20
BOUNDARIES = np.array([0, 3, 12, T])
DIFFUSION = GaussianDiffusion(alphas_bar("cosine", T))


def apply_fn(params, x, t, y):
    return jnp.full(x.shape, params["level"]) * (1 + 0.1 * t[:, None, None, None]) + y


def losses(
    params, diffusion=DIFFUSION, seed=0, timesteps_each=2, boundaries=BOUNDARIES, batch_size=16
):
    x0 = jax.random.uniform(jax.random.key(9), (16, 2, 2, 1), minval=-1)
    return interval_losses(
        Partial(apply_fn, params),
        diffusion,
        x0,
        jax.random.key(seed),
        boundaries,
        y=jnp.full((16, 1, 1, 1), 0.25),
        timesteps_each=timesteps_each,
        batch_size=batch_size,
    )


def test_interval_losses_are_means_over_timesteps_spread_in_each_interval():
    params = {"level": jnp.float32(0.1)}
    got = losses(params)
    # Middles of the halves of 0..2, 3..11 and 12..19.
    for i, pair in enumerate(([0, 2], [5, 9], [14, 18])):
        want = []
        for t in pair:
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (16, 2, 2, 1))
            output = 0.1 * (1 + 0.1 * t) + 0.25
            want.append(np.mean((output - np.asarray(noise, np.float64)) ** 2))
        np.testing.assert_allclose(got[i], np.mean(want), rtol=1e-5)


def test_interval_losses_ignore_loss_weights_and_follow_the_key():
    params = {"level": jnp.float32(0.1)}
    weighted = dataclasses.replace(DIFFUSION, loss_weight=np.linspace(1, 9, T))
    np.testing.assert_array_equal(losses(params, weighted), losses(params))
    assert (losses(params, seed=1) != losses(params)).all()


@pytest.mark.parametrize("batch_size", [4, 5, 100])
@pytest.mark.parametrize("labelled", [True, False])
def test_interval_losses_do_not_depend_on_the_batch_size(batch_size, labelled):
    def of(batch_size):
        return interval_losses(
            lambda x, t, y: x * (1 if y is None else y[:, None, None, None]),
            DIFFUSION,
            jax.random.uniform(jax.random.key(9), (13, 2, 2, 1), minval=-1),
            jax.random.key(0),
            BOUNDARIES,
            y=jnp.arange(13) if labelled else None,
            timesteps_each=2,
            batch_size=batch_size,
        )

    np.testing.assert_allclose(of(batch_size), of(13), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Continuous:
    """A process on [0, 1]; its loss is the level, or the mean of the noise."""

    of_noise: bool = False
    loss_weight: None = None

    def level(self, low, high, u):
        return low + u**2 * (high - low)

    def losses(self, denoise, x0, t, noise, y):
        return noise.mean((1, 2, 3)) if self.of_noise else t


def continuous_losses(process):
    x0, key, boundaries = jnp.zeros((3, 2, 2, 1)), jax.random.key(0), np.array([0, 0.25, 1])
    return interval_losses(
        lambda x, t, y: x, process, x0, key, boundaries, timesteps_each=2, batch_size=3
    )


def test_levels_of_a_continuous_process():
    mean = (0.25**2 + 0.75**2) / 2
    want = [0.25 * mean, 0.25 + 0.75 * mean]
    np.testing.assert_allclose(continuous_losses(Continuous()), want, rtol=1e-6)


def test_each_level_of_a_continuous_process_has_noise_of_its_own():
    first, second = continuous_losses(Continuous(of_noise=True))
    assert abs(first - second) > 1e-3


def test_an_interval_shorter_than_its_timesteps():
    got = losses({"level": jnp.float32(0.1)}, timesteps_each=6, boundaries=np.array([0, 1, T]))
    only = losses({"level": jnp.float32(0.1)}, timesteps_each=1, boundaries=np.array([0, 1, T]))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[0], only[0], rtol=1e-6)
