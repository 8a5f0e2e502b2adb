"""Samplers against a Gaussian data set, where the optimal model is known, and NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ant_jax import diffusion
from ant_jax.diffusion import GaussianDiffusion, ddim_sample, ddpm_sample, respace

MEAN = np.array([0.5, -0.3])
COVARIANCE = np.array([[0.30, 0.12], [0.12, 0.20]])
ALPHAS_BAR = diffusion.alphas_bar("cosine", 1000)
FIXED = {name: GaussianDiffusion(ALPHAS_BAR, name) for name in ("fixed_small", "fixed_large")}
PROCESS = FIXED["fixed_large"]


def _optimal_eps(covariance):
    """E[eps | x_t] = sqrt(1 - ab) (ab cov + (1 - ab) I)^-1 (x_t - sqrt(ab) mean), tables by t."""
    ab = ALPHAS_BAR[:, None, None]
    precision = np.linalg.inv(ab * covariance + (1 - ab) * np.eye(2))
    matrices = jnp.asarray(np.sqrt(1 - ab) * precision, jnp.float32)
    shifts = jnp.asarray(np.sqrt(ALPHAS_BAR)[:, None] * MEAN, jnp.float32)
    return Partial(_affine, matrices, shifts)


def _affine(matrices, shifts, x, t, y):
    assert y is None
    return jnp.einsum("bij,bhwj->bhwi", matrices[t], x - shifts[t][:, None, None])


def _moments(samples):
    points = np.asarray(samples, np.float64).reshape(-1, 2)
    return points.mean(0), np.cov(points.T)


def _exact_moments(num_steps, sampler):
    """Moments of the samples in float64: with a linear model every step is affine."""
    timesteps = np.rint(np.arange(num_steps) * 999 / (num_steps - 1)).astype(int)
    mean, covariance, eye = np.zeros(2), np.eye(2), np.eye(2)
    for i in range(num_steps)[::-1]:
        ab, before = ALPHAS_BAR[timesteps[i]], ALPHAS_BAR[timesteps[i - 1]] if i else 1.0
        beta = 1 - ab / before
        small = (1 - before) / (1 - ab) * beta
        noise = {"fixed_large": beta, "fixed_small": small}.get(sampler)
        noise = sampler**2 * small if noise is None else noise * (i > 0)
        # eps = slope (x - sqrt(ab) MEAN), and likewise x0; the sampler then mixes the two. DDPM's
        # posterior mean is DDIM's with eta = 1 (Song et al. 2021, section 4.1).
        slope = np.sqrt(1 - ab) * np.linalg.inv(ab * COVARIANCE + (1 - ab) * eye)
        away = small if sampler in ("fixed_large", "fixed_small") else noise
        to_x0 = (eye - np.sqrt(1 - ab) * slope) / np.sqrt(ab)
        matrix = np.sqrt(before) * to_x0 + np.sqrt(1 - before - away) * slope
        # x0 is MEAN where x = sqrt(ab) MEAN.
        mean = np.sqrt(before) * MEAN + matrix @ (mean - np.sqrt(ab) * MEAN)
        covariance = matrix @ covariance @ matrix.T + noise * eye
    return mean, covariance


def _draw(sampler, shape, num_steps, spacing="even"):
    """Samples of the Gaussian by a DDPM variance or a DDIM eta."""
    kwargs = {"num_steps": num_steps, "spacing": spacing, "clip_x0": False}
    apply_fn, key = _optimal_eps(COVARIANCE), jax.random.key(1)
    if isinstance(sampler, str):
        return ddpm_sample(apply_fn, shape, key, diffusion=FIXED[sampler], **kwargs)
    return ddim_sample(apply_fn, shape, key, diffusion=PROCESS, eta=sampler, **kwargs)


@pytest.mark.parametrize("sampler", ["fixed_small", "fixed_large", 0.0, 0.5, 1.0])
def test_respaced_moments_are_exact(sampler):
    """At 50 steps the samplers differ by 6 to 13 % in standard deviation, and each is known."""
    samples = _draw(sampler, (32, 32, 32, 2), 50)
    assert samples.shape == (32, 32, 32, 2)
    assert samples.dtype == jnp.float32
    mean, covariance = _moments(samples)
    expected_mean, expected_covariance = _exact_moments(50, sampler)
    # Five standard errors of 32768 points.
    np.testing.assert_allclose(mean, expected_mean, atol=0.015)
    np.testing.assert_allclose(covariance, expected_covariance, atol=0.012)


@pytest.mark.parametrize("spacing", ["even", "ldm"])
def test_ddim_with_eta_one_is_ddpm(spacing):
    ddpm, ddim = (
        _draw(sampler, (32, 32, 32, 2), 50, spacing=spacing) for sampler in ("fixed_small", 1.0)
    )
    np.testing.assert_allclose(ddpm, ddim, atol=1e-4)


@pytest.mark.parametrize("sampler", ["fixed_small", "fixed_large", 0.0, 0.5, 1.0])
def test_exact_moments_tend_to_the_data(sampler):
    """What the test above compares with is the data distribution, but for the few steps."""
    mean, covariance = _exact_moments(1000, sampler)
    np.testing.assert_allclose(mean, MEAN, atol=1e-3)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.004)


def test_full_process_returns_the_data_distribution():
    mean, covariance = _moments(_draw("fixed_large", (2, 32, 32, 2), None))
    # Five standard errors of 2048 points.
    np.testing.assert_allclose(mean, MEAN, atol=0.06)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.047)


def test_optimal_learned_variance_is_exact_in_few_steps():
    """With the true variance of x_{t-1} given x_t, DDPM samples any diagonal Gaussian exactly."""
    stds = np.array([0.2, 0.7])
    process = GaussianDiffusion(ALPHAS_BAR, "learned_range")
    few = respace(process, 12)
    ab, before = few.alphas_bar[:, None], few.alphas_bar_prev[:, None]
    small = np.exp(few.posterior_log_variance_clipped)[:, None]
    large = few.betas[:, None]
    uncertainty = stds**2 * (1 - ab) / (ab * stds**2 + 1 - ab)
    optimal = small + before * (large / (1 - ab)) ** 2 * uncertainty
    table = np.full((1000, 2), np.nan)
    table[few.timestep_map] = 2 * np.log(optimal / small) / np.log(large / small) - 1
    assert np.abs(table[few.timestep_map[1:]]).max() <= 1
    table = jnp.asarray(table, jnp.float32)
    eps_fn = _optimal_eps(np.diag(stds**2))

    def apply_fn(x, t, y):
        v = jnp.broadcast_to(table[t][:, None, None], x.shape)
        return jnp.concatenate([eps_fn(x, t, y), v], -1)

    samples = ddpm_sample(
        apply_fn,
        (32, 32, 32, 2),
        jax.random.key(0),
        diffusion=process,
        num_steps=12,
        clip_x0=False,
    )
    mean, covariance = _moments(samples)
    np.testing.assert_allclose(mean, MEAN, atol=5 * 0.7 / 181)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), stds, rtol=0.02)


def _toy(params, x, t, y):
    """A model that isn't linear, depends on everything, and predicts x0 beyond [-1, 1]."""
    shift = 0.0 if y is None else 0.2 * y[:, None, None, None]
    return jnp.tanh(params * x) + 0.01 * t[:, None, None, None] + shift


