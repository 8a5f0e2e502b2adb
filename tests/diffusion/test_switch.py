"""Samplers with a model for each noise level, against the models run alone and NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ant_jax import diffusion
from ant_jax.diffusion import GaussianDiffusion, switch_by_level
from ant_jax.diffusion.samplers import SampleOptions, ddim, ddpm
from ant_jax.models.dit import DiT

T = 40
PROCESS = GaussianDiffusion(diffusion.alphas_bar("cosine", T), "learned_range")
# So little noise that float32 adds up 40 steps to five digits.
FIXED = GaussianDiffusion(np.linspace(0.99, 0.3, T))
KEY = jax.random.key(3)
NETWORK = DiT(width=16, depth=1, heads=2, patch=2, channels=1, num_classes=3, learned_variance=True)


def _dit_params(seed):
    """Random parameters: those of the initialisation return zero for whatever input."""
    labels = jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(NETWORK.init, KEY, jnp.zeros((1, 4, 4, 1)), labels, labels)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.float32(0.3 * rng.standard_normal(s.shape)), shapes)


def _stack(*params):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def _draw_dit(sampler, apply_fn):
    options = SampleOptions(num_steps=7, guidance=2.0, clip_x0=False)
    return sampler(PROCESS, apply_fn, (3, 4, 4, 1), KEY, options, jnp.array([0, 2, 1]), 3)


@pytest.mark.parametrize("sampler", [ddpm(), ddim()], ids=["ddpm", "ddim"])
def test_copies_of_a_model_and_one_of_several_draw_its_samples_bit_by_bit(sampler):
    one, other = _dit_params(0), _dit_params(1)
    expected = [_draw_dit(sampler, Partial(NETWORK.apply, params)) for params in (one, other)]
    assert np.abs(expected[0] - expected[1]).max() > 0.1

    def draw(params, boundaries, which):
        apply_fn = switch_by_level(NETWORK.apply, params, boundaries, which)
        return np.asarray(_draw_dit(sampler, apply_fn))

    copies = draw(_stack(one, one, one), [0, 10, 20, T], range(3))
    np.testing.assert_array_equal(copies, expected[0])
    for i in range(2):
        chosen = draw(_stack(one, other, other), [0, 10, 20, T], [i] * 3)
        np.testing.assert_array_equal(chosen, expected[i])


def _constant(params, x, t, y):
    return jnp.broadcast_to(params["eps"], x.shape)


def _constant_by_label(params, x, t, y):
    """Guided by 2: twice the constant, minus t / 100."""
    eps = jnp.where(y == 1, params["eps"], 0.01 * t)
    return jnp.broadcast_to(eps[:, None, None, None], x.shape)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("num_steps", [T, 5])
def test_each_timestep_has_its_own_model(num_steps, guided):
    """Constants that differ by 0.1 move the sum of the steps by 0.001 at least, each its own."""
    rng = np.random.default_rng(0)
    which, eps = rng.permutation(T), 0.1 * rng.permutation(T) - 2
    samples = ddim()(
        FIXED,
        switch_by_level(
            _constant_by_label if guided else _constant,
            {"eps": jnp.float32(eps)},
            np.arange(T + 1),
            which,
        ),
        (2, 1, 1, 1),
        KEY,
        SampleOptions(num_steps, guidance=2.0 if guided else 1.0, clip_x0=False),
        jnp.ones(2, jnp.int32) if guided else None,
        0 if guided else None,
    )
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, i), num_steps) for i in range(2)]
    x = np.array([jax.random.normal(key, (1, 1, 1)) for key in keys], np.float64)
    timesteps = np.rint(np.linspace(0, T - 1, num_steps)).astype(int)
    alphas_bar = np.append(1.0, FIXED.alphas_bar[timesteps])
    for i in range(num_steps)[::-1]:
        t = timesteps[i]
        noise = 2 * eps[which[t]] - 0.01 * t if guided else eps[which[t]]
        x0 = (x - np.sqrt(1 - alphas_bar[i + 1]) * noise) / np.sqrt(alphas_bar[i + 1])
        x = np.sqrt(alphas_bar[i]) * x0 + np.sqrt(1 - alphas_bar[i]) * noise
    np.testing.assert_allclose(samples, x, rtol=1e-5, atol=1e-5)


def test_boundaries_hold_in_a_respaced_sampler():
    """The models report t: the second one is used from its first timestep on, and not before."""
    seen = []

    def report(params, x, t, y):
        jax.debug.callback(lambda *pair: seen.append(tuple(map(int, pair))), t[0], params)
        return jnp.zeros_like(x)

    timesteps = np.rint(np.linspace(0, T - 1, 5)).astype(int)
    for boundary in (timesteps[2], timesteps[2] + 1):
        seen.clear()
        apply_fn = switch_by_level(report, jnp.arange(2), [0, boundary, T], [0, 1])
        ddim()(FIXED, apply_fn, (2, 1, 1, 1), KEY, SampleOptions(5))
        jax.effects_barrier()
        assert sorted(seen) == [(t, int(t >= boundary)) for t in timesteps]


def test_neither_another_choice_nor_other_parameters_compile_again():
    traced = []

    class Network:
        def apply(self, params, x, t, y):
            traced.append(None)
            return params["slope"] * x

    network = Network()

    def draw(slopes, which):
        # A bound method is a new object each time, equal to the last.
        params = {"slope": jnp.float32(slopes)}
        apply_fn = switch_by_level(network.apply, params, np.arange(T + 1), which)
        return ddpm()(FIXED, apply_fn, (2, 2, 2, 1), KEY, SampleOptions(4))

    first = draw([0.1, 0.9], np.arange(T) // 20)
    count = len(traced)
    # Not once a model or a step either.
    assert 0 < count < 4
    for slopes, which in (
        ([0.1, 0.9], np.arange(T) // 30),
        ([0.2, 0.9], np.arange(T) // 20),
        ([0.1, 0.9], (np.arange(T) // 20).tolist()),
        ([0.1, 0.9], jnp.arange(T, dtype=jnp.int8) // 39),
    ):
        same = np.array_equal(which, np.arange(T) // 20) and slopes == [0.1, 0.9]
        assert np.array_equal(draw(slopes, which), first) == same
    assert len(traced) == count


@pytest.mark.parametrize(
    ("params", "which", "message"),
    [
        ({"a": np.zeros((2, 3))}, [0, 2], r"which\[1\] must be in \[0, 2\), got 2"),
        ({"a": np.zeros((2, 3))}, [0, 1, -1], r"which\[2\] must be in \[0, 2\), got -1"),
        ({"a": np.zeros((0, 3))}, [0], r"which\[0\] must be in \[0, 0\)"),
        ({"a": np.zeros((2, 3))}, [0.0, 1.0], r"which must be \(n,\) integers, got float64"),
        ({"a": np.zeros((2, 3))}, [[0, 1]], r"which must be .*\(1, 2\)"),
        ({"a": np.zeros((2, 3))}, np.zeros(0, int), r"which must be .*\(0,\)"),
        (
            {"a": np.zeros((2, 3)), "b": {"c": np.zeros((2, 3)), "d": np.zeros((3, 3))}},
            [0],
            r"\['a'\].*\(2,\).*params\['b'\]\['d'\].*\(3,\)",
        ),
        ({"a": np.zeros(2), "b": 1.0}, [0], r"params\['b'\]"),
        ({"a": 1.0}, [0], r"params\['a'\].*scalar"),
        ({}, [0], "no leaves"),
    ],
)
def test_errors(params, which, message):
    with pytest.raises(ValueError, match=message):
        switch_by_level(_constant, params, np.arange(np.size(which) + 1), which)


def test_a_continuous_process():
    """The first model is used up to the boundary alone."""
    draw = lambda denoise: np.asarray(
        ddim()(diffusion.Flow(), denoise, (1, 1, 1, 1), KEY, SampleOptions(4, clip_x0=False))
    )
    model = Partial(switch_by_level, _constant, {"eps": jnp.float32([1.0, -2.0])})
    # The steps begin at 1/4, 1/2, 3/4 and 1, and each moves by its velocity times 1/4.
    first = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, 0), 4)))
    for boundary, low in ((0.5, 1), (0.51, 2), (0.0, 0)):
        moved = 0.25 * (low * 1.0 + (4 - low) * -2.0)
        samples = draw(model([0.0, boundary, 1.0], [0, 1]))
        np.testing.assert_allclose(samples.item(), first - moved, rtol=1e-5)


def test_boundaries_are_checked():
    params = {"eps": np.zeros(2)}
    for boundaries in ([0, T], [0, 30, 20]):
        with pytest.raises(ValueError, match="2 intervals need 3 boundaries that do not decrease"):
            switch_by_level(_constant, params, boundaries, [0, 1])
