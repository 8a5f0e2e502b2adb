"""Steps of several layouts in one process of two; a program for `test_hosts`.

Two processes, of four devices each, take two steps of every case; process 0 compares them with
those of one device. Arguments: HOST:PORT of process 0, and the number of this process.
"""

import functools
import sys

import jax
import numpy as np
import optax
import small_step as t

from ant_jax import mtl
from ant_jax import train_step as ts
from ant_jax.runtime import connection, processes
from ant_jax.runtime.devices import parallel_step, parts_of, replicate
from ant_jax.runtime.process_failure import exit_all_on_error

BATCH, STEPS = 80, 2
# The update is the gradient, and the optimizer has no state.
OPTIMIZER = optax.identity()
# The method, k, and settings of the step.
CASES = {
    "two devices a task": ("imtl_g", 4, {"microbatches": 2}),
    "two tasks a device": ("krum", 16, {"form": "scan"}),
    "parts of two tasks a device": ("nash", 5, {}),
    "losses alone": ("uncertainty", 5, {"microbatches": 2}),
    "neither, uniform": ("vanilla", 5, {"draw": "uniform"}),
    "masked, uniform": ("imtl_g", 5, {"form": "masked", "draw": "uniform"}),
}


def of_cases(function):
    """{name: function(method, k, settings of the step)}."""
    return {
        name: function(getattr(mtl, method)(k), k, settings)
        for name, (method, k, settings) in CASES.items()
    }


def first_states():
    params = t.make_params()
    state = lambda weighting, *_: ts.init_state(params, OPTIMIZER, weighting)
    return jax.device_get(of_cases(state))


def step(states, batch, axis_name=None):
    """The steps of all cases, which share their draws, in one program."""

    def of(weighting, k, settings):
        boundaries = np.arange(k + 1) * t.T // k
        return t.step_fn(
            weighting, boundaries=boundaries, optimizer=OPTIMIZER, split=True, **settings
        )

    steps, (first, *_) = of_cases(of), states.values()
    found = {
        name: steps[name](states[name]._replace(step=first.step), batch, axis_name)
        for name in CASES
    }
    return tuple({name: both[i] for name, both in found.items()} for i in (0, 1))


def of_one_device(states, batch):
    one = jax.jit(step)
    for _ in range(STEPS):
        states, metrics = one(states, batch)
    return jax.device_get((states, metrics))


def of_all_devices(states, batch):
    """The same, but for the average; ``batch`` is that of this process. Replicas are equal."""
    devices = jax.local_devices()
    axes = dict.fromkeys(CASES, ts.TrainState(None, None, 0, None, None))
    states = parts_of(replicate(states, devices), devices, axes)
    many = parallel_step(step, devices, axes)
    many.lower(states, batch).compile()
    for _ in range(STEPS):
        # On CPUs a collective waits half a minute at most.
        processes.barrier()
        states, metrics = many(states, batch)
    found = {name: states[name]._replace(ema_params=None) for name in CASES}, metrics

    def bytes_of(leaf):
        (replica,) = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        return replica

    processes.assert_equal(lambda: {"found": jax.tree.map(bytes_of, found)})
    return jax.device_get(found)


def compare(found, want, first):
    change = functools.partial(jax.tree.map, np.subtract)
    for name, start in first.items():
        after, metrics = (each.pop(name) for each in found)
        expected, expected_metrics = (each.pop(name) for each in want)
        t.assert_close(change(after.params, start.params), change(expected.params, start.params))
        for a, b in zip(
            jax.tree.leaves((after.method_state, metrics)),
            jax.tree.leaves((expected.method_state, expected_metrics)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=name)


def main(coordinator, process):
    connection.initialize(coordinator, 2, process)
    with exit_all_on_error():
        batch, states = t.make_batch(BATCH), first_states()
        part = jax.tree.map(lambda leaf: np.split(leaf, 2)[process], batch)
        found = of_all_devices(states, part)
        if process == 0:
            compare(found, of_one_device(states, batch), states)
        # Process 0 must be the last to end.
        processes.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
