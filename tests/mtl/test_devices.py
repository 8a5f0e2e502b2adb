"""Every method on 1, 2, 4 and 8 devices against plain gradients of one device.

Methods that take the same kind of backward pass share a program. `make test` runs one layout and
`make test-all` runs all. With -rP pytest shows the difference of every method.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_method import AGGREGATORS, FOLDER, HALVES, equal_replicas, flat

from ant_jax import mtl
from ant_jax.mtl.backward import FORMS
from ant_jax.mtl.shards import gathered, global_sum

STEPS = 2
SHAPES = {"in": (12, 8), "out": (8,), "without entries": (0, 3)}
_rng = np.random.default_rng(0)
PARAMS = {name: np.float32(0.4 * _rng.normal(size=shape)) for name, shape in SHAPES.items()}


def kind_of(method):
    return next((need for need in ("gram", "losses") if need in method.needs), "neither")


# By the backward pass that they take.
KINDS = {
    kind: [name for name, method in FOLDER.items() if kind_of(method(2)) == kind]
    for kind in ("gram", "losses", "neither")
}
KS, DEVICES = (2, 4, 5, 8, 16), (1, 2, 4, 8)
CASES = [
    (k, n, form, microbatches, parts)
    for k, n, form, microbatches, parts in itertools.product(
        KS, DEVICES, FORMS, (1, 2), (True, False)
    )
    # One device has no parts. Sixteen tasks take one form only.
    if (parts or n > 1) and (k < 16 or (form, microbatches, parts) == ("vmap", 1, True))
]
ON_EVERY_CHANGE = {(4, 8, "vmap", 2, True)}


def loss_of_each(params, batch):
    return (jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2


def batches(k):
    """(examples, tasks) of each step, for any number of devices."""
    size = 2 * math.lcm(k, 8)
    rng, tasks = np.random.default_rng(k), np.arange(size) * k // size
    draw = lambda *shape: np.float32(rng.normal(size=shape))
    # No loss is small, and no Gram matrix nearly singular, which would magnify what is rounded.
    return [
        ({"x": draw(size, SHAPES["in"][0]), "y": 3 * np.sign(draw(size))}, tasks)
        for _ in range(STEPS)
    ]


def made(names, k):
    return {name: FOLDER[name](k) for name in names}


def first_states(methods):
    return {name: method.init() for name, method in methods.items()}


def weigh_all(methods, stats, states):
    """The weights and the states of methods, by name."""
    found = {name: method.weigh(stats, states[name]) for name, method in methods.items()}
    return tuple({name: both[i] for name, both in found.items()} for i in (0, 1))


def together(methods, k):
    """One method for all. Its state is the number of the one that weighs, and the states of all."""

    def weigh(stats, state):
        number, states = state
        weights, states = weigh_all(methods, stats, states)
        return jnp.stack(list(weights.values()))[number], (number, states)

    needs = frozenset().union(*(method.needs for method in methods.values()))
    return mtl.Weighting(lambda: (np.int32(0), first_states(methods)), weigh, k, needs)


@functools.cache
def expected(k):
    """Of the last step: losses, gradients (k, P), and the weights and states of all methods."""
    methods = made(FOLDER, k)
    weigh = jax.jit(functools.partial(weigh_all, methods))
    losses_of = lambda params, batch: loss_of_each(params, batch).reshape(k, -1).mean(1)
    plain = jax.jit(lambda batch: (losses_of(PARAMS, batch), jax.jacrev(losses_of)(PARAMS, batch)))
    states = first_states(methods)
    for batch, tasks in batches(k):
        losses, jacobian = plain(batch)
        rows = flat(jacobian, 1)
        stats = mtl.TaskStats(losses, np.float32(rows @ rows.T), np.float32(np.bincount(tasks)))
        weights, states = weigh(stats, states)
    return losses, rows, *jax.device_get((weights, states))


def on_devices(n, function):
    """``function(params, state, batch, axis_name)``, compiled; all replicas must be equal."""
    if n == 1:
        compiled = jax.jit(functools.partial(function, axis_name=None))
        return lambda state, batch: jax.device_get(compiled(PARAMS, state, batch))
    mapped = jax.pmap(
        functools.partial(function, axis_name="devices"),
        "devices",
        in_axes=(None, None, 0),
        devices=jax.devices()[:n],
    )
    split = lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:])
    return lambda state, batch: equal_replicas(
        jax.device_get(mapped(PARAMS, state, jax.tree.map(split, batch)))
    )


def difference(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


def check(errors):
    for name, error in errors.items():
        print(f"{error:.1e} {name}")
    assert max(errors.values()) < 2e-5


@pytest.mark.parametrize(
    ("k", "n", "form", "microbatches", "parts"),
    [
        pytest.param(*case, marks=() if case in ON_EVERY_CHANGE else pytest.mark.slow)
        for case in CASES
    ],
)
def test_methods_on_devices_agree_with_plain_gradients(k, n, form, microbatches, parts):
    def backward(params, state, batch, axis_name):
        examples, tasks = batch
        found = mtl.backward(
            loss_of_each,
            params,
            examples,
            weighting,
            state,
            tasks=tasks,
            form=form,
            microbatches=microbatches,
            axis_name=axis_name,
            parts=parts,
        )
        if parts:
            back = lambda part, leaf: gathered(part, leaf.shape, axis_name)
            found = found._replace(gradient=jax.tree.map(back, found.gradient, params))
        return found

    losses, rows, weights, states = expected(k)
    *before, last = batches(k)
    errors = {}
    # The form is that of the k gradients: the others take one program.
    for kind in KINDS if form == FORMS[0] else ["gram"]:
        weighting = together(made(KINDS[kind], k), k)
        run = on_devices(n, backward)
        state = mtl.init_combine(weighting)
        for batch in before:
            state = run(state, batch).state
        _, inner = state.weighting_state
        for number, name in enumerate(KINDS[kind]):
            found = run(state._replace(weighting_state=(np.int32(number), inner)), last)
            errors[name] = difference(flat(found.gradient, 0), weights[name] @ rows)
        np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
        np.testing.assert_array_equal(found.counts, np.bincount(last[1]))
        for name, after in found.state.weighting_state[1].items():
            close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
            jax.tree.map(functools.partial(close, err_msg=name), after, states[name])
        if kind == "gram":
            errors["Gram matrix"] = difference(found.state.gram, rows @ rows.T)
    check(errors)


def updates_of_aggregators(k, params, _, batch, axis_name):
    """{name: the update of every step}; axis 1 of the batch counts the steps."""
    # Two tasks can't be trimmed.
    settings = {"trimmed_mean": {"trim": min(1, (k - 1) // 2)}}
    methods = {
        name: getattr(mtl, name)(k, axis_name=axis_name, **settings.get(name, {}))
        for name in AGGREGATORS
    }

    def step(states, batch):
        examples, tasks, half = batch
        updates, after = {}, {}
        for on_halves, names in ((0, set(AGGREGATORS) - HALVES), (1, HALVES)):
            rows = (1 + on_halves) * k
            mask = (tasks + k * half * on_halves)[:, None] == jnp.arange(rows)
            counts = global_sum(mask.sum(0), axis_name)
            losses_of = lambda params, mask=mask, counts=counts: (
                loss_of_each(params, examples) @ (mask / counts)
            )
            losses = global_sum(losses_of(params), axis_name)
            stacked = jax.jacrev(losses_of)(params)
            for name in names:
                updates[name], after[name] = methods[name].update(
                    stacked, states[name], losses=losses, counts=counts
                )
        return after, updates

    first = {name: method.init(params) for name, method in methods.items()}
    by_step = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), batch)
    return jax.lax.scan(step, first, by_step)[1]


@functools.cache
def aggregated(k, n):
    examples, tasks = jax.tree.map(lambda *leaves: np.stack(leaves, 1), *batches(k))
    half = np.indices(tasks.shape)[0] % 2
    run = on_devices(n, functools.partial(updates_of_aggregators, k))
    return run((), (examples, tasks, half))


@pytest.mark.slow
@pytest.mark.parametrize("n", DEVICES[1:])
@pytest.mark.parametrize("k", KS)
def test_aggregators_on_devices_agree_with_one(k, n):
    found, want = aggregated(k, n), aggregated(k, 1)
    check({name: difference(flat(found[name], 1), flat(want[name], 1)) for name in AGGREGATORS})
