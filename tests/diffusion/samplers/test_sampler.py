"""Samplers against data whose optimal model is known, and NumPy loops; all of the folder too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ant_jax import diffusion, settings
from ant_jax.diffusion import GaussianDiffusion, Prediction, Process, samplers
from ant_jax.diffusion.posterior import posterior
from ant_jax.diffusion.samplers import SampleOptions, Sampler, ddim, ddpm

SAMPLERS = [
    settings.resolve(samplers, name, Sampler) for name in settings.names_in(samplers, Sampler)
]
PROCESSES = [
    settings.resolve(diffusion, name, Process) for name in settings.names_in(diffusion, Process)
]

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


def _draw(sampler, shape, num_steps, spacing):
    """Samples of the Gaussian by a DDPM variance or a DDIM eta."""
    options = SampleOptions(num_steps, spacing, clip_x0=False)
    denoise, key = _optimal_eps(COVARIANCE), jax.random.key(1)
    if isinstance(sampler, str):
        return ddpm()(FIXED[sampler], denoise, shape, key, options)
    return ddim(sampler)(PROCESS, denoise, shape, key, options)


@pytest.mark.parametrize("sampler", ["fixed_small", "fixed_large", 0.0, 0.5, 1.0])
def test_respaced_moments_are_exact(sampler):
    """At 50 steps the samplers differ by 6 to 13 % in standard deviation, and each is known."""
    samples = _draw(sampler, (32, 32, 32, 2), 50, "even")
    assert samples.shape == (32, 32, 32, 2)
    assert samples.dtype == jnp.float32
    mean, covariance = _moments(samples)
    expected_mean, expected_covariance = _exact_moments(50, sampler)
    # Five standard errors of 32768 points.
    np.testing.assert_allclose(mean, expected_mean, atol=0.015)
    np.testing.assert_allclose(covariance, expected_covariance, atol=0.012)


@pytest.mark.parametrize("spacing", ["even", "ldm"])
def test_ddim_with_eta_one_is_ddpm(spacing):
    ddpm, ddim = (_draw(sampler, (2, 4, 4, 2), 50, spacing) for sampler in ("fixed_small", 1.0))
    np.testing.assert_allclose(ddpm, ddim, atol=1e-4)


@pytest.mark.parametrize("sampler", ["fixed_small", "fixed_large", 0.0, 0.5, 1.0])
def test_exact_moments_tend_to_the_data(sampler):
    """What the test above compares with is the data distribution, but for the few steps."""
    mean, covariance = _exact_moments(1000, sampler)
    np.testing.assert_allclose(mean, MEAN, atol=1e-3)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.004)


def test_full_process_returns_the_data_distribution():
    mean, covariance = _moments(_draw("fixed_large", (2, 32, 32, 2), 1000, "even"))
    # Five standard errors of 2048 points.
    np.testing.assert_allclose(mean, MEAN, atol=0.06)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.047)


def test_optimal_learned_variance_is_exact_in_few_steps():
    """With the true variance of x_{t-1} given x_t, DDPM samples any diagonal Gaussian exactly."""
    stds = np.array([0.2, 0.7])
    process = GaussianDiffusion(ALPHAS_BAR, "learned_range")
    few = process.steps(12)
    constants = jax.tree.map(lambda table: table[:, None], posterior(few))
    ab, before = few.signal[1:, None], few.signal[:-1, None]
    small, large = np.exp(constants.log_least), np.exp(constants.log_greatest)
    uncertainty = stds**2 * (1 - ab) / (ab * stds**2 + 1 - ab)
    optimal = small + before * (large / (1 - ab)) ** 2 * uncertainty
    table = np.full((1000, 2), np.nan)
    table[few.t] = 2 * np.log(optimal / small) / np.log(large / small) - 1
    assert np.abs(table[few.t[1:]]).max() <= 1
    table = jnp.asarray(table, jnp.float32)
    eps_fn = _optimal_eps(np.diag(stds**2))

    def denoise(x, t, y):
        v = jnp.broadcast_to(table[t][:, None, None], x.shape)
        return jnp.concatenate([eps_fn(x, t, y), v], -1)

    options = SampleOptions(num_steps=12, clip_x0=False)
    samples = ddpm()(process, denoise, (32, 32, 32, 2), jax.random.key(0), options)
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
    draw = ddpm() if ancestral else ddim(sampler)
    denoise = Partial(_toy_learned if learned else _toy, 0.8)
    options = SampleOptions(num_steps=steps, clip_x0=clip)
    samples = draw(process, denoise, shape, jax.random.key(3), options, labels)

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

    def draw(slopes, guidance=1.0, null_label=None):
        options = SampleOptions(num_steps=5, guidance=guidance, clip_x0=False)
        denoise = Partial(_guided_model, slopes)
        return ddpm()(process, denoise, shape, key, options, y, null_label)

    for guidance in (0.0, 2.5):
        guided = draw(slopes, guidance, null_label=0)
        expected = draw(slopes[0] + guidance * (slopes - slopes[0]))
        np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-5)
    plain = draw(slopes)
    np.testing.assert_array_equal(plain, draw(slopes, null_label=0))
    assert np.abs(plain - guided).max() > 0.1


def test_guidance_doubles_the_batch_only_when_used():
    sizes = []

    def denoise(x, t, y):
        sizes.append((x.shape[0], t.shape[0], y.shape[0]))
        return x

    for guidance, size in ((1.0, 4), (2.0, 8)):
        sizes.clear()
        options = SampleOptions(guidance=guidance)
        draw = lambda key, o=options: ddim()(
            PROCESS, denoise, (4, 1, 1, 1), key, o, np.zeros(4, int), 9
        )
        jax.eval_shape(draw, jax.random.key(0))
        assert set(sizes) == {(size, size, size)}


def test_samples_depend_on_their_own_key_only():
    options = SampleOptions(num_steps=8, clip_x0=False)
    sample = lambda shape, keys: ddpm()(PROCESS, Partial(_toy, 0.5), shape, keys, options)
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

    def draw(params, seed, y, guidance, eta, spacing="even"):
        return ddim(eta)(
            PROCESS,
            Partial(model, jnp.float32(params)),
            (2, 2, 2, 1),
            jax.random.key(seed),
            SampleOptions(5, spacing, guidance),
            y,
            null_label=0,
        )

    first = draw(0.5, 0, y, 1.5, 0.0)
    traced = len(calls)
    assert traced
    for args in ((0.7, 0, y, 1.5, 0.0), (0.5, 1, y, 1.5, 0.0), (0.5, 0, y + 1, 1.5, 0.0)):
        assert np.abs(draw(*args) - first).max() > 1e-3
    others = ((0.5, 0, y, 2.5, 0.0), (0.5, 0, y, 1.5, 0.5), (0.5, 0, y, 1.5, 0.0, "ddim"))
    for args in others:
        assert np.abs(draw(*args) - first).max() > 1e-3
    assert len(calls) == traced


def test_low_precision_models_give_float32_samples():
    samples = jax.eval_shape(
        lambda key: ddpm()(
            PROCESS, lambda x, t, y: x.astype(jnp.bfloat16), (2, 2, 2, 1), key, SampleOptions()
        ),
        jax.random.key(0),
    )
    assert samples.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"guidance": 2.0}, {}, "guidance needs both"),
        ({"guidance": 2.0}, {"y": np.zeros(2, int)}, "guidance needs both"),
        ({"guidance": 2.0}, {"null_label": 0}, "guidance needs both"),
        ({"guidance_channels": 3}, {}, r"guidance_channels must be in 0 .. 2, got 3"),
        ({"num_steps": 0}, {}, "num_steps"),
        ({"num_steps": 1001}, {}, "num_steps"),
        ({}, {"y": np.zeros(3, int)}, "batch size 2"),
        ({}, {"keys": jax.random.split(jax.random.key(0), 3)}, r"\(\) or \(2,\)"),
        ({}, {"denoise": lambda x, t, y: x[..., :1]}, "needs a model output"),
    ],
)
def test_sampler_errors(options, arguments, message):
    arguments = {
        "denoise": lambda x, t, y: x,
        "shape": (2, 1, 1, 2),
        "keys": jax.random.key(0),
    } | arguments
    with pytest.raises(ValueError, match=message):
        ddim()(PROCESS, options=SampleOptions(**options), **arguments)


def test_raw_keys_are_refused():
    with pytest.raises(TypeError, match="typed"):
        ddpm()(PROCESS, lambda x, t, y: x, (2, 1, 1, 2), jax.random.PRNGKey(0), SampleOptions())


def test_eta_is_checked():
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.5"):
        ddim(1.5)


# What the network says is made into data and noise, and guided, before a sampler has it.
@pytest.mark.parametrize("make", [ddim, ddpm])
def test_a_model_of_v_draws_the_same_samples(make):
    drawn = {}
    for prediction in ("epsilon", "v"):
        process = GaussianDiffusion(ALPHAS_BAR, "fixed_large", prediction)
        denoise = _optimal_eps(COVARIANCE)
        if prediction == "v":
            denoise = Partial(_v_from_eps, denoise)
        options = SampleOptions(num_steps=20, clip_x0=False)
        drawn[prediction] = make()(process, denoise, (4, 1, 1, 2), jax.random.key(0), options)
    np.testing.assert_allclose(drawn["v"], drawn["epsilon"], atol=2e-3)


def _v_from_eps(eps_fn, x, t, y):
    """v = (eps - sqrt(1 - ab) x_t) / sqrt(ab), from the definitions of both."""
    ab = jnp.asarray(ALPHAS_BAR, jnp.float32)[t][:, None, None, None]
    return (eps_fn(x, t, y) - jnp.sqrt(1 - ab) * x) / jnp.sqrt(ab)


@pytest.mark.parametrize("make", [ddim, ddpm])
def test_channels_that_are_not_guided_are_those_of_the_conditional_model(make):
    """Where no channel depends on another, each is what guiding all of them or none makes it."""

    def denoise(x, t, y):
        return x * 0.3 + y[:, None, None, None] * 0.1

    def draw(**options):
        options = SampleOptions(num_steps=10, clip_x0=False, **options)
        labels = jnp.array([1, 2])
        return make()(
            PROCESS, Partial(denoise), (2, 1, 1, 4), jax.random.key(0), options, labels, 0
        )

    some, all_, none = draw(guidance=3.0, guidance_channels=3), draw(guidance=3.0), draw()
    np.testing.assert_allclose(some[..., :3], all_[..., :3], rtol=1e-6)
    np.testing.assert_allclose(some[..., 3], none[..., 3], rtol=1e-6)
    assert np.abs(all_ - none).min() > 1e-3


class _Perfect:
    """A process whose network knows that the data is normal, with this mean and deviation."""

    def __init__(self, process, mean, deviation):
        self.process, self.mean, self.deviation = process, mean, deviation

    def __getattr__(self, name):
        return getattr(self.process, name)

    def predict(self, denoise, x, t, y):
        ones, zeros = jnp.ones_like(x), jnp.zeros_like(x)
        signal, noise = self.noised(ones, t, zeros), self.noised(zeros, t, ones)
        # Regression of data and noise on x, by their covariances with it.
        ahead = (x - signal * self.mean) / (noise**2 + (signal * self.deviation) ** 2)
        return Prediction(self.mean + signal * self.deviation**2 * ahead, noise * ahead)


@pytest.mark.parametrize("make_process", PROCESSES)
@pytest.mark.parametrize("make", SAMPLERS)
def test_with_a_perfect_network_every_sampler_returns_the_data(make, make_process):
    # The first column is the same in all of the data.
    deviations = jnp.asarray(0.5 * (np.arange(65) > 0)[:, None], jnp.float32)
    process = _Perfect(make_process(), 0.4, deviations)
    options = SampleOptions(num_steps=250, clip_x0=False)
    drawn = make()(process, lambda x, t, y: x, (1, 64, 65, 2), jax.random.key(0), options)
    column, samples = np.split(np.asarray(drawn, np.float64), [1], 2)
    np.testing.assert_allclose(column, 0.4, atol=1e-3)
    # Five standard errors of 8192 points, and what 250 steps leave.
    np.testing.assert_allclose(samples.mean(), 0.4, atol=0.03)
    np.testing.assert_allclose(samples.std(), 0.5, rtol=0.06)


def test_heun_and_dpm_solver_are_of_second_order():
    """Errors of a Gaussian's deviation fall by 4 for twice the steps, and Euler's by 2."""
    edm = diffusion.EDM(sigma_min=0.01, sigma_max=10.0)
    process, sizes = _Perfect(edm, 0.0, 0.5), (40, 80)

    def scale(sampler, num_steps):
        options = SampleOptions(num_steps, "log_snr", clip_x0=False)
        samples = sampler(process, lambda x, t, y: x, (1, 8, 8, 1), jax.random.key(0), options)
        # All steps multiply x by a number.
        first = jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), num_steps), (8, 8, 1)
        )
        return float(np.median(np.asarray(samples)[0] / np.asarray(first)))

    # The ODE keeps x / sqrt(0.5^2 + sigma^2) until 0.01, and the last step is Euler's.
    exact = 10 * 0.5**2 / np.sqrt((0.5**2 + 10**2) * (0.5**2 + 0.01**2))
    for sampler, order in ((ddim(), 1), (samplers.heun(), 2), (samplers.dpm_solver(), 2)):
        errors = [abs(scale(sampler, num_steps) / exact - 1) for num_steps in sizes]
        np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.35)


def test_churn_adds_noise_that_the_steps_remove_again():
    """With a perfect network the data stays the same, and the samples are others."""
    options = SampleOptions(num_steps=60, spacing="karras", clip_x0=False)
    process = _Perfect(diffusion.EDM(), 0.4, 0.5)
    draw = lambda sampler: np.asarray(
        sampler(process, lambda x, t, y: x, (1, 64, 64, 1), jax.random.key(0), options), np.float64
    )
    plain, churned = draw(samplers.heun()), draw(samplers.heun(churn=40.0, churn_high=50.0))
    assert np.abs(np.corrcoef(plain.ravel(), churned.ravel())[0, 1]) < 0.5
    for samples in (plain, churned):
        # Four standard errors of 4096 points.
        np.testing.assert_allclose(samples.mean(), 0.4, atol=0.032)
        np.testing.assert_allclose(samples.std(), 0.5, rtol=0.05)
    with pytest.raises(ValueError, match=r"churn_low = 2\.0 must be below churn_high = 1.0"):
        samplers.heun(churn_low=2.0, churn_high=1.0)


@pytest.mark.parametrize("make", SAMPLERS)
def test_network_is_called_as_often_as_said(make):
    calls = []

    def count(x):
        calls.append(None)
        return x

    def denoise(x, t, y):
        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    sampler, options = make(), SampleOptions(num_steps=7)
    sampler(PROCESS, denoise, (1, 1, 1, 1), jax.random.key(0), options).block_until_ready()
    assert len(calls) == sampler.calls(7) == (13 if make is samplers.heun else 7)


def test_guidance_in_an_interval():
    """Where the interval ends, each step is that with guidance or that without."""
    process = diffusion.Flow()
    shape, key, y = (2, 2, 2, 1), jax.random.key(0), jnp.array([1, 2])
    denoise = Partial(lambda x, t, y: 0.3 * x * y[:, None, None, None])

    def draw(**options):
        options = SampleOptions(num_steps=4, clip_x0=False, **options)
        return np.asarray(ddim()(process, denoise, shape, key, options, y, 0))

    everywhere, nowhere = draw(guidance=3.0), draw()
    np.testing.assert_allclose(draw(guidance=3.0, guidance_low=1e-6), everywhere, rtol=1e-6)
    np.testing.assert_allclose(
        draw(guidance=3.0, guidance_low=1e-6, guidance_high=1e-5), nowhere, rtol=1e-6
    )
    # The levels are 1, 3/4, 1/2 and 1/4, with ratios of infinity, 3, 1 and 1/3.
    x = everywhere * 0 + np.stack(
        [
            jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), 4), shape[1:])
            for i in range(2)
        ]
    )
    labels = np.asarray(y)[:, None, None, None]
    for ratio in (np.inf, 3, 1, 1 / 3):
        guidance = 3.0 if 0.5 <= ratio <= 2 else 1.0
        x = x - 0.25 * guidance * 0.3 * x * labels
    found = draw(guidance=3.0, guidance_low=0.5, guidance_high=2.0)
    np.testing.assert_allclose(found, x, rtol=1e-5)
    with pytest.raises(ValueError, match="guidance_low must be below guidance_high"):
        draw(guidance=3.0, guidance_low=2.0, guidance_high=1.0)


@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_timesteps_nearest_to_a_spacing(spacing):
    steps = PROCESS.steps(30, spacing)
    assert steps.t[0] == 0 and len(steps.t) == 30
    ratio = np.sqrt(steps.noise[1:] / steps.signal[1:])
    np.testing.assert_allclose(ratio[-1], 80, rtol=0.3)
    even = np.diff(ratio ** (1 / 7) if spacing == "karras" else np.log(ratio))
    np.testing.assert_allclose(even[3:-3], even.mean(), rtol=0.5)
    with pytest.raises(ValueError, match=r"num_steps = 900 of spacing .* take fewer steps"):
        PROCESS.steps(900, spacing)
