"""Times one call of each weighting under jit: ``python -m benchmarks.weighting``."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax import mtl, settings

REPEATS = 400


def main():
    print(f"{'k':>2} {'weighting':<12} {'gradients':<16} {'median us':>9}")
    for k in (2, 5, 8):
        calls = _calls(k)
        for row, microseconds in _median_us(calls).items():
            weighting, gradients = row
            print(f"{k:2} {weighting:<12} {gradients:<16} {microseconds:9.1f}")


def _calls(k):
    rng = np.random.default_rng(k)
    gradients = {"random": rng.normal(size=(k, 100))}
    gradients["nearly parallel"] = rng.normal(size=100) + 1e-3 * gradients["random"]
    gradients["opposed"] = np.concatenate([gradients["random"][:-1], -gradients["random"][:1]])
    calls = {}
    for name in settings.names_in(mtl, mtl.Weighting):
        weighting = settings.resolve(mtl, name, mtl.Weighting)(k)
        weigh, state = jax.jit(weighting.weigh), weighting.init()
        for kind, g in gradients.items():
            if kind == "random" or "gram" in weighting.needs:
                gram = jnp.asarray(g @ g.T, jnp.float32)
                stats = mtl.TaskStats(jnp.ones(k), gram, jnp.ones(k))
                calls[name, kind] = functools.partial(weigh, stats, state)
    return calls


def _median_us(calls):
    """Median times of the calls, in turn, so that other work on the machine affects all equally."""
    times = {row: [] for row in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(REPEATS):
        for row, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[row].append(time.perf_counter() - start)
    return {row: 1e6 * float(np.median(values)) for row, values in times.items()}


if __name__ == "__main__":
    main()
