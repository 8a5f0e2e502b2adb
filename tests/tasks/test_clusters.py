"""Which levels and which tasks are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.diffusion.edm import EDM
from ant_jax.diffusion.flow import Flow
from ant_jax.diffusion.gaussian import gaussian
from ant_jax.tasks import clusters

PROCESSES = {
    "gaussian": gaussian(1000, "linear"),
    "flow": Flow(density="mode"),
    "edm": EDM(mean=0.0),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_near_noise_are_suppressed_inside_their_task(name):
    process, factor = PROCESSES[name], 5.0
    border = process.at_log_snr(np.float64(-5))
    if name == "gaussian":
        assert abs(border - 700) <= 2
    level = clusters.suppressed(process, factor, -5.0)
    kind = jnp.int32 if name == "gaussian" else jnp.float32
    u = (jnp.arange(20_000) + 0.5) / 20_000
    # A task of data, one with the border, and one of noise alone.
    ends = np.array([0, border / 2, (border + process.span) / 2, process.span])
    ends = jnp.asarray(ends.astype(kind))
    at = jax.jit(lambda low, high: (level(low, high, u), process.level(low, high, u)))
    for task in range(3):
        low, high = ends[task], ends[task + 1]
        found, plain = map(np.asarray, at(low, high))
        assert found.min() >= low and found.max() < high
        if task == 1:
            share = lambda a, b: float(process.cdf(np.float64(b)) - process.cdf(np.float64(a)))
            below = factor * share(low, border)
            expected = below / (below + share(border, high))
            np.testing.assert_allclose((found < border).mean(), expected, atol=1e-3)
            # Beyond the border the density is that of the process.
            inside = lambda levels: np.median(levels[levels >= border])
            np.testing.assert_allclose(inside(found), inside(plain), rtol=1e-2)
        else:
            np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1)


def test_a_curriculum_begins_with_the_noisiest_task():
    tasks = [clusters.curriculum(jnp.int32(step), 3, 10).tolist() for step in (0, 9, 10, 20, 99)]
    assert tasks == [[2, 2, 2], [2, 2, 2], [1, 1, 2], [0, 1, 2], [0, 1, 2]]
    for k in (1, 2, 5, 8):
        for stage in range(k):
            found = np.asarray(clusters.curriculum(jnp.int32(stage), k, 1))
            counts = np.bincount(found, minlength=k)
            assert (np.diff(found) >= 0).all() and (counts[: k - stage - 1] == 0).all()
            assert np.ptp(counts[k - stage - 1 :]) <= 1