def _toy_learned(params, x, t, y):
    return jnp.concatenate([_toy(params, x, t, y), jnp.cos(3 * x)], -1)


@pytest.mark.parametrize(
    ("sampler", "clip"),
    [
        ("fixed_small", False),
        ("fixed_large", True),
        ("learned_range", True),
        (0.0, True),
        (0.6, True),
    ],
)
def test_steps_against_numpy(sampler, clip):
    """All steps of a short process in float64, with the same noise."""
    shape, steps = (3, 2, 2, 1), 4
    ancestral = isinstance(sampler, str)
    learned = sampler == "learned_range"
    process = GaussianDiffusion(
        diffusion.alphas_bar("linear", 40), sampler if ancestral else "fixed_large"
    )
    labels = np.array([0, 1, 2])
    sample = ddpm_sample if ancestral else ddim_sample
    kwargs = {"y": labels, "num_steps": steps, "clip_x0": clip}
    if not ancestral:
        kwargs["eta"] = sampler
    apply_fn = Partial(_toy_learned if learned else _toy, 0.8)
    samples = sample(apply_fn, shape, jax.random.key(3), diffusion=process, **kwargs)

    def noise(level):
        keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(shape[0])]
        draws = [jax.random.normal(jax.random.fold_in(k, level), shape[1:]) for k in keys]
        return np.stack(draws).astype(np.float64)

    x = noise(steps)
    timesteps = [0, 13, 26, 39]
    for i in (3, 2, 1, 0):
        ab, before = process.alphas_bar[timesteps[i]], 1.0
        if i:
            before = process.alphas_bar[timesteps[i - 1]]
        eps = np.tanh(0.8 * x) + 0.01 * timesteps[i] + 0.2 * labels[:, None, None, None]
        x0 = (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
        if clip:
            assert np.abs(x0).max() > 1
            x0 = np.clip(x0, -1, 1)
            eps = (x - np.sqrt(ab) * x0) / np.sqrt(1 - ab)
        beta = 1 - ab / before
        small = beta * (1 - before) / (1 - ab)
        if not ancestral:
            variance = sampler**2 * (1 - before) / (1 - ab) * (1 - ab / before)
            mean = np.sqrt(before) * x0 + np.sqrt(1 - before - variance) * eps
        else:
            # Ho et al. 2020, eq. 11.
            mean = (x - beta / np.sqrt(1 - ab) * eps) / np.sqrt(1 - beta)
            variance = {"fixed_small": small, "fixed_large": beta}.get(sampler)
            if learned and i:
                v = np.cos(3 * x)
                variance = beta ** ((1 + v) / 2) * small ** ((1 - v) / 2)
        x = mean + np.sqrt(variance) * noise(i) if i else mean
    np.testing.assert_allclose(samples, x, atol=2e-5, rtol=2e-5)


def _guided_model(params, x, t, y):
    """eps = params[y] x, with variance channels that tell the label."""
    eps = params[y][:, None, None, None] * x
    return jnp.concatenate([eps, jnp.ones_like(x) * (y[:, None, None, None] - 1.0)], -1)


def test_guidance_extrapolates_epsilon_and_keeps_the_variance():
    """Guided slopes are those of a model with slope u + g (c - u), whose v is the conditional's."""
    process = GaussianDiffusion(diffusion.alphas_bar("linear", 50), "learned_range")
    shape, key, y = (2, 2, 2, 1), jax.random.key(0), jnp.array([1, 2])
    slopes = jnp.array([0.2, 0.3, 0.5])
    kwargs = {"diffusion": process, "num_steps": 5, "clip_x0": False, "y": y}
    for guidance in (0.0, 2.5):
        guided = ddpm_sample(
            Partial(_guided_model, slopes), shape, key, null_label=0, guidance=guidance, **kwargs
        )
        extrapolated = slopes[0] + guidance * (slopes - slopes[0])
        expected = ddpm_sample(Partial(_guided_model, extrapolated), shape, key, **kwargs)
        np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-5)
    plain = ddpm_sample(Partial(_guided_model, slopes), shape, key, **kwargs)
    one = ddpm_sample(
        Partial(_guided_model, slopes), shape, key, null_label=0, guidance=1.0, **kwargs
    )
    np.testing.assert_array_equal(plain, one)
    assert np.abs(plain - guided).max() > 0.1


