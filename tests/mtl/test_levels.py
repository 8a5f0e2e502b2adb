"""The learned uncertainty of levels, which weighs examples inside the tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl.backward import FORMS

K, B = 4, 48
TASKS = np.arange(B) * K // B
_rng = np.random.default_rng(0)
PARAMS = {"in": np.float32(_rng.normal(size=(5, 3))), "out": np.float32(_rng.normal(size=3))}
BATCH = {"x": np.float32(_rng.normal(size=(B, 5))), "y": np.float32(_rng.normal(size=B))}
LEVELS = np.linspace(-1, 1, B, dtype=np.float32)


def losses_fn(params, batch):
    return 0.1 + (jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2


def backward(weighting, state, batch=BATCH, tasks=TASKS, levels=LEVELS, scale=1.0, **settings):
    each = lambda params, batch: scale * losses_fn(params, batch)
    return mtl.backward(
        each, PARAMS, batch, weighting, state, tasks=tasks, levels=levels, **settings
    )


def warm(weighting):
    """A state in which the levels have different weights."""
    state = mtl.init_combine(weighting)
    coefficients = np.float32(np.random.default_rng(1).normal(size=128))
    return state._replace(weighting_state=state.weighting_state._replace(coefficients=coefficients))


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


def test_a_piecewise_constant_u_is_uncertainty_weighting():
    """With the 1/k of `uncertainty` u is its s, and all weights are its weights times 2/k."""
    # The level of an example is the number of its task.
    constant = lambda levels: np.sqrt(K) * jax.nn.one_hot(jnp.int32(levels), K)
    continuous = mtl.level_uncertainty(mtl.linear(K), 0.025, constant)
    per_task = mtl.uncertainty(K, 0.025)

    def step(states, factors):
        # Losses that change from step to step, other than by a common factor.
        batch = BATCH | {"y": BATCH["y"] * factors}
        a = backward(continuous, states[0], batch, levels=np.float32(TASKS), scale=1 / K)
        b = backward(per_task, states[1], batch, levels=None)
        return (a.state, b.state), (a.gradient, b.gradient, a.losses, b.losses)

    first = mtl.init_combine(continuous), mtl.init_combine(per_task)
    factors = np.float32(_rng.uniform(0, 4, size=(40, B)))
    (a, b), found = jax.jit(lambda: jax.lax.scan(step, first, factors))()
    u, s = a.weighting_state.coefficients, b.weighting_state.log_variance
    assert np.ptp(s) > 0.05
    np.testing.assert_allclose(u, s, rtol=1e-4, atol=1e-5)
    gradient, expected, losses, expected_losses = found
    assert_close(gradient, jax.tree.map(lambda leaf: 2 / K * leaf, expected))
    # The losses come back without their weights.
    np.testing.assert_allclose(losses, expected_losses / K, rtol=1e-5)


def test_u_becomes_the_logarithm_of_the_mean_loss():
    weighting = mtl.level_uncertainty(mtl.vanilla(1), 0.01)
    rule, mean = weighting.levels, lambda c: jnp.exp(2 * c + jnp.sin(3 * c))

    def step(state, key):
        level_key, noise_key = jax.random.split(key)
        levels = jax.random.normal(level_key, (64,)) / 2
        losses = mean(levels) * jax.random.exponential(noise_key, (64,))
        return rule.update(state, rule.gradient(state, levels, losses) / 64), None

    keys = jax.random.split(jax.random.key(0), 2000)
    state, _ = jax.jit(lambda: jax.lax.scan(step, weighting.init(), keys))()
    levels = np.linspace(-0.8, 0.8, 30, dtype=np.float32)
    np.testing.assert_allclose(1 / rule.weights(state, levels), mean(levels), rtol=0.3)


@pytest.mark.parametrize("name", ["db_mtl", "uncertainty"])
def test_the_method_sees_the_weighted_losses_in_every_form(name):
    """And learns the same u, also from microbatches and on devices."""
    method = getattr(mtl, name)(K)
    weighting = mtl.level_uncertainty(method, 0.1)
    state = warm(weighting)
    weights = weighting.levels.weights(state.weighting_state, LEVELS)
    # Of the method alone, on losses that were multiplied before.
    weighted = lambda params, part: losses_fn(params, part[0]) * part[1]
    inner = mtl.CombineState(state.weighting_state.state, state.weights, state.gram)
    alone = lambda: mtl.backward(
        weighted, PARAMS, (BATCH, weights), method, inner, tasks=TASKS, form="masked"
    )
    settings = [{"form": form} for form in (FORMS if name == "db_mtl" else ["masked"])]
    settings += [{"form": settings[0]["form"], "microbatches": 2}]
    want, found = jax.jit(
        lambda: (alone(), [backward(weighting, state, **each) for each in settings])
    )()
    losses = np.asarray(losses_fn(PARAMS, BATCH))
    gradient = weighting.levels.gradient(state.weighting_state, LEVELS, losses) / B
    learned = weighting.levels.update(state.weighting_state, gradient)
    # Of 6 devices some have two tasks.
    found += [on_devices(weighting, state, n) for n in ((8, 6) if name == "db_mtl" else (2,))]
    for each in found:
        assert_close(each.gradient, want.gradient)
        assert_close(each.state.weighting_state.state, want.state.weighting_state)
        np.testing.assert_allclose(each.losses, losses.reshape(K, -1).mean(1), rtol=1e-5)
        after = each.state.weighting_state
        np.testing.assert_allclose(after.adam[0].mu, learned.adam[0].mu, rtol=1e-3, atol=1e-5)


def on_devices(weighting, state, n):
    parts = jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), (BATCH, TASKS, LEVELS))
    of = lambda part: backward(weighting, state, *part, form="vmap", axis_name="devices")
    found = jax.device_get(jax.pmap(of, "devices", devices=jax.devices()[:n])(parts))
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], found)


def test_losses_that_are_zero_huge_or_not_finite():
    weighting = mtl.level_uncertainty(mtl.db_mtl(K), 1.0)
    rule, start = weighting.levels, weighting.init()
    levels = np.float32([0.3])
    many = jax.jit(
        lambda state, losses: jax.lax.scan(
            lambda s, loss: (rule.update(s, rule.gradient(s, levels, loss[None])), None),
            state,
            losses,
        )[0]
    )
    state = many(start, jnp.zeros(50))
    np.testing.assert_allclose(rule.weights(state, levels), np.exp(40), rtol=1e-5)
    state = many(state, jnp.full(50, 1e30))
    assert np.isfinite(state.coefficients).all() and rule.weights(state, levels) < 1e-9
    before = warm(weighting)
    batch = BATCH | {"y": BATCH["y"].copy()}
    batch["y"][3] = np.nan
    found = jax.jit(lambda: backward(weighting, before, batch, form="vmap"))()
    np.testing.assert_array_equal(np.isnan(found.losses), np.arange(K) == 0)
    jax.tree.map(np.testing.assert_array_equal, found.state.weighting_state, before.weighting_state)


def test_what_can_not_be():
    weighting = mtl.level_uncertainty(mtl.linear(K), 0.1)
    state = mtl.init_combine(weighting)
    with pytest.raises(ValueError, match=r"only mtl\.backward does that"):
        mtl.combine(weighting)
    for missing in ({"levels": None}, {"tasks": None}):
        with pytest.raises(ValueError, match="needs levels and tasks"):
            backward(weighting, state, **missing)
    with pytest.raises(ValueError, match="learning_rate must be > 0, got 0"):
        mtl.level_uncertainty(mtl.linear(K), 0)
    with pytest.raises(ValueError, match="weights of levels already"):
        mtl.level_uncertainty(weighting, 0.1)
