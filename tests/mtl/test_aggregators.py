"""The methods that are no weightings of `combine`: formulas, devices, absent tasks, bad numbers."""

import inspect
from functools import cache

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_method import AGGREGATORS, HALVES, equal_replicas, flat
from optax.experimental import aggregating

from ant_jax import mtl, settings
from ant_jax.mtl import aggregators
from ant_jax.mtl.aggregators.graddrop import entry_draws
from ant_jax.mtl.aggregators.halves import OnHalves

MOVING = {"moco", "excess_mtl"}
K = 4
SHAPES = {"bias": [(3,), ()], "kernel": (4, 5)}
PARAMS = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def rows(name, k=K):
    return 2 * k if name in HALVES else k


def stacked(rng, n, steps=None):
    lead = (n,) if steps is None else (steps, n)
    draw = lambda leaf: rng.normal(size=(*lead, *leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, PARAMS)


@cache
def compiled(name, k=K, **options):
    """The first state and the update, compiled once for all tests."""
    tx = getattr(mtl, name)(k, **options)

    @jax.jit
    def update(gradients, state, losses, counts):
        return tx.update(gradients, state, losses=losses, counts=counts)

    return tx.init(PARAMS), update


def run(name, gradients, counts=None, losses=None, state=None, k=K, **options):
    """The updates of some steps, stacked, the states after each, stacked, and the last state."""
    start, update = compiled(name, k, **options)
    state = start if state is None else state
    steps = jax.tree.leaves(gradients)[0].shape[0]
    ones = np.ones((steps, rows(name, k)), np.float32)
    counts, losses = (ones if x is None else np.float32(x) for x in (counts, losses))
    updates, states = [], []
    for i in range(steps):
        of_step = jax.tree.map(lambda leaf, i=i: leaf[i], gradients)
        found, state = update(of_step, state, losses[i], counts[i])
        updates.append(found)
        states.append(state)
    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    return stack(updates), stack(states), state


def test_the_folder_and_the_package_have_them():
    names = {"graddrop", "trimmed_mean", "modo", "sdmgrad", "moco", "excess_mtl"}
    assert names == set(AGGREGATORS) and {"modo", "sdmgrad"} == HALVES
    for name in AGGREGATORS:
        assert getattr(mtl, name) is getattr(aggregators, name) and name in mtl.__all__
        assert isinstance(getattr(mtl, name)(K), aggregating.Aggregator)
        assert isinstance(getattr(mtl, name)(K), OnHalves) == (name in HALVES)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_settings_have_defaults_that_they_allow_and_wrong_arguments_are_errors(name):
    method = getattr(mtl, name)
    for setting in settings.settings_of(method, {"k", "seed", "axis_name"}).values():
        assert setting.problem(setting.default) is None
    assert inspect.signature(method).parameters["axis_name"].default is None
    for k in (0, 2.0, True):
        with pytest.raises(ValueError, match="k, the number of tasks"):
            method(k)
    for setting in settings.settings_of(method, {"k", "seed", "axis_name"}):
        for value in (-5, np.nan):
            with pytest.raises(ValueError, match=f"{setting} must be"):
                method(K, **{setting: value})
    tx = method(K)
    with pytest.raises(ValueError, match=r"\['a'\].*leading axis of k"):
        tx.update({"a": jnp.ones((rows(name) + 1, 2))}, tx.init({"a": jnp.ones(2)}))


@pytest.mark.parametrize("k, trim", [(1, 1), (4, 2), (5, -1)])
def test_a_trim_that_leaves_nothing_is_an_error(k, trim):
    with pytest.raises(ValueError, match="trim"):
        mtl.trimmed_mean(k, trim)


# Formulas in NumPy, in float64.


def simplex(x):
    """The projection, by bisection of its threshold."""
    low, high = x.min() - 1, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(x - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(x - low, 0)


def expected_trimmed_mean(gradients, trim):
    ordered = np.sort(flat(gradients, 2), axis=1)
    return ordered[:, trim : ordered.shape[1] - trim].mean(1)


def expected_modo(gradients, counts, gamma, rho):
    weights, updates = np.full(K, 1 / K), []
    for g, n in zip(flat(gradients, 2), counts, strict=True):
        first, second = g[:K], g[K:]
        tau = (g**2).sum() / 2
        slope = first @ second.T @ weights / tau + rho * weights
        weights = simplex(weights - gamma * slope)
        means = (n[:K, None] * first + n[K:, None] * second) / (n[:K] + n[K:])[:, None]
        updates.append(weights @ means)
    return np.stack(updates)


def expected_sdmgrad(gradients, lam, steps, learning_rate, momentum):
    x, updates = np.full(K, 1 / K), []
    for g in flat(gradients, 2):
        a = g[:K] @ g[K:].T
        velocity = np.zeros(K)
        for _ in range(steps):
            velocity = momentum * velocity + a @ (x + lam / K) / np.linalg.norm(a)
            x = simplex(x - learning_rate * velocity)
        updates.append((x + lam / K) / (1 + lam) @ (g[:K] + g[K:]) / 2)
    return np.stack(updates)


def expected_moco(gradients, beta, gamma, rho):
    weights, y, updates = np.full(K, 1 / K), 0, []
    for g in flat(gradients, 2):
        y = y + beta * (g - y)
        slope = y @ (weights @ y) / (y**2).sum() + rho * weights
        weights = simplex(weights - gamma * slope)
        updates.append(weights @ y)
    return np.stack(updates)


def expected_excess_mtl(gradients, eta, warmup):
    weights, total, first, updates = np.full(K, 1 / K), 0, [], []
    for g in flat(gradients, 2):
        total = total + g**2
        excess = (g**2 / np.sqrt(total)).sum(1)
        if len(first) < warmup:
            first.append(excess)
        else:
            weights = weights * np.exp(eta * excess / np.mean(first, 0))
            weights /= weights.sum()
        updates.append(weights @ g)
    return np.stack(updates)


def expected_graddrop(gradients, leak, draws):
    g = flat(gradients, 2)
    share = (1 + g.sum(1) / np.abs(g).sum(1)) / 2
    kept = np.where((draws < share)[:, None], g > 0, g < 0)
    return ((leak + (1 - leak) * kept) * g).mean(1)


def draws_of(steps, seed):
    """Whole leaves at once, by the rule that the docstring gives."""
    key = jax.random.key(seed)
    sizes = [leaf.size for leaf in jax.tree.leaves(PARAMS)]
    draw = jax.jit(entry_draws, static_argnums=2)

    def of(call, leaf):
        key_of_leaf = jax.random.fold_in(jax.random.fold_in(key, call), leaf)
        return np.asarray(draw(key_of_leaf, jnp.uint32(0), sizes[leaf]))

    return np.stack(
        [np.concatenate([of(call, leaf) for leaf in range(len(sizes))]) for call in range(steps)]
    )


FORMULAS = {
    "graddrop": dict(seed=3, leak=0.25),
    "trimmed_mean": dict(trim=1),
    "modo": dict(gamma=0.9, rho=0.1),
    "sdmgrad": dict(lam=0.3, steps=5, learning_rate=1.0, momentum=0.5),
    "moco": dict(beta=0.3, gamma=0.9, rho=0.1),
    "excess_mtl": dict(eta=0.7, warmup=2),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_update_is_that_of_the_formula(name):
    steps, options = 6, FORMULAS[name]
    rng = np.random.default_rng(0)
    gradients = stacked(rng, rows(name), steps)
    # Norms apart, or all weights stay about equal.
    scale = np.tile(2.0 ** np.arange(K), rows(name) // K)
    gradients = jax.tree.map(
        lambda leaf: leaf * np.float32(scale.reshape(-1, *[1] * (leaf.ndim - 2))), gradients
    )
    counts = rng.integers(1, 5, (steps, rows(name))) if name == "modo" else None
    more = {}
    if name == "graddrop":
        more = dict(draws=draws_of(steps, options["seed"]))
    elif name == "modo":
        more = dict(counts=counts)
    of = {key: value for key, value in options.items() if key != "seed"} | more
    updates, _, _ = run(name, gradients, counts, **options)
    expected = globals()[f"expected_{name}"](gradients, **of)
    np.testing.assert_allclose(flat(updates, 1), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_identical_gradients_give_that_gradient(name):
    one = stacked(np.random.default_rng(0), 1, 1)
    same = jax.tree.map(lambda leaf: np.repeat(np.repeat(leaf, rows(name), 1), 3, 0), one)
    updates, _, _ = run(name, same)
    factor = 1 - 0.9 ** np.arange(1, 4) if name == "moco" else np.ones(3)
    np.testing.assert_allclose(flat(updates, 1), factor[:, None] * flat(one, 2)[0], rtol=1e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("exponent", [-36, 33])
def test_the_update_grows_with_the_gradients(name, exponent):
    gradients = stacked(np.random.default_rng(1), rows(name), 5)
    scaled = jax.tree.map(lambda leaf: leaf * np.float32(2.0**exponent), gradients)
    found, _, _ = run(name, scaled)
    expected, _, _ = run(name, gradients)
    np.testing.assert_allclose(flat(found, 1) / 2.0**exponent, flat(expected, 1), rtol=1e-4)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_relabelling_of_tasks_changes_nothing(name):
    gradients = stacked(np.random.default_rng(2), rows(name), 5)
    order = np.roll(np.arange(K), 1)
    order = np.concatenate([order, K + order])[: rows(name)]
    found, _, _ = run(name, jax.tree.map(lambda leaf: leaf[:, order], gradients))
    expected, _, _ = run(name, gradients)
    np.testing.assert_allclose(flat(found, 1), flat(expected, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_dtype_of_the_gradients_is_kept(name):
    tx = getattr(mtl, name)(K)
    gradients = {"a": jnp.ones((rows(name), 3), jnp.bfloat16)}
    start = tx.init({"a": jnp.ones(3, jnp.bfloat16)})
    update, state = jax.eval_shape(tx.update, gradients, start)
    assert update["a"].dtype == jnp.bfloat16
    look = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert look(state) == look(start)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}


# Absent tasks.


@pytest.mark.parametrize("name", AGGREGATORS)
def test_without_some_tasks_the_update_is_that_of_the_others(name):
    gone, steps = 1, 4
    gradients = stacked(np.random.default_rng(3), rows(name), steps)
    counts = np.full((steps, rows(name)), 2)
    counts[:, gone::K] = 0
    there = np.flatnonzero(counts[0])
    others = jax.tree.map(lambda leaf: leaf[:, there], gradients)
    if name not in HALVES:
        for leaf in jax.tree.leaves(gradients):
            leaf[:, gone] = np.nan
    found, states, _ = run(name, gradients, counts, losses=np.where(counts > 0, 1, np.nan))
    expected, _, _ = run(name, others, k=K - 1)
    np.testing.assert_allclose(flat(found, 1), flat(expected, 1), rtol=1e-4, atol=1e-6)

    start, _ = compiled(name)
    own = lambda state: state.weighting_state if name in HALVES else state
    for first, later in zip(jax.tree.leaves(own(start)), jax.tree.leaves(own(states)), strict=True):
        if later.ndim > 1:
            np.testing.assert_array_equal(later[:, gone], np.repeat(first[None, gone], steps, 0))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_tasks_come_and_go(name):
    rng = np.random.default_rng(4)
    gradients = stacked(rng, rows(name), 16)
    present = (np.arange(16)[:, None] >> np.arange(K)) & 1
    counts = np.tile(present, rows(name) // K) * rng.integers(1, 5, (16, rows(name)))
    updates, states, _ = run(name, gradients, counts)
    assert np.isfinite(flat(updates, 1)).all()
    assert not flat(updates, 1)[0].any()
    if name == "moco":
        np.testing.assert_allclose(states.weights.sum(1), 1, rtol=1e-5)
    if name in HALVES:
        weights = np.asarray(states.weights).reshape(-1, 2, K).sum(1)
        assert not weights[present == 0].any()
        np.testing.assert_allclose(weights[1:].sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(states.weighting_state.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(HALVES))
def test_a_task_with_one_half_is_in_the_update_and_keeps_its_weight(name):
    gradients = stacked(np.random.default_rng(5), rows(name), 2)
    counts = np.ones((2, rows(name)))
    counts[1, K] = 0
    updates, states, _ = run(name, gradients, counts)
    before, after = np.asarray(states.weighting_state)
    assert before[0] > 0.05 and after[0] == before[0]
    assert not np.allclose(before[1:], after[1:], rtol=1e-3)
    weights = np.asarray(states.weights[1])
    assert weights[K] == 0 and weights[0] > 0
    np.testing.assert_allclose(weights[1:K], weights[K + 1 :])
    np.testing.assert_allclose(flat(updates, 1)[1], weights @ flat(gradients, 2)[1], rtol=1e-4)


@pytest.mark.parametrize("name", sorted({*HALVES, "moco"}))
def test_a_task_without_a_gradient_does_not_stop_the_others(name):
    """The shortest vector of the convex hull would be 0, and the update with it."""
    gradients = stacked(np.random.default_rng(6), rows(name), 40)
    for leaf in jax.tree.leaves(gradients):
        leaf[:] = leaf[:1]
        leaf[:, ::K] = 0
    updates, _, _ = run(name, gradients)
    lengths = np.linalg.norm(flat(updates, 1), axis=1)
    others, _, _ = run(
        name,
        jax.tree.map(lambda leaf: np.delete(leaf, np.s_[::K], 1), gradients),
        k=K - 1,
    )
    assert lengths[-1] > 0.5 * np.linalg.norm(flat(others, 1), axis=1)[-1]


def test_a_trimmed_mean_of_few_is_their_median():
    gradients = {"a": np.float32([[[1], [5], [2], [4], [9]]] * 5)}
    counts = np.tri(5, 5)
    updates, _, _ = run("trimmed_mean", gradients, counts, k=5, trim=2)
    np.testing.assert_allclose(updates["a"][:, 0], [1, 3, 2, 3, 4])


# What is not finite.


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "gradients"])
def test_what_is_not_finite_shows_in_the_update_and_leaves_no_trace(name, where, value):
    gradients = stacked(np.random.default_rng(7), rows(name), 3)
    losses = np.ones((1, rows(name)))
    step = lambda i: jax.tree.map(lambda leaf: leaf[i : i + 1].copy(), gradients)
    _, _, before = run(name, step(0))
    bad = step(1)
    if where == "loss":
        losses[0, 1] = value
    else:
        bad["kernel"][0, 1 if where == "gradient" else slice(None), 2, 3] = value
    update, _, after = run(name, bad, losses=losses, state=before)
    if where == "loss":
        assert all(not np.isfinite(leaf).any() for leaf in jax.tree.leaves(update))
    else:
        assert not np.isfinite(update["kernel"][0, 2, 3])
    own = lambda state: state.weighting_state if name in HALVES else state
    jax.tree.map(np.testing.assert_array_equal, own(after), own(before))


# Devices.


def split(gradients, devices, rng):
    """Contributions of the devices, whose sum is the gradient; integers, so that it is exact."""

    def parts(leaf):
        others = rng.integers(-8, 9, (devices - 1, *leaf.shape))
        return np.float32(np.concatenate([others, leaf[None] - others.sum(0, keepdims=True)]))

    return jax.tree.map(parts, gradients)


def on_devices(name, gradients, devices, counts=None, **options):
    """The last state and the updates of some calls, both on every device."""
    tx = getattr(mtl, name)(K, axis_name="batch", **options)

    def calls(parts):
        step = lambda state, given: tx.update(given, state, counts=counts)[::-1]
        return jax.lax.scan(step, tx.init(PARAMS), parts)

    parts = split(gradients, devices, np.random.default_rng(8))
    return jax.device_get(jax.pmap(calls, "batch", devices=jax.devices()[:devices])(parts))


def integers(name, steps):
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda leaf: rng.integers(-9, 10, (steps, rows(name), *leaf.shape)).astype(np.float32),
        PARAMS,
    )


@pytest.mark.parametrize("name", AGGREGATORS)
def test_four_devices_give_the_updates_and_the_state_of_one(name):
    gradients = integers(name, 3)
    counts = np.float32([2, 1, 0, 3, 1, 1, 0, 2][: rows(name)])
    state, found = on_devices(name, gradients, 4, counts)
    expected, _, last = run(name, gradients, np.tile(counts, (3, 1)))
    if name in MOVING:
        # The gradients in the state are split: one part a device, zeros at the end.
        field = 0
        assert all(leaf.shape[:2] == (4, K) for leaf in jax.tree.leaves(state[field]))
        whole = lambda leaf, one: np.swapaxes(leaf, 0, 1).reshape(K, -1)[:, : one.shape[1]]
        jax.tree.map(
            lambda leaf, one: np.testing.assert_allclose(
                whole(np.asarray(leaf), one), one, rtol=1e-6
            ),
            state[field],
            last[field],
        )
        state, last = state[1:], last[1:]
    np.testing.assert_allclose(
        flat(equal_replicas(found), 1), flat(expected, 1), rtol=1e-4, atol=1e-5
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        equal_replicas(state),
        last,
    )


@pytest.mark.parametrize("devices", [2, 8])
def test_graddrop_is_the_same_on_any_number_of_devices(devices):
    gradients = integers("graddrop", 2)
    _, found = on_devices("graddrop", gradients, devices)
    expected, _, _ = run("graddrop", gradients)
    jax.tree.map(np.testing.assert_array_equal, equal_replicas(found), expected)


def test_a_shard_map_gives_the_same():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))
    spec = jax.sharding.PartitionSpec
    gradients = {"a": np.float32(np.random.default_rng(10).integers(-9, 10, (K, 7)))}
    parts = split(gradients, 4, np.random.default_rng(11))
    single, mapped = mtl.moco(K), mtl.moco(K, axis_name="batch")

    def update(parts):
        state = mapped.init({"a": jnp.zeros(7)})
        return mapped.update(jax.tree.map(lambda leaf: leaf[0], parts), state)

    state_specs = type(single.init({"a": jnp.zeros(7)}))(spec(None, "batch"), spec())
    found, state = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=spec("batch"),
            out_specs=(spec(), state_specs),
            check_vma=False,
        )
    )(parts)
    expected, last = jax.jit(single.update)(gradients, single.init({"a": jnp.zeros(7)}))
    np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-5)
    # One array for all devices, padded to a multiple of their number.
    assert state.moving["a"].shape == (K, 8)
    np.testing.assert_allclose(state.moving["a"][:, :7], last.moving["a"], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(MOVING))
def test_the_split_state_is_made_under_the_map(name):
    with pytest.raises(NameError, match="batch"):
        getattr(mtl, name)(K, axis_name="batch").init(PARAMS)


# What the methods are for.


@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_graddrop_is_the_mean_on_average_and_of_one_sign_at_a_time(leak):
    g = np.random.default_rng(12).normal(size=(K, 30)).astype(np.float32)
    g[:, 0], g[:, 1] = np.abs(g[:, 0]), -np.abs(g[:, 1])
    g[:, 2] = 0
    seeds = jnp.arange(4000)

    def update(seed):
        tx = mtl.graddrop(K, seed, leak)
        return tx.update(g, tx.init(g[0]))[0]

    updates = np.asarray(jax.jit(jax.vmap(update))(seeds), float)
    positive, negative = np.maximum(g, 0).sum(0) / K, np.minimum(g, 0).sum(0) / K
    either = [leak * g.mean(0) + (1 - leak) * side for side in (positive, negative)]
    nearest = np.minimum(*[np.abs(updates - side) for side in either])
    np.testing.assert_allclose(nearest, 0, atol=1e-6)
    # Entries on whose sign all tasks agree, and that of no task, are never dropped.
    np.testing.assert_allclose(updates[:, :3], np.tile(g.mean(0)[:3], (4000, 1)), rtol=1e-5)
    error = np.abs(updates.mean(0) - g.mean(0))
    assert (error <= 5 * updates.std(0) / np.sqrt(4000) + 1e-6).all()
    # Entries are drawn one by one: both sides come up in all, but not together.
    mixed = (g > 0).any(0) & (g < 0).any(0)
    sides = (np.abs(updates - either[0]) < 1e-6)[:, mixed]
    assert mixed.sum() > 10
    assert np.abs(np.corrcoef(sides.T) - np.eye(mixed.sum())).max() < 0.1


def test_every_call_and_leaf_of_graddrop_has_draws_of_its_own():
    leaf = np.float32([1, -1, 0, 0])[:, None] * np.ones(200, np.float32)
    tx = mtl.graddrop(K, seed=1)
    gradients, update = {"a": leaf, "b": leaf}, jax.jit(tx.update)
    first, state = update(gradients, tx.init(None))
    second, state = update(gradients, state)
    assert int(state.count) == 2
    for one, other in ((first["a"], first["b"]), (first["a"], second["a"])):
        assert 0.3 < (np.asarray(one) == np.asarray(other)).mean() < 0.7


def halves_alike(gradients):
    return np.float32(np.concatenate([gradients, gradients], -2))


def test_the_weights_of_modo_and_moco_move_to_those_of_mgda():
    gradients = sets.draw([sets._random], 3, n=10)
    gram = sets.grams(gradients)
    weigh = lambda g: mtl.mgda(3).weigh(mtl.TaskStats(None, g, jnp.ones(3)), ())[0]
    expected = np.asarray(jax.jit(jax.vmap(weigh))(jnp.float32(gram)))
    assert np.ptp(expected, axis=1).max() > 0.1

    def last(tx, g):
        step = lambda _, state: tx.update(g, state)[1]
        return jax.lax.fori_loop(0, 200, step, tx.init(g[0]))

    on_all = lambda tx: jax.jit(jax.vmap(lambda g: last(tx, g)))
    modo = on_all(mtl.modo(3, rho=0.0))(halves_alike(gradients))
    np.testing.assert_allclose(modo.weighting_state, expected, atol=1e-3)
    moco = on_all(mtl.moco(3, rho=0.0))(np.float32(gradients))
    np.testing.assert_allclose(moco.weights, expected, atol=1e-3)


@pytest.mark.parametrize("k", [2, 16])
def test_the_default_steps_of_sdmgrad_are_stable(k):
    """Its x is the shortest vector of the hull of the gradients, each moved by lam g_0."""
    lam = 0.3
    gradients = sets.draw([sets._random, sets._nearly_opposed, sets._rank_one], k, n=10)
    moved = gradients + lam * gradients.mean(1, keepdims=True)
    gram = jnp.float32(sets.grams(moved))
    weigh = lambda g: mtl.mgda(k).weigh(mtl.TaskStats(None, g, jnp.ones(k)), ())[0]
    best = np.asarray(jax.jit(jax.vmap(weigh))(gram), float)
    tx = mtl.sdmgrad(k)

    def last(g):
        step = lambda _, state: tx.update(g, state)[1]
        return jax.lax.fori_loop(0, 20, step, tx.init(g[0])).weighting_state

    x = np.asarray(jax.jit(jax.vmap(last))(halves_alike(gradients)), float)
    squared = lambda x: np.einsum("ni,nij,nj->n", x, gram, x)
    scale = np.einsum("nii->n", sets.grams(gradients)) / k
    assert ((squared(x) - squared(best)) / scale).max() < 0.01


def test_the_noise_of_one_task_costs_it_no_weight_in_modo():
    """In the Gram matrix of one batch it does: the noise is in the norm of its gradient."""
    steps, p = 300, 20
    rng = np.random.default_rng(13)
    mean = np.eye(2, p)
    noise = rng.normal(size=(steps, 4, p)) * np.array([0, 1, 0, 1])[:, None]
    gradients = np.float32(np.tile(mean, (2, 1)) + noise)

    def weights(tx, gradients, state_weights):
        step = lambda state, g: (tx.update(g, state)[1],) * 2
        states = jax.lax.scan(step, tx.init(gradients[0, 0]), gradients)[1]
        return np.asarray(state_weights(states))[50:].mean(0)

    found = weights(mtl.modo(2, gamma=0.1, rho=0.0), gradients, lambda s: s.weighting_state)
    np.testing.assert_allclose(found, 0.5, atol=0.07)
    batch = (gradients[:, :2] + gradients[:, 2:]) / 2
    found = weights(mtl.combine(mtl.mgda(2)), batch, lambda s: s.weights)
    assert found[0] > 0.8


def test_excess_mtl_follows_the_task_that_still_learns():
    """The gradients of one task keep their size, those of the others fall."""
    steps = 50
    gradients = stacked(np.random.default_rng(14), K, steps)
    fall = np.stack([np.ones(steps), *[0.8 ** np.arange(steps)] * (K - 1)], 1)
    gradients = jax.tree.map(
        lambda leaf: leaf * np.float32(fall.reshape(steps, K, *[1] * (leaf.ndim - 2))), gradients
    )
    _, states, _ = run("excess_mtl", gradients, eta=0.1)
    weights = np.exp(np.asarray(states.log_weights))
    np.testing.assert_allclose(weights[0], 1 / K, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert weights[-1, 0] > 1.2 * weights[-1, 1:].max()


def test_excess_mtl_has_no_baseline_of_zero():
    gradients = stacked(np.random.default_rng(15), K, 4)
    for leaf in jax.tree.leaves(gradients):
        leaf[:2, 1] = 0
    updates, states, _ = run("excess_mtl", gradients)
    np.testing.assert_array_equal(states.known[:, 1], [0, 0, 1, 1])
    np.testing.assert_array_equal(states.log_weights[:3, 1], np.float32(-np.log(K)))
    assert np.isfinite(flat(updates, 1)).all() and np.isfinite(states.log_weights).all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_trains_in_a_chain_with_adam(name):
    rng = np.random.default_rng(16)
    inputs = rng.normal(size=(24, 3)).astype(np.float32)
    targets = np.float32(inputs @ rng.normal(size=3))
    k = 3
    tx = optax.chain(getattr(mtl, name)(k), optax.adam(0.05))
    loss = lambda params, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2)

    def step(carry, _):
        params, state = carry
        groups = jax.tree.map(
            lambda x: x.reshape(-1, rows(name, k), *x.shape[1:]).swapaxes(0, 1), (inputs, targets)
        )
        gradients = jax.vmap(jax.grad(loss), (None, 0))(params, groups)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss(params, (inputs, targets))

    params = jnp.zeros(3)
    losses = jax.lax.scan(step, (params, tx.init(params)), length=100)[1]
    assert losses[-1] < 0.1 * losses[0]
