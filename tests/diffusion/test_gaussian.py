"""The process and its losses against float64 NumPy written from other forms of the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ant_jax import diffusion
from ant_jax.diffusion import GaussianDiffusion, loss_weights, respace

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


def test_q_sample_inverts_and_has_the_right_moments():
    process = _process()
    t = np.repeat([0, 4, 9], 20000)
    x0 = np.tile(np.array([0.7, -0.2], np.float32), (len(t), 1, 1, 1))
    noise = np.random.default_rng(0).normal(size=x0.shape).astype(np.float32)
    x_t = process.q_sample(x0, t, noise)
    assert x_t.dtype == jnp.float32
    for step in (0, 4, 9):
        signal = process.alphas_bar[step]
        rows = np.asarray(x_t)[t == step, 0, 0]
        np.testing.assert_allclose(rows.mean(0), np.sqrt(signal) * x0[0, 0, 0], atol=0.03)
        np.testing.assert_allclose(rows.std(0), np.sqrt(1 - signal), rtol=0.02)
    # At the last timestep next to no signal is left, so x0 can't be recovered in float32 there.
    np.testing.assert_allclose(process.predict_x0(x_t, t, noise)[:40000], x0[:40000], atol=1e-5)
    np.testing.assert_allclose(process.predict_eps(x_t, t, x0), noise, atol=1e-4)


def test_constants():
    process = _process()
    np.testing.assert_allclose(np.cumprod(1 - process.betas), process.alphas_bar)
    np.testing.assert_array_equal(process.alphas_bar_prev, [1, *process.alphas_bar[:-1]])
    np.testing.assert_allclose(process.log_snr, diffusion.log_snr(process.alphas_bar))
    # In terms of precisions: 1 / variance = alpha / beta + 1 / (1 - alphas_bar_prev).
    precision = (1 - process.betas) / process.betas + 1 / (1 - process.alphas_bar_prev + 1e-300)
    np.testing.assert_allclose(process.posterior_variance, 1 / precision, atol=1e-200)
    clipped = np.exp(process.posterior_log_variance_clipped)
    np.testing.assert_allclose(clipped, process.posterior_variance[[1, *range(1, T)]])
    assert np.isfinite(GaussianDiffusion([0.5]).posterior_log_variance_clipped).all()


def test_levels_stay_in_their_interval():
    """At the largest float32 below 1 too, for every interval of 1000 timesteps and more."""
    process = _process()
    low, high = np.triu_indices(1025, 1)
    for u in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        level = process.level(jnp.asarray(low), jnp.asarray(high), jnp.full(len(low), u))
        assert jnp.all((low <= level) & (level < high)) and level.dtype == jnp.int32
    np.testing.assert_array_equal(level, high - 1)


def test_model_log_variance():
    t = np.arange(T)
    for variance, expected in (
        ("fixed_small", _process().posterior_log_variance_clipped),
        ("fixed_large", np.log(_process().betas)),
    ):
        log_variance = _process(variance).model_log_variance(t)
        np.testing.assert_allclose(log_variance[:, 0, 0, 0], expected, rtol=1e-5)
        for v in (-1, 1):
            learned = _process().model_log_variance(t, jnp.full((T, 2, 2, 1), v))
            match = (v == 1) == (variance == "fixed_large")
            assert np.allclose(learned, log_variance, rtol=1e-5) == match


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_simple_loss(variance):
    x0, noise, output = _example()
    eps = output[..., :2]
    weight = loss_weights.p2(_process().log_snr)
    seen = {}

    def apply_fn(x_t, t, y):
        seen.update(x_t=x_t, t=t, y=y)
        return jnp.asarray(eps)

    process = _process(variance)
    losses = process.per_example_losses(apply_fn, x0, TIMESTEPS, noise, np.arange(7))
    expected = np.mean((eps - noise) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(seen["t"], TIMESTEPS)
    np.testing.assert_array_equal(seen["y"], np.arange(7))
    np.testing.assert_allclose(seen["x_t"], process.q_sample(x0, TIMESTEPS, noise))
    weighted = _process(variance, loss_weight=weight).per_example_losses(
        apply_fn, x0, TIMESTEPS, noise
    )
    np.testing.assert_allclose(weighted, weight[TIMESTEPS] * expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hybrid_loss(dtype):
    x0, noise, output = _example()
    output = jnp.asarray(output, dtype)
    weight = np.linspace(1, 3, T)
    process = _process(loss_weight=weight)
    losses = jax.jit(
        lambda x0: process.per_example_losses(lambda *_: output, x0, TIMESTEPS, noise)
    )(x0)
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
        return process.per_example_losses(lambda *_: output, x0, t, noise).sum()

    loss, gradient = jax.jit(jax.value_and_grad(total))(far)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("v", [-1.0, 0.5])
@pytest.mark.parametrize("x0", [-1.0, 0.2, 1.0])
def test_decoder_is_exact_and_its_gradient_exact_up_to_27_nats_and_bounded(x0, v):
    """At t = 0, for predictions 0 to a million standard deviations from the data, both sides."""
    process = GaussianDiffusion(
        diffusion.alphas_bar("cosine", 1000), "learned_range", loss_weight=np.zeros(1000)
    )
    far = np.append(0, np.geomspace(0.1, 1e6, 60))
    error = np.concatenate([-far, far]).astype(np.float32)
    data = np.full((len(error), 1, 1, 1), x0, np.float32)

    def losses(channels):
        output = jnp.concatenate([jnp.asarray(error).reshape(data.shape), channels], -1)
        t = np.zeros(len(error), int)
        loss = process.per_example_losses(lambda *_: output, data, t, jnp.zeros(data.shape))
        return jnp.sum(loss), loss

    channels = jnp.full(data.shape, v)
    gradient, loss = jax.grad(losses, has_aux=True)(channels)
    range_ = np.log(process.betas[0]) - process.posterior_log_variance_clipped[0]
    nats = np.asarray(loss, np.float64) * np.log(2)
    slope = np.ravel(gradient) * np.log(2) * 2 / range_

    sigma = np.exp((process.posterior_log_variance_clipped[0] + (v + 1) / 2 * range_) / 2)
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
        return process.per_example_losses(lambda *_: output, x0, TIMESTEPS, noise).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(output)))
    np.testing.assert_array_equal(gradient[..., :2], 0)
    assert np.all(np.abs(gradient[..., 2:]).max(axis=(1, 2, 3)) > 0)


def test_loss_ignores_no_channel_silently():
    x0, noise, output = _example()
    for variance, channels in (("fixed_large", 4), ("learned_range", 2)):
        with pytest.raises(ValueError, match="needs a model output of shape"):
            _process(variance).per_example_losses(
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
        ({"alphas_bar": [0.5], "timestep_map": [0, 1]}, "timestep_map must have the shape"),
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


def test_respace():
    weight = np.arange(1000.0)
    process = GaussianDiffusion(
        diffusion.alphas_bar("linear", 1000), "fixed_small", loss_weight=weight
    )
    # 999 / 4 = 249.75, rounded.
    fewer = respace(process, 5)
    np.testing.assert_array_equal(fewer.timestep_map, [0, 250, 500, 749, 999])
    np.testing.assert_array_equal(fewer.alphas_bar, process.alphas_bar[fewer.timestep_map])
    np.testing.assert_array_equal(fewer.loss_weight, weight[fewer.timestep_map])
    np.testing.assert_array_equal(fewer.model_timesteps(jnp.array([4, 0])), [999, 0])
    assert fewer.variance == "fixed_small"
    np.testing.assert_array_equal(respace(fewer, 3).timestep_map, [0, 500, 999])
    np.testing.assert_array_equal(respace(process, 1).timestep_map, [999])
    for num_steps in (2, 7, 250, 667, 999, 1000):
        part = respace(process, num_steps)
        assert part.num_timesteps == num_steps
        assert np.all(np.diff(part.timestep_map) > 0)
        assert np.all((part.betas > 0) & (part.betas < 1))
    np.testing.assert_array_equal(part.alphas_bar, process.alphas_bar)
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=r"1 \.\. 1000"):
            respace(process, num_steps)


def test_respaced_losses_call_the_model_with_its_own_timesteps():
    x0, noise, output = _example()
    seen = []

    def apply_fn(x_t, t, y):
        seen.append(np.asarray(t))
        return jnp.asarray(output[..., :2])

    respace(_process("fixed_large"), 4).per_example_losses(apply_fn, x0, np.full(7, 2), noise)
    np.testing.assert_array_equal(seen, [np.full(7, 6)])


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
        output = jnp.asarray(np.concatenate(parts, -1), jnp.float32)
        return process.per_example_losses(lambda *_: output, x0, TIMESTEPS, noise)

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
    parts = process.predicted_parts(jnp.asarray(v, jnp.float32), jnp.float32(x_t), TIMESTEPS)
    np.testing.assert_allclose(parts[0], data, rtol=1e-3, atol=1e-3 * np.abs(data).max())
    np.testing.assert_allclose(parts[1], eps, atol=1e-5)
