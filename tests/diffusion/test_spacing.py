"""Which timesteps samplers use, and LDM's sampler, against recordings of the papers' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import diffusion
from ant_jax.diffusion import GaussianDiffusion, spaced_timesteps
from ant_jax.diffusion.posterior import posterior
from ant_jax.diffusion.samplers import SampleOptions, ddim

LDM = GaussianDiffusion(diffusion.alphas_bar("ldm", 1000), "fixed_small")


# Recorded from space_timesteps (openai/improved-diffusion) and of
# make_ddim_timesteps (CompVis/latent-diffusion), but for the single evenly spaced step.
@pytest.mark.parametrize(
    ("arguments", "first", "last"),
    [
        ((1000, 50), [0, 20, 41], [917, 938, 958, 979, 999]),
        ((1000, 43), [0, 24, 48], [904, 928, 951, 975, 999]),
        ((1000, 1), [999], [999]),
        ((1000, 334, "ddim"), [0, 3, 6], [987, 990, 993, 996, 999]),
        ((1000, 50, "ddim"), [0, 20, 40], [900, 920, 940, 960, 980]),
        ((1000, 200, "ldm"), [1, 6, 11], [976, 981, 986, 991, 996]),
        ((300, 45, "10,15,20"), [0, 11, 22], [278, 283, 289, 294, 299]),
        ((1001, 6, "1,0,3,2"), [0, 501, 625], [501, 625, 750, 751, 1000]),
        ((1000, 1, "1"), [0], [0]),
    ],
)
def test_timesteps_are_those_of_the_papers_code(arguments, first, last):
    timesteps = spaced_timesteps(*arguments)
    assert len(timesteps) == arguments[1]
    assert timesteps[:3].tolist() == first
    assert timesteps[-5:].tolist() == last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 600, "ddim"), "no integer stride gives num_steps = 600 .* 500 and 1000"),
        ((1000, 1, "ddim"), "no integer stride"),
        ((1000, 300, "ldm"), "divide them .* 250 and 500"),
        ((1000, 1000, "ldm"), "below 1000 timesteps"),
        ((1000, 50, "10,20"), "have 30 steps, not num_steps = 50"),
        ((10, 8, "8,0"), "takes 8 steps from a section of 5"),
        ((1000, 50, "ddim50"), "spacing must be 'even'"),
        ((1000, 50, "10, 40"), "spacing must be 'even'"),
        ((10, 11, "even"), r"must be in 1 \.\. 10"),
        ((10, 0, "ldm"), r"must be in 1 \.\. 10"),
    ],
)
def test_spacings_that_can_not_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(*arguments)


def _network(x, t, y):
    """Linear in x, so that a step multiplies it by a number."""
    return (0.3 + 0.0006 * jnp.float32(t)[:, None, None, None]) * x


def _ddim(noises, eta):
    """LDM's DDIM in float64 for that network; noises from the last step's, which adds to data."""
    stride = 1000 // (len(noises) - 1)
    levels = np.append(0, np.arange(1, 1000, stride))  # the end is the noise of timestep 0
    x = noises[-1]
    for i in range(len(noises) - 2, -1, -1):
        before, now = LDM.alphas_bar[levels[i : i + 2]]
        eps = (0.3 + 0.0006 * levels[i + 1]) * x
        sigma = eta * np.sqrt((1 - before) / (1 - now) * (1 - now / before))
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * eps + sigma * noises[i]
    return x


@pytest.mark.parametrize(
    ("num_steps", "eta", "recorded"),
    [(5, 0.0, 2.363000), (5, 1.0, 2.056299), (200, 0.0, 2.884142), (200, 1.0, 10.120958)],
)
def test_the_loop_of_these_tests_is_ldms(num_steps, eta, recorded):
    """Recorded from the DDIMSampler of CompVis/latent-diffusion: x_T is 1, all noise is 0.5."""
    noises = np.append(np.full(num_steps, 0.5), 1.0)
    np.testing.assert_allclose(_ddim(noises, eta), recorded, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ldms_sampler(eta):
    key = jax.random.key(3)
    draw = lambda level: jax.random.normal(jax.random.fold_in(key, level), (2, 2, 1))
    expected = _ddim(np.stack([draw(level) for level in range(6)]).astype(np.float64), eta)
    options = SampleOptions(5, "ldm", clip_x0=False)
    samples = ddim(eta)(LDM, _network, (1, 2, 2, 1), key[None], options)
    np.testing.assert_allclose(samples[0], expected, rtol=2e-5)


def test_steps_that_end_with_noise():
    constants = posterior(LDM.steps(200, "ldm"))
    assert (constants.variance > 0).all()
    np.testing.assert_array_equal(constants.log_least, np.log(constants.variance))
