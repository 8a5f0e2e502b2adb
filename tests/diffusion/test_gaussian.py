"""The process and its losses against float64 NumPy written from other forms of the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ant_jax import diffusion
from ant_jax.diffusion import GaussianDiffusion
from ant_jax.diffusion.loss_weights.p2 import P2
from ant_jax.diffusion.posterior import posterior

T = 10
SHAPE = (7, 3, 2, 2)
TIMESTEPS = np.array([0, 0, 1, 2, 5, 8, 9])


def _process(variance="learned_range", **kwargs):
    return GaussianDiffusion(diffusion.alphas_bar("cosine", T), variance, **kwargs)


def _example(seed=0):
    """8-bit data with both extreme values, noise, and a model output of 2C channels."""
    rng = np.random.default_rng(seed)
    x0 = rng.integers(0, 256, SHAPE) / 127.5 - 1
    x0[:, 0] = -1
    x0[:, 1, 0] = 1
    noise = rng.normal(size=SHAPE)
    eps = noise + 0.3 * rng.normal(size=SHAPE)
    v = rng.uniform(-1, 1, SHAPE)
    return x0.astype(np.float32), noise.astype(np.float32), np.concatenate([eps, v], -1)


def _bound(x0, noise, output, t, alphas_bar):
    """Bits per dimension of one example (improved DDPM, section 2), in float64."""
    eps, v = np.split(output.astype(np.float64), 2, -1)
    signal = alphas_bar[t]
    before = alphas_bar[t - 1] if t else 1.0
    alpha = signal / before
    x_t = np.sqrt(signal) * x0 + np.sqrt(1 - signal) * noise
    prediction = (x_t - np.sqrt(1 - signal) * eps) / np.sqrt(signal)

    def posterior(x, step):
        """Product of the Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
        alpha = alphas_bar[step] / alphas_bar[step - 1]
        variance = 1 / (alpha / (1 - alpha) + 1 / (1 - alphas_bar[step - 1]))
        pull = x_t * np.sqrt(alpha) / (1 - alpha)
        return variance * (
            pull + x * np.sqrt(alphas_bar[step - 1]) / (1 - alphas_bar[step - 1])
        ), variance

    true_mean, small = posterior(x0, t) if t else (x0, posterior(x0, 1)[1])
    mean = posterior(prediction, t)[0] if t else prediction
    sigma = np.sqrt((1 - alpha) ** ((1 + v) / 2) * small ** ((1 - v) / 2))
    if t:
        ratio = small / sigma**2
        nats = 0.5 * (ratio - 1 - np.log(ratio) + ((true_mean - mean) / sigma) ** 2)
    else:
        upper = np.where(x0 > 0.999, 1, stats.norm.cdf(x0 + 1 / 255, mean, sigma))
        lower = np.where(x0 < -0.999, 0, stats.norm.cdf(x0 - 1 / 255, mean, sigma))
        nats = -np.log(upper - lower)
    return nats.mean() / np.log(2)


def test_noised_data_has_the_right_moments():
    process = _process()
    t = np.repeat([0, 4, 9], 20000)
    x0 = np.tile(np.array([0.7, -0.2], np.float32), (len(t), 1, 1, 1))
    noise = np.random.default_rng(0).normal(size=x0.shape).astype(np.float32)
    x_t = process.noised(x0, t, noise)
    assert x_t.dtype == jnp.float32
    for step in (0, 4, 9):
        signal = process.alphas_bar[step]
        rows = np.asarray(x_t)[t == step, 0, 0]
        np.testing.assert_allclose(rows.mean(0), np.sqrt(signal) * x0[0, 0, 0], atol=0.03)
        np.testing.assert_allclose(rows.std(0), np.sqrt(1 - signal), rtol=0.02)


def test_log_snr_is_that_of_the_timesteps():
    process = _process()
    log_snr = process.log_snr(np.array([3, 0]))
    np.testing.assert_array_equal(log_snr, diffusion.log_snr(process.alphas_bar[[3, 0]]))
    assert log_snr.dtype == np.float64


