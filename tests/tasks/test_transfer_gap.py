import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.tasks.transfer_gap import transfer_gap

T = 20
BOUNDARIES = np.array([0, 3, 12, T])


def apply_fn(params, x, t, y):
    return jnp.full(x.shape, params["level"]) * (1 + 0.1 * t[:, None, None, None]) + y


def test_the_gap_is_what_the_specialist_saves_in_its_interval():
    traces = []

    @jax.jit
    def output(model, t):
        traces.append(1)
        return model(jnp.zeros((1, 1, 1, 1)), t[None], jnp.zeros(())).sum()

    def distance(model):
        return float(sum(output(model, jnp.int32(t)) for t in range(T)))

    cost = lambda level, low, high: sum(level * (1 + 0.1 * t) for t in range(low, high))
    specialists = [{"level": jnp.float32(level)} for level in (0.5, 3.0, 2.0)]
    gap = transfer_gap(distance, apply_fn, {"level": jnp.float32(2.0)}, specialists, BOUNDARIES)
    np.testing.assert_allclose(gap.multi_task, cost(2, 0, T), rtol=1e-5)
    saved = [cost(1.5, 0, 3), cost(-1.0, 3, 12), 0]
    # Positive where the specialist is better: negative transfer.
    np.testing.assert_allclose(gap.gap, saved, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gap.mixed, gap.multi_task - gap.gap, rtol=1e-6)
    assert len(traces) == 1


def test_a_specialist_for_each_interval():
    with pytest.raises(ValueError, match="3 intervals need 3 specialists, got 2"):
        transfer_gap(lambda model: 0.0, apply_fn, {}, [{}, {}], BOUNDARIES)