def test_guidance_doubles_the_batch_only_when_used():
    sizes = []

    def apply_fn(x, t, y):
        sizes.append((x.shape[0], t.shape[0], y.shape[0]))
        return x

    for guidance, size in ((1.0, 4), (2.0, 8)):
        sizes.clear()
        kwargs = {"y": np.zeros(4, int), "null_label": 9, "guidance": guidance}
        sample = functools.partial(ddim_sample, apply_fn, (4, 1, 1, 1), **kwargs)
        jax.eval_shape(lambda key, f=sample: f(key, diffusion=PROCESS), jax.random.key(0))
        assert set(sizes) == {(size, size, size)}


def test_samples_depend_on_their_own_key_only():
    sample = functools.partial(
        ddpm_sample, Partial(_toy, 0.5), diffusion=PROCESS, num_steps=8, clip_x0=False
    )
    key = jax.random.key(5)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
    whole = sample((8, 3, 3, 2), key)
    parts = [sample((4, 3, 3, 2), keys[i : i + 4]) for i in (0, 4)]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole, sample((8, 3, 3, 2), key))
    other = sample((8, 3, 3, 2), jax.random.key(6))
    everything = np.concatenate([whole, other])
    distance = np.abs(everything[:, None] - everything).max(axis=(2, 3, 4))
    assert np.all(distance + np.eye(16) > 0.1)