def test_levels_are_exact_in_float32():
    """Where floor(low + u (high - low)) would be high: u is the largest float32 below 1."""
    process = _process()
    low, high = (jnp.asarray(index) for index in np.triu_indices(1025, 1))
    u = np.nextafter(np.float32(1), np.float32(0))
    assert jnp.any(jnp.floor(low + u * (high - low)) == high)
    level = process.level(low, high, jnp.full(low.shape, u))
    np.testing.assert_array_equal(level, high - 1)
    assert level.dtype == jnp.int32


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_simple_loss(variance):
    x0, noise, output = _example()
    eps = output[..., :2]
    weight = P2()(diffusion.log_snr(_process().alphas_bar))
    seen = {}

    def apply_fn(x_t, t, y):
        seen.update(x_t=x_t, t=t, y=y)
        return jnp.asarray(eps)

    process = _process(variance)
    losses = process.losses(apply_fn, x0, TIMESTEPS, noise, np.arange(7))
    expected = np.mean((eps - noise) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(seen["t"], TIMESTEPS)
    np.testing.assert_array_equal(seen["y"], np.arange(7))
    np.testing.assert_allclose(seen["x_t"], process.noised(x0, TIMESTEPS, noise))
    weighted = _process(variance, loss_weight=weight).losses(apply_fn, x0, TIMESTEPS, noise)
    np.testing.assert_allclose(weighted, weight[TIMESTEPS] * expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hybrid_loss(dtype):
    x0, noise, output = _example()
    output = jnp.asarray(output, dtype)
    weight = np.linspace(1, 3, T)
    process = _process(loss_weight=weight)
    losses = jax.jit(lambda x0: process.losses(lambda *_: output, x0, TIMESTEPS, noise))(x0)
    assert losses.shape == (7,)
    assert losses.dtype == jnp.float32
    output = np.asarray(output, np.float64)
    mse = np.mean((output[..., :2] - noise) ** 2, axis=(1, 2, 3))
    bound = [
        _bound(*example, t, process.alphas_bar)
        for *example, t in zip(x0, noise, output, TIMESTEPS, strict=True)
    ]
    expected = weight[TIMESTEPS] * mse + T / 1000 * np.array(bound)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    # The bound must be large enough in these sums for the comparison to see an error in it.
    assert np.all(T / 1000 * np.array(bound) > 2e-3 * expected)


def test_decoder_is_finite_far_from_the_data():
    process = _process()
    x0, noise, output = _example()
    far = jnp.asarray(output).at[..., :2].add(100.0)
    t = np.zeros(7, int)

    def total(output):
        return process.losses(lambda *_: output, x0, t, noise).sum()

    loss, gradient = jax.jit(jax.value_and_grad(total))(far)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


DECODER = GaussianDiffusion(
    diffusion.alphas_bar("cosine", 1000), "learned_range", loss_weight=np.zeros(1000)
)


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def _decoder_at_0(channels, error, data):
    """The gradient in the channels of the variance, and the losses, of predictions that err."""
    output = jnp.concatenate([error.reshape(data.shape), channels], -1)
    t = np.zeros(len(error), int)
    loss = DECODER.losses(lambda *_: output, data, t, jnp.zeros(data.shape))
    return jnp.sum(loss), loss


@pytest.mark.parametrize("v", [-1.0, 0.5])
@pytest.mark.parametrize("x0", [-1.0, 0.2, 1.0])
def test_decoder_is_exact_and_its_gradient_exact_up_to_27_nats_and_bounded(x0, v):
    """At t = 0, for predictions 0 to a million standard deviations from the data, both sides."""
    process = DECODER
    far = np.append(0, np.geomspace(0.1, 1e6, 60))
    error = np.concatenate([-far, far]).astype(np.float32)
    data = np.full((len(error), 1, 1, 1), x0, np.float32)
    gradient, loss = _decoder_at_0(np.full(data.shape, v, np.float32), error, data)
    constants = posterior(process.steps(process.span))
    range_ = constants.log_greatest[0] - constants.log_least[0]
    nats = np.asarray(loss, np.float64) * np.log(2)
    slope = np.ravel(gradient) * np.log(2) * 2 / range_

    sigma = np.exp((constants.log_least[0] + (v + 1) / 2 * range_) / 2)
    shift = error * np.sqrt(1 / process.alphas_bar[0] - 1)  # of the data from the mean
    # The bin in the lower tail: its right end and its left end in standard deviations.
    right, left = (1 / 255 - abs(shift)) / sigma, (-1 / 255 - abs(shift)) / sigma
    if x0 != 0.2:
        outwards = -shift * np.sign(x0)  # towards the side where the bin has no end
        right, left = (1 / 255 + outwards) / sigma, np.full(shift.shape, -1e9)
    upper, lower = stats.norm.logcdf(right), stats.norm.logcdf(left)
    exact = -(upper + np.log1p(-np.exp(lower - upper)))
    np.testing.assert_allclose(nats, exact, rtol=2e-4, atol=2e-5)
    # d/d(log variance) of log(cdf(right) - cdf(left)).
    flow = lambda at: at * np.exp(stats.norm.logpdf(at) + exact)
    near = exact < 27
    expected = (flow(right) - flow(left))[near] / 2
    np.testing.assert_allclose(slope[near], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(slope[exact > 28], -12 * np.log(10), rtol=1e-5)
    assert (exact > 28).sum() > 10 and near.sum() > 20


def test_bound_trains_only_the_variance_channels():
    process = _process(loss_weight=np.zeros(T))
    x0, noise, output = _example()

    def total(output):
        return process.losses(lambda *_: output, x0, TIMESTEPS, noise).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(output)))
    np.testing.assert_array_equal(gradient[..., :2], 0)
    assert np.all(np.abs(gradient[..., 2:]).max(axis=(1, 2, 3)) > 0)


def test_loss_ignores_no_channel_silently():
    x0, noise, output = _example()
    for variance, channels in (("fixed_large", 4), ("learned_range", 2)):
        with pytest.raises(ValueError, match="needs a model output of shape"):
            _process(variance).losses(
                lambda *_, c=channels: jnp.asarray(output[..., :c]), x0, TIMESTEPS, noise
            )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alphas_bar": np.ones((2, 2)) / 2}, "shape"),
        ({"alphas_bar": []}, "shape"),
        ({"alphas_bar": [0.5, 0.5]}, "strictly decreasing"),
        ({"alphas_bar": [0.5, 0.0]}, r"\(0, 1\)"),
        ({"alphas_bar": [1.0, 0.5]}, r"\(0, 1\)"),
        ({"alphas_bar": [np.nan, 0.5]}, r"\(0, 1\)"),
        ({"alphas_bar": [0.5], "variance": "learned"}, "unknown variance 'learned'"),
        ({"alphas_bar": [0.5], "loss_weight": [1, 2]}, "loss_weight must have the shape"),
    ],
)
def test_process_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**kwargs)


