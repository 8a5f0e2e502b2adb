"""Losses and gradients of `backward` and `backward_at_features` against plain autodiff."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl.blocks import blocks
from ant_jax.mtl.shards import gathered

K, B = 3, 12
METHODS = {"uncertainty": mtl.uncertainty(K), "nash": mtl.nash(K)}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.normal(size=shape))
    params = {"trunk": draw(5, 4), "heads": draw(K, 4)}
    return params, {"x": draw(B, 5), "y": draw(B, K)}


def trunk(params, batch):
    return jnp.tanh(batch["x"] @ params["trunk"])


def heads(params, features, batch):
    return jnp.mean((features @ params["heads"].T - batch["y"]) ** 2, 0)


def task_losses(params, batch):
    return heads(params, trunk(params, batch), batch)


jacobian_of = jax.jit(jax.jacrev(task_losses))


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


def weighted(jacobian, weights):
    return jax.tree.map(lambda leaf: np.tensordot(weights, leaf, 1), jacobian)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_tasks_that_share_all_examples(problem, name, microbatches):
    params, batch = problem
    weighting = METHODS[name]
    state = mtl.init_combine(weighting)
    found = jax.jit(
        lambda: mtl.backward(
            task_losses, params, batch, weighting, state, microbatches=microbatches
        )
    )()
    assert_close(found.losses, task_losses(params, batch))
    update = jax.jit(mtl.combine(weighting).update)
    gradient, after = update(jacobian_of(params, batch), state, losses=found.losses)
    assert_close(found.gradient, gradient)
    assert_close(found.state, after)
    np.testing.assert_array_equal(found.counts, np.ones(K))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("weighting", "passes"),
    [(mtl.vanilla(K), 1), (mtl.uncertainty(K), 1), (mtl.stch(K), 2)],
    ids=["no losses", "losses of earlier steps", "losses of this step"],
)
def test_microbatches_take_a_second_forward_pass_only_for_losses_of_this_step(
    problem, weighting, passes, devices
):
    params, batch = problem
    state = mtl.init_combine(weighting)
    batch = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)
    find = jax.pmap(
        lambda params, batch: mtl.backward(
            task_losses, params, batch, weighting, state, microbatches=2, axis_name="devices"
        ),
        "devices",
        in_axes=(None, 0),
        devices=jax.devices()[:devices],
    )
    assert find.lower(params, batch).compile().as_text().count(" while(") == passes


@pytest.mark.parametrize("weighting", [mtl.vanilla(K), mtl.uncertainty(K), mtl.stch(K)])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("devices", [1, 3])
def test_a_loss_that_is_not_finite_shows_in_the_gradient(problem, weighting, microbatches, devices):
    """On every device, though only the last one sees it. The gradient of infinity is 0 here."""
    params, batch = problem
    batch = batch | {"infinite": np.arange(B) == B - 1}
    split = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)
    infinite = lambda params, part: (
        task_losses(params, part) + jnp.where(part["infinite"].any(), jnp.inf, 0)
    )
    state = mtl.init_combine(weighting)
    settings = {"microbatches": microbatches, "axis_name": "devices"}
    find = lambda part: mtl.backward(infinite, params, part, weighting, state, **settings)
    found = jax.device_get(jax.pmap(find, "devices", devices=jax.devices()[:devices])(split))
    for leaf in jax.tree.leaves((found.state.weights, found.gradient)):
        assert np.isnan(leaf).all()
    for leaf, before in zip(
        jax.tree.leaves(found.state.weighting_state),
        jax.tree.leaves(state.weighting_state),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, np.broadcast_to(before, leaf.shape))


@pytest.mark.parametrize("name", METHODS)
def test_devices_that_share_the_examples_agree_with_one(problem, name):
    params, batch = problem
    weighting, state = METHODS[name], mtl.init_combine(METHODS[name])
    of = lambda batch, axis: mtl.backward(
        task_losses, params, batch, weighting, state, microbatches=2, axis_name=axis
    )
    parts = jax.tree.map(lambda leaf: leaf.reshape(3, -1, *leaf.shape[1:]), batch)
    mapped = jax.pmap(lambda part: of(part, "devices"), "devices", devices=jax.devices()[:3])
    expected = jax.jit(lambda: of(batch, None))()
    found = jax.device_get(mapped(parts))
    for device in range(3):
        assert_close(jax.tree.map(lambda leaf, i=device: leaf[i], found), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", METHODS)
def test_losses_of_another_type_count_as_float32(problem, name, dtype):
    params, batch = problem
    weighting, state = METHODS[name], mtl.init_combine(METHODS[name])

    def both(cast):
        losses = lambda params, part: cast(task_losses(params, part))
        of_features = lambda *args: cast(heads(*args))
        return (
            mtl.backward(losses, params, batch, weighting, state),
            mtl.backward_at_features(trunk, of_features, params, batch, weighting, state),
        )

    with jax.enable_x64(dtype == "float64"):
        want, found = jax.jit(
            lambda: (both(lambda losses: losses), both(lambda losses: losses.astype(dtype)))
        )()
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_allclose(leaf, other, rtol=0.02, atol=0.02)


def one_loss_each(params, part):
    return ((trunk(params, part) - part["y"][:, :1]) ** 2).mean(1)


def in_blocks(batch, k):
    """The task of each example."""
    size = len(batch["x"])
    return np.arange(size) * k // size


def test_grouped_forms_take_tasks_in_blocks(problem):
    params, batch = problem
    weighting, tasks = METHODS["nash"], in_blocks(batch, K)

    def found(form, tasks):
        state = mtl.init_combine(weighting)
        return jax.jit(
            lambda: mtl.backward(
                one_loss_each, params, batch, weighting, state, tasks=tasks, form=form
            )
        )()

    want = found("masked", tasks)
    losses = one_loss_each(params, batch)
    np.testing.assert_allclose(
        want.losses, [losses[tasks == i].mean() for i in range(K)], rtol=1e-5
    )
    for form in ("vmap", "scan"):
        got = found(form, tasks)
        assert_close(got.gradient, want.gradient)
        assert np.isnan(found(form, tasks[::-1]).losses).all()


# Layouts that `test_devices` leaves to `make test-all`.
@pytest.mark.parametrize(
    ("k", "n", "form", "microbatches", "parts"),
    [
        (8, 8, "vmap", 1, True),
        (5, 8, "vmap", 1, True),
        (8, 2, "vmap", 1, False),
        (8, 4, "vmap", 2, True),
        (3, 2, "vmap", 2, False),
        # As many slots as groups, but some devices have two groups of one task.
        (2, 3, "vmap", 1, False),
        (4, 6, "vmap", 2, True),
        (8, 8, "scan", 1, True),
        (8, 4, "scan", 2, False),
        (4, 8, "masked", 1, True),
        (5, 8, "masked", 2, False),
    ],
)
def test_devices_that_have_some_tasks_each_agree_with_one(problem, k, n, form, microbatches, parts):
    params, _ = problem
    rng = np.random.default_rng(k)
    size = microbatches * math.lcm(k, n)
    batch = {name: np.float32(rng.normal(size=(size, 5))) for name in "xy"}
    # A method that sees all, and whose weights do not magnify what is rounded.
    weighting = mtl.Weighting(
        lambda: (),
        lambda stats, state: (stats.losses / (1 + jnp.abs(stats.gram).sum(1)), state),
        k,
        frozenset({"gram", "losses"}),
    )
    state = mtl.init_combine(weighting)

    def found(batch, form, **settings):
        batch, tasks = batch
        return mtl.backward(
            one_loss_each, params, batch, weighting, state, tasks=tasks, form=form, **settings
        )

    whole = batch, in_blocks(batch, k)
    want = jax.jit(lambda: found(whole, "masked"))()

    def on_device(part):
        got = found(part, form, microbatches=microbatches, axis_name="devices", parts=parts)
        if parts:
            back = lambda part, leaf: gathered(part, leaf.shape, "devices")
            got = got._replace(gradient=jax.tree.map(back, got.gradient, params))
        return got

    split = jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), whole)
    got = jax.device_get(jax.pmap(on_device, "devices", devices=jax.devices()[:n])(split))
    for device in range(n):
        assert_close(jax.tree.map(lambda leaf, i=device: leaf[i], got), want)


@pytest.mark.parametrize("k", range(1, 10))
def test_blocks_of_tasks_on_devices(k):
    for n in range(1, 18):
        groups, slots, tasks = layout = blocks(k, n)
        assert slots <= math.ceil(k / n) + (k % n > 0 and n % k > 0)
        assert groups == k // math.gcd(k, n) and tasks.shape == (n, groups)
        # Of a batch that fits, example by example.
        size = 3 * math.lcm(k, n)
        task_of, device_of = (np.arange(size) * each // size for each in (k, n))
        np.testing.assert_array_equal(np.repeat(tasks, size // tasks.size), task_of)
        for device in range(n):
            here = task_of[device_of == device]
            assert layout.first[device] == here.min() and slots > np.ptp(here)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "loop"}, "form must be one of"),
        ({"form": "vmap"}, "form = 'vmap' groups the examples by task: give it tasks"),
        ({"microbatches": 5}, "a batch of 12 can't be split into 5 microbatches"),
    ],
)
def test_what_can_not_be(problem, settings, message):
    weighting = METHODS["nash"]
    with pytest.raises(ValueError, match=message):
        mtl.backward(task_losses, *problem, weighting, mtl.init_combine(weighting), **settings)


@pytest.mark.parametrize("counts", [None, (4, 0, 2)], ids=["all", "some"])
@pytest.mark.parametrize("name", METHODS)
def test_backward_at_features(problem, name, counts):
    params, batch = problem
    weighting = METHODS[name]
    present = np.ones(K) if counts is None else np.float32(np.array(counts) > 0)
    counts = None if counts is None else jnp.array(counts)
    state = mtl.init_combine(weighting)
    found = jax.jit(
        lambda: mtl.backward_at_features(
            trunk, heads, params, batch, weighting, state, counts=counts
        )
    )()
    losses = task_losses(params, batch) * present

    @jax.jit
    def weigh(features):
        at_features = jax.jacrev(lambda z: heads(params, z, batch) * present)(features)
        gram = mtl.gramian(at_features) if "gram" in weighting.needs else None
        return weighting.weigh(mtl.TaskStats(losses, gram, present), weighting.init())[0]

    weights = weigh(trunk(params, batch))
    assert_close((found.losses, found.state.weights), (losses, weights))
    jacobian = jacobian_of(params, batch)
    assert_close(found.gradient["trunk"], weighted(jacobian, weights)["trunk"])
    assert_close(found.gradient["heads"], weighted(jacobian, present)["heads"])


@pytest.mark.parametrize("name", METHODS)
def test_one_nan_leaves_no_trace_in_the_method(problem, name):
    params, batch = problem
    batch, weighting = batch | {"y": batch["y"].copy()}, METHODS[name]
    batch["y"][3, 1] = np.nan
    before = jax.tree.map(lambda leaf: leaf + 1, mtl.init_combine(weighting))
    both = jax.jit(
        lambda: (
            mtl.backward(task_losses, params, batch, weighting, before),
            mtl.backward_at_features(trunk, heads, params, batch, weighting, before),
        )
    )
    for found in both():
        np.testing.assert_array_equal(np.isnan(found.losses), [False, True, False])
        assert np.isnan(found.gradient["trunk"]).any()
        jax.tree.map(
            np.testing.assert_array_equal, found.state.weighting_state, before.weighting_state
        )


@pytest.mark.parametrize("devices", [1, 4])
def test_combine_weighs_what_the_tasks_share_and_sums_the_rest(problem, devices):
    params, batch = problem
    weighting = METHODS["nash"]
    jacobian = jax.tree.map(np.array, jacobian_of(params, batch))
    # An absent task's gradients are not read.
    counts = np.array([2, 0, 1])
    jacobian["heads"][1] = np.nan
    axis = None if devices == 1 else "devices"
    tx = mtl.combine(weighting, axis, shared={"trunk": True, "heads": False})
    update = lambda stacked: tx.update(stacked, tx.init(None), counts=counts)
    if devices == 1:
        gradient, state = jax.jit(update)(jacobian)
    else:
        parts = jax.tree.map(lambda leaf: np.stack([leaf / devices] * devices), jacobian)
        mapped = jax.pmap(update, axis, devices=jax.devices()[:devices])
        gradient, state = jax.tree.map(lambda leaf: leaf[0], jax.device_get(mapped(parts)))
    assert_close(state.gram, mtl.gramian(jacobian["trunk"]))
    assert_close(gradient["trunk"], np.tensordot(state.weights, jacobian["trunk"], 1))
    assert_close(gradient["heads"], jacobian["heads"][0] + jacobian["heads"][2])
    with pytest.raises(ValueError, match="shared = False for all parameters"):
        mtl.combine(weighting, shared=False).update(jacobian, tx.init(None))


def test_a_wrong_k_state_or_need_is_named():
    params, batch, method = jnp.ones(2), jnp.ones((4, 2)), mtl.linear(3)
    losses = lambda params, batch: (params * batch).sum(0)
    state = mtl.init_combine(method)
    with pytest.raises(ValueError, match=r"losses_fn must return k = 3 losses, got shape \(2,\)"):
        mtl.backward(losses, params, batch, method, state)
    with pytest.raises(ValueError, match="state must be a CombineState, first init_combine"):
        mtl.backward(losses, params, batch, mtl.linear(2), None)
    with pytest.raises(ValueError, match="needs must be some of 'losses' and 'gram', got 'loss'"):
        mtl.init_combine(method._replace(needs=frozenset({"loss"})))
    with pytest.raises(
        ValueError, match=r"leaf updates of shape \(2,\) has no leading axis of k = 3"
    ):
        mtl.combine(method).update(jnp.ones(2), state)
    reads = mtl.Weighting(tuple, lambda stats, state: (stats.losses + 1, state), 2, frozenset())
    with pytest.raises(TypeError) as error:
        mtl.backward(losses, params, batch, reads, mtl.init_combine(reads))
    assert "sees no gram and losses: Weighting.needs" in error.value.__notes__[0]