def test_new_values_do_not_compile_again():
    calls = []

    def model(params, x, t, y):
        calls.append(None)
        return params * x + 0.1 * y[:, None, None, None]

    y = jnp.arange(2)

    def draw(params, seed, y, guidance, eta):
        return ddim_sample(
            Partial(model, jnp.float32(params)),
            (2, 2, 2, 1),
            jax.random.key(seed),
            diffusion=PROCESS,
            num_steps=3,
            y=y,
            null_label=0,
            guidance=guidance,
            eta=eta,
        )

    first = draw(0.5, 0, y, 1.5, 0.0)
    traced = len(calls)
    assert traced
    for args in ((0.7, 0, y, 1.5, 0.0), (0.5, 1, y, 1.5, 0.0), (0.5, 0, y + 1, 1.5, 0.0)):
        assert np.abs(draw(*args) - first).max() > 1e-3
    for args in ((0.5, 0, y, 2.5, 0.0), (0.5, 0, y, 1.5, 0.5)):
        assert np.abs(draw(*args) - first).max() > 1e-3
    assert len(calls) == traced


def test_low_precision_models_give_float32_samples():
    samples = jax.eval_shape(
        lambda key: ddpm_sample(
            lambda x, t, y: x.astype(jnp.bfloat16), (2, 2, 2, 1), key, diffusion=PROCESS
        ),
        jax.random.key(0),
    )
    assert samples.dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"guidance": 2.0}, "guidance needs both"),
        ({"guidance": 2.0, "y": np.zeros(2, int)}, "guidance needs both"),
        ({"guidance": 2.0, "null_label": 0}, "guidance needs both"),
        ({"y": np.zeros(3, int)}, "batch size 2"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 1001}, "num_steps"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"\(\) or \(2,\)"),
        ({"eta": 1.5}, "eta"),
        ({"apply_fn": lambda x, t, y: x[..., :1]}, "needs a model output"),
    ],
)
def test_sampler_errors(kwargs, message):
    arguments = {
        "apply_fn": lambda x, t, y: x,
        "shape": (2, 1, 1, 2),
        "key": jax.random.key(0),
        "diffusion": PROCESS,
    } | kwargs
    with pytest.raises(ValueError, match=message):
        ddim_sample(**arguments)


def test_raw_keys_are_refused():
    with pytest.raises(TypeError, match="typed"):
        ddpm_sample(lambda x, t, y: x, (2, 1, 1, 2), jax.random.PRNGKey(0), diffusion=PROCESS)


@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])
def test_a_model_of_v_draws_the_same_samples(sampler):
    drawn = {}
    for prediction in ("epsilon", "v"):
        process = GaussianDiffusion(ALPHAS_BAR, "fixed_large", prediction)
        apply_fn = _optimal_eps(COVARIANCE)
        if prediction == "v":
            apply_fn = Partial(_v_from_eps, apply_fn)
        drawn[prediction] = sampler(
            apply_fn,
            (4, 1, 1, 2),
            jax.random.key(0),
            diffusion=process,
            num_steps=20,
            clip_x0=False,
        )
    np.testing.assert_allclose(drawn["v"], drawn["epsilon"], atol=2e-3)


def _v_from_eps(eps_fn, x, t, y):
    """v = (eps - sqrt(1 - ab) x_t) / sqrt(ab), from the definitions of both."""
    ab = jnp.asarray(ALPHAS_BAR, jnp.float32)[t][:, None, None, None]
    return (eps_fn(x, t, y) - jnp.sqrt(1 - ab) * x) / jnp.sqrt(ab)


@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])
def test_channels_that_are_not_guided_are_those_of_the_conditional_model(sampler):
    """Where no channel depends on another, each is what guiding all of them or none makes it."""

    def apply_fn(x, t, y):
        return x * 0.3 + y[:, None, None, None] * 0.1

    draw = functools.partial(
        sampler,
        Partial(apply_fn),
        (2, 1, 1, 4),
        jax.random.key(0),
        diffusion=PROCESS,
        num_steps=10,
        y=jnp.array([1, 2]),
        null_label=0,
        clip_x0=False,
    )
    some, all_, none = draw(guidance=3.0, guidance_channels=3), draw(guidance=3.0), draw()
    np.testing.assert_allclose(some[..., :3], all_[..., :3], rtol=1e-6)
    np.testing.assert_allclose(some[..., 3], none[..., 3], rtol=1e-6)
    assert np.abs(all_ - none).min() > 1e-3
    with pytest.raises(ValueError, match=r"guidance_channels must be in 1 .. 4, got 5"):
        draw(guidance=3.0, guidance_channels=5)