def test_process_is_a_static_constant():
    alphas_bar = np.array([0.5, 0.25])
    process = GaussianDiffusion(alphas_bar)
    alphas_bar[0] = 0.9
    np.testing.assert_array_equal(process.alphas_bar, [0.5, 0.25])
    with pytest.raises(ValueError, match="read-only"):
        process.alphas_bar[0] = 0.9
    assert {process: 1}[process] == 1
    assert process != GaussianDiffusion([0.5, 0.25])


def test_steps():
    process = GaussianDiffusion(diffusion.alphas_bar("linear", 1000), "fixed_small")
    # 999 / 4 = 249.75, rounded.
    fewer = process.steps(5)
    np.testing.assert_array_equal(fewer.t, [0, 250, 500, 749, 999])
    np.testing.assert_array_equal(fewer.signal, [1, *process.alphas_bar[fewer.t]])
    np.testing.assert_array_equal(fewer.noise, 1 - fewer.signal)
    assert fewer.start == 1
    # LDM's end with the noise of timestep 0.
    assert process.steps(200, "ldm").signal[0] == process.alphas_bar[0]
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=r"1 \.\. 1000"):
            process.steps(num_steps)


def test_equal_settings_give_the_same_process():
    default = diffusion.gaussian()
    assert diffusion.gaussian(1000, variance="fixed_large", loss_weight=None) is default
    weighted = diffusion.gaussian(loss_weight=P2(k=2.0))
    assert diffusion.gaussian(prediction="epsilon", loss_weight=P2(2.0, 1.0)) is weighted
    assert weighted is not default and diffusion.gaussian(loss_weight=P2()) is not weighted
    weight = 1 / (2 + np.exp(default.log_snr(np.arange(1000))))
    np.testing.assert_allclose(weighted.loss_weight, weight)
    v = diffusion.gaussian(prediction="v", loss_weight=P2(k=2.0))
    np.testing.assert_allclose(v.loss_weight, weight * v.alphas_bar)


def test_a_loss_weight_that_float32_can_not_hold_is_refused():
    with pytest.raises(
        ValueError, match=r"weights of P2\(k=1e\+30, gamma=5.0\) are all 0 in float32"
    ):
        diffusion.gaussian(loss_weight=P2(1e30, 5.0))


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_v_says_the_same_as_the_epsilon_it_stands_for(variance):
    x0, noise, output = _example()
    eps, channels = output[..., :2].astype(np.float64), output[..., 2:]
    signal = _process().alphas_bar[TIMESTEPS][:, None, None, None]
    x_t = np.sqrt(signal) * x0 + np.sqrt(1 - signal) * noise
    # v of the data that eps leads to, by its definition.
    data = (x_t - np.sqrt(1 - signal) * eps) / np.sqrt(signal)
    v = np.sqrt(signal) * eps - np.sqrt(1 - signal) * data
    process = _process(variance, prediction="v")
    learned = variance == "learned_range"

    def losses(process, prediction):
        parts = [prediction, channels] if learned else [prediction]
        output = np.concatenate(parts, -1).astype(np.float32)
        return jax.jit(lambda: process.losses(lambda *_: output, x0, TIMESTEPS, noise))()

    error = np.mean((v - (np.sqrt(signal) * noise - np.sqrt(1 - signal) * x0)) ** 2, (1, 2, 3))
    # The error of epsilon over sqrt(alphas_bar) is that of v.
    squared = np.mean((eps - noise) ** 2, (1, 2, 3))
    np.testing.assert_allclose(error, squared / signal.ravel(), rtol=1e-6)
    bound = (
        T
        / 1000
        * np.array(
            [
                _bound(*row, _process().alphas_bar)
                for row in zip(x0, noise, output, TIMESTEPS, strict=True)
            ]
        )
    )
    np.testing.assert_allclose(losses(process, v), error + learned * bound, rtol=2e-4)
    weighted = _process(variance, prediction="v", loss_weight=process.alphas_bar)
    np.testing.assert_allclose(losses(weighted, v), losses(_process(variance), eps), rtol=2e-4)
    output = jnp.concatenate([v, channels] if learned else [v], -1)
    parts = process.predict(lambda *_: output, jnp.float32(x_t), TIMESTEPS)
    np.testing.assert_allclose(parts.x0, data, rtol=1e-3, atol=1e-3 * np.abs(data).max())
    np.testing.assert_allclose(parts.noise, eps, atol=1e-5)
