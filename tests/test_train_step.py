import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_step import (
    BATCH,
    BOUNDARIES,
    CLASSES,
    DIFFUSION,
    K,
    T,
    apply_fn,
    assert_close,
    make_batch,
    make_params,
    norm,
    step_fn,
)

from ant_jax import mtl, pixels
from ant_jax import train_step as ts
from ant_jax.diffusion import GaussianDiffusion, alphas_bar
from ant_jax.models.dit import DiT
from ant_jax.mtl.blocks import blocks
from ant_jax.runtime.devices import abstract, parallel_map, parallel_step, parts_of, replicate
from ant_jax.tasks import clusters
from benchmarks import many_devices, programs

METHODS = {
    "vanilla": mtl.vanilla(K),
    "linear": mtl.linear(K),
    "uncertainty": mtl.uncertainty(K),
    "pcgrad": mtl.pcgrad(K),
    "nash": mtl.nash(K),
}


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def batch():
    return make_batch(BATCH)


_DEFAULTS = ts.Setup._field_defaults


def compiled_step(weighting, **settings):
    """One for all the tests that take it, whether they name the defaults or not."""
    changed = {
        name: value
        for name, value in sorted(settings.items())
        if name not in _DEFAULTS or value != _DEFAULTS[name]
    }
    return _compiled_step(weighting, **changed)


@functools.cache
def _compiled_step(weighting, **settings):
    return jax.jit(step_fn(weighting, **settings))


def gradient(params, batch, weighting, *, step=5, jit=True, method_state=None, **settings):
    fn = (compiled_step if jit else step_fn)(weighting, **settings)
    # As float32, so that a test with images of its own shares the program too.
    batch = batch | {"image": pixels.normalize(np.asarray(batch["image"]))}
    state = ts.init_state(params, optax.identity(), weighting)._replace(
        step=jnp.asarray(step, jnp.int32)
    )
    if method_state is not None:
        state = state._replace(method_state=method_state)
    new, metrics = fn(state, batch)
    return jax.tree.map(np.subtract, new.params, params), new, metrics


def draw(batch, how, *, step=5, seed=3, first_index=0):
    return _draw(batch, step, seed, how=how, first_index=first_index)


@functools.partial(jax.jit, static_argnames=("how", "first_index"))
def _draw(batch, step, seed, how, first_index):
    return draw_with(batch, how, step=step, seed=seed, first_index=first_index)


def draw_with(batch, how, *, step=5, seed=3, first_index=0, **settings):
    """The examples and the task of each; the first has been left out up to ``first_index``."""
    total = first_index + len(batch["image"])
    settings = {"boundaries": BOUNDARIES, "num_classes": CLASSES, "label_dropout": 0.3} | settings
    settings = {"process": DIFFUSION, "weighting": None, "optimizer": None} | settings
    setup = ts.Setup(None, seed=seed, draw=how, **settings)
    return ts.draw_examples(step, batch, setup, first_index, total)


class Noisiest(GaussianDiffusion):
    """A process whose density is all at the upper end of an interval."""

    def level(self, low, high, u):
        return high - 1 + 0 * u.astype(low.dtype)


@pytest.mark.parametrize("how", clusters.DRAWS)
def test_levels_are_drawn_by_the_density_of_the_process(how, batch):
    process = Noisiest(alphas_bar("cosine", BOUNDARIES[-1]))
    examples, tasks = jax.jit(lambda b: draw_with(b, how, process=process))(batch)
    highest = np.asarray(BOUNDARIES)[np.asarray(tasks) + 1] - 1
    np.testing.assert_array_equal(examples.t, highest)
    assert len(set(np.asarray(tasks))) == (K if how == "stratified" else 1)


def per_example(params, ex):
    return DIFFUSION.losses(
        lambda x, t, y: apply_fn(params, x, t, y), ex.x0, ex.t, ex.noise, ex.label
    )


@jax.jit
def plain_gradient(params, ex, weights):
    """The loss, and its gradient, of examples with weights."""
    return jax.value_and_grad(lambda p: jnp.mean(per_example(p, ex) * weights))(params)


def test_vanilla_is_the_gradient_of_the_plain_mean(params, batch):
    got, _, metrics = gradient(params, batch, METHODS["vanilla"], draw="uniform")
    ex, _ = draw(batch, "uniform")
    loss, want = plain_gradient(params, ex, np.ones(BATCH, np.float32))
    assert_close(got, want)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["weights"], metrics["counts"] / BATCH, rtol=1e-6)


def test_linear_is_the_gradient_of_the_plain_mean_of_its_stratified_batch(params, batch):
    got, _, _ = gradient(params, batch, METHODS["linear"])
    ex, _ = draw(batch, "stratified")
    assert_close(got, plain_gradient(params, ex, np.ones(BATCH, np.float32))[1])


@pytest.mark.parametrize("how", clusters.DRAWS)
def test_a_curriculum_trains_on_the_noisiest_tasks(params, batch, how):
    """In the second stage these are two: each has two blocks, and the others are absent."""
    weighting = METHODS["vanilla" if how == "uniform" else "pcgrad"]
    settings = {"draw": how, "curriculum_steps": 5}
    got, state, metrics = gradient(params, batch, weighting, **settings)
    in_order = jnp.asarray([2, 2, 3, 3])
    setup = ts.Setup(None, DIFFUSION, BOUNDARIES, None, None, 3, how, num_classes=CLASSES)
    setup = setup._replace(label_dropout=0.3)
    ex, tasks = jax.jit(lambda b: ts.draw_examples(5, b, setup, 0, BATCH, in_order))(batch)
    assert ex.t.min() >= BOUNDARIES[2] and ex.t.max() > BOUNDARIES[3]
    np.testing.assert_array_equal(metrics["counts"], np.bincount(tasks, minlength=K))
    if how == "stratified":
        np.testing.assert_array_equal(metrics["counts"], [0, 0, BATCH // 2, BATCH // 2])
    inputs = (params, ex, weighting, mtl.init_combine(weighting))
    want = jax.jit(lambda: mtl.backward(per_example, *inputs, tasks=tasks, form="masked"))()
    assert_close(got, want.gradient)
    for a, b in zip(
        jax.tree.leaves((state.method_state, metrics["cluster_losses"])),
        jax.tree.leaves((want.state, want.losses)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    # The last stage has all tasks.
    last = [
        gradient(params, batch, weighting, step=15, draw=how, curriculum_steps=steps)[0]
        for steps in (5, 0)
    ]
    assert_close(*last)


@pytest.mark.parametrize("method", ["vanilla", "db_mtl"])
def test_shares_of_the_batch(params, batch, method):
    """The step is that of the examples that it draws, on all devices."""
    # Blocks of two examples; the first step moves the shares.
    weighting = mtl.pike(getattr(mtl, method)(K), 5.0, blocks=4, every=1)
    optimizer = optax.sgd(0.1)
    step = step_fn(weighting, optimizer=optimizer, split=True)
    first = ts.init_state(params, optimizer, weighting)
    one = jax.jit(step)
    middle, _ = one(first, batch)
    want, metrics = one(middle, batch)
    tasks = weighting.blocks.tasks(middle.method_state.weighting_state)
    counts = np.bincount(tasks, minlength=K)
    assert np.ptp(counts) > 0
    np.testing.assert_array_equal(metrics["counts"], 2 * counts)
    if method == "vanilla":
        np.testing.assert_allclose(metrics["weights"], counts / 16, rtol=1e-6)
        setup = ts.Setup(None, DIFFUSION, BOUNDARIES, None, None, 3, num_classes=CLASSES)
        setup = setup._replace(label_dropout=0.3)
        ex, _ = jax.jit(lambda b: ts.draw_examples(1, b, setup, 0, BATCH, tasks))(batch)
        plain = plain_gradient(middle.params, ex, np.ones(BATCH, np.float32))[1]
        moved = jax.tree.map(lambda a, b: (a - b) / 0.1, middle.params, want.params)
        assert_close(moved, plain, rtol=1e-4)
        return
    found, _, other_metrics = after_two_steps(step, optimizer, first, batch)
    change = lambda state: jax.tree.map(np.subtract, state.params, params)
    assert_close(change(found), change(want), rtol=1e-4)
    for a, b in zip(
        jax.tree.leaves((found.method_state, other_metrics)),
        jax.tree.leaves((want.method_state, metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_what_shares_of_the_batch_need(params, batch):
    weighting = mtl.pike(mtl.vanilla(K), 1.0)
    first = ts.init_state(params, optax.identity(), weighting)
    for settings in ({"curriculum_steps": 2}, {"draw": "uniform", "form": "masked"}):
        with pytest.raises(ValueError, match="needs draw='stratified' and no curriculum"):
            jax.eval_shape(step_fn(weighting, **settings), first, batch)
    small = jax.tree.map(lambda leaf: leaf[:8], batch)
    with pytest.raises(ValueError, match=r"divisible by 16 = 1 .* 16 blocks of tasks.: for"):
        jax.eval_shape(step_fn(weighting), first, small)


def test_suppressed_levels_need_intervals(params, batch):
    for settings in ({"suppress": 5.0}, {"curriculum_steps": 3}):
        with pytest.raises(ValueError, match="need tasks that are intervals"):
            jax.eval_shape(
                lambda batch, settings=settings: draw_with(
                    batch, "stratified", timestep_order=np.arange(T), **settings
                ),
                batch,
            )


def test_cluster_losses_are_means_over_their_own_examples(params, batch):
    _, _, metrics = gradient(params, batch, METHODS["linear"])
    ex, _ = draw(batch, "stratified")
    losses = np.asarray(jax.jit(per_example)(params, ex))
    for i in range(K):
        inside = (ex.t >= BOUNDARIES[i]) & (ex.t < BOUNDARIES[i + 1])
        np.testing.assert_array_equal(inside, np.arange(BATCH) * K // BATCH == i)
        np.testing.assert_allclose(metrics["cluster_losses"][i], losses[inside].mean(), rtol=1e-5)


def test_grouped_forms_equal_the_masked_form(params, batch):
    """For every method that needs the gradients of the tasks: it comes after them."""
    want, state, metrics = gradient(params, batch, METHODS["nash"], form="masked")
    gram = state.method_state.gram
    off_diagonal = gram[~np.eye(K, dtype=bool)]
    assert np.abs(off_diagonal).max() > 1e-3 * jnp.diag(gram).max()
    for form in ("vmap", "scan"):
        got, got_state, got_metrics = gradient(params, batch, METHODS["nash"], form=form)
        assert_close(got, want)
        np.testing.assert_allclose(got_state.method_state.gram, gram, rtol=1e-4)
        np.testing.assert_allclose(
            got_metrics["smallest_cosine"], metrics["smallest_cosine"], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize(
    ("method", "how"),
    [("vanilla", "uniform"), ("uncertainty", "uniform"), ("uncertainty", "stratified")],
)
def test_cotangent_path_equals_combine_on_stacked_gradients(params, batch, method, how):
    weighting = METHODS[method]
    # A few steps into a run, so that the weights of the clusters differ.
    warm, weigh = mtl.init_combine(weighting), jax.jit(weighting.weigh)
    for _ in range(3):
        stats = mtl.TaskStats(jnp.asarray([0.1, 1.0, 3.0, 9.0]), None, jnp.ones(K))
        warm = warm._replace(weighting_state=weigh(stats, warm.weighting_state)[1])
    got, state, _ = gradient(params, batch, weighting, draw=how, method_state=warm)
    ex, _ = draw(batch, how)
    cluster = np.searchsorted(BOUNDARIES, ex.t, side="right") - 1
    masks = cluster == np.arange(K)[:, None]

    def cluster_loss(p, mask):
        return jnp.sum(jnp.where(mask, per_example(p, ex), 0)) / jnp.maximum(mask.sum(), 1)

    losses, stacked = jax.jit(jax.vmap(jax.value_and_grad(cluster_loss), (None, 0)))(params, masks)
    want, want_state = jax.jit(mtl.combine(weighting).update)(
        stacked, warm, losses=losses, counts=masks.sum(1)
    )
    assert_close(got, want)
    for a, b in zip(jax.tree.leaves(state.method_state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# Losses alone, and both forms of the Gram matrix.
@pytest.mark.parametrize(
    ("method", "form"),
    [("vanilla", "vmap"), ("uncertainty", "vmap"), ("nash", "vmap"), ("nash", "masked")],
)
def test_microbatches_add_up_to_the_whole_batch(params, batch, method, form):
    weighting = METHODS[method]
    settings = {"draw": "uniform" if method == "vanilla" else "stratified", "form": form}
    want, want_state, want_metrics = gradient(params, batch, weighting, **settings)
    got, state, metrics = gradient(params, batch, weighting, microbatches=4, **settings)
    assert_close(got, want)
    for a, b in zip(
        jax.tree.leaves((state.method_state, metrics)),
        jax.tree.leaves((want_state.method_state, want_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["vanilla", "uncertainty", "nash"])
def test_absent_clusters_under_uniform_timesteps(params, batch, method):
    small = jax.tree.map(lambda leaf: leaf[:4], batch)
    settings = {"draw": "uniform", "form": "masked"}
    # At this step four uniform timesteps leave clusters empty.
    step = next(
        s for s in range(50) if len(set(np.asarray(draw(small, "uniform", step=s)[1]))) == 2
    )
    got, state, metrics = gradient(params, small, METHODS[method], step=step, **settings)
    absent = np.asarray(metrics["counts"]) == 0
    assert absent.sum() == 2
    np.testing.assert_array_equal(np.asarray(metrics["weights"])[absent], 0)
    np.testing.assert_array_equal(np.asarray(metrics["cluster_losses"])[absent], 0)
    assert (np.asarray(metrics["weights"])[~absent] > 0).all()
    if "cosines" in metrics:
        unknown = absent[np.stack(np.triu_indices(K, 1))].any(0)
        np.testing.assert_array_equal(np.isnan(metrics.pop("cosines")), unknown)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((got, state, metrics)))


# The other methods: tests/mtl/test_devices.py.
@pytest.mark.parametrize("method", ["vanilla", "nash"])
def test_devices_do_not_change_the_step(params, batch, method):
    weighting = METHODS[method]
    how = "uniform" if method == "vanilla" else "stratified"
    want, want_state, want_metrics = gradient(params, batch, weighting, draw=how)
    step = functools.partial(step_fn(weighting, draw=how), axis_name="devices")
    state = ts.init_state(params, optax.identity(), weighting)._replace(
        step=jnp.asarray(5, jnp.int32)
    )
    # out_axes=0 shows every replica; None would hide a forgotten collective.
    mapped = jax.pmap(step, "devices", in_axes=(None, 0), out_axes=0, devices=jax.devices())
    split = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch)
    replicas = jax.device_get(mapped(replicate(state, jax.devices()), split))
    for leaf in jax.tree.leaves(replicas):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    new, metrics = jax.tree.map(lambda leaf: leaf[0], replicas)
    assert_close(jax.tree.map(np.subtract, new.params, params), want)
    for a, b in zip(
        jax.tree.leaves((new.method_state, metrics)),
        jax.tree.leaves((want_state.method_state, want_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("nash", {"skip_nonfinite": True, "curriculum_steps": 1}),
        ("pcgrad", {"form": "masked", "draw": "uniform"}),
    ],
)
def test_devices_that_update_their_parts_agree_with_one(params, batch, method, settings):
    # Momentum is split, and the count of the schedule is not.
    optimizer = optax.chain(optax.trace(0.5), optax.scale_by_schedule(lambda count: 1 + count))
    weighting = METHODS[method]
    step = step_fn(weighting, optimizer=optimizer, split=True, **settings)
    first = ts.init_state(params, optimizer, weighting)
    one, want = jax.jit(step), first
    for _ in range(2):
        want, want_metrics = one(want, batch)
    axes = ts.split_axes(optimizer, params)
    assert axes.opt_state[0].trace == dict.fromkeys(params, 0) and axes.opt_state[1].count is None
    found, state, metrics = after_two_steps(step, optimizer, first, batch)
    for name, leaf in params.items():
        size = -(-leaf.size // 8)
        assert state.ema_params[name].shape == state.opt_state[0].trace[name].shape == (8, size)
    assert_close(found.opt_state[0].trace, want.opt_state[0].trace)
    for name in ("params", "ema_params"):
        change = lambda tree, name=name: jax.tree.map(np.subtract, getattr(tree, name), params)
        assert_close(change(found), change(want))
    for a, b in zip(
        jax.tree.leaves((found.method_state, metrics)),
        jax.tree.leaves((want.method_state, want_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def after_two_steps(step, optimizer, first, batch):
    """What eight devices that update their parts have: the state whole, the state, the metrics."""
    devices, axes = jax.devices(), ts.split_axes(optimizer, first.params)
    whole = functools.partial(ts.whole_state, optimizer=optimizer)
    many = parallel_step(step, devices, axes)
    # Copied, because the step donates its state.
    state = parts_of(replicate(jax.tree.map(jnp.copy, first), devices), devices, axes)
    for _ in range(2):
        state, metrics = many(state, batch)
    replicas = jax.device_get(parallel_map(whole, devices, axes, 0)(state))
    for leaf in jax.tree.leaves(replicas):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], replicas), state, metrics


ENTRYWISE = {
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01),
    "adagrad": optax.adagrad(0.1),
    "lion": optax.lion(0.01),
    "momentum": optax.sgd(0.1, 0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.01),
}
OF_WHOLE_PARAMETERS = {"lamb": optax.lamb(0.01), "muon": optax.contrib.muon(0.01)}


@pytest.mark.parametrize("split", [True, False], ids=["entrywise", "of whole parameters"])
def test_optimizers_on_devices_agree_with_one(params, batch, split):
    # A network for each, all in one program.
    optimizers = ENTRYWISE if split else OF_WHOLE_PARAMETERS
    names = dict(zip(optimizers, optimizers, strict=True))
    optimizer, weighting = optax.partition(optimizers, names), METHODS["linear"]
    apply = lambda params, *args: sum(apply_fn(params[name], *args) for name in optimizers)
    step = step_fn(weighting, optimizer=optimizer, apply_fn=apply, split=split)
    network = params | ({"without entries": jnp.zeros((0, 3))} if split else {})
    first = ts.init_state(dict.fromkeys(optimizers, network), optimizer, weighting)
    one, want = jax.jit(step), first
    for _ in range(2):
        want, _ = one(want, batch)
    if split:
        found, _, _ = after_two_steps(step, optimizer, first, batch)
    else:
        # Copied, because the step donates its state, and each buffer only once.
        found = replicate(jax.tree.map(jnp.copy, first), jax.devices())
        many = parallel_step(step, jax.devices())
        for _ in range(2):
            found, _ = many(found, batch)
    for name in optimizers:
        change = lambda tree, name=name: jax.tree.map(np.subtract, tree.params[name], network)
        assert_close(change(found), change(want))


def test_an_optimizer_whose_state_shows_that_it_needs_whole_parameters_is_not_split(params):
    wide = {"wide": jnp.zeros((128, 256))}
    for optimizer, each in ((optax.contrib.muon(0.01), params), (optax.adafactor(0.01), wide)):
        with pytest.raises(ValueError, match=r"depends on the shapes .*: use split=False"):
            ts.split_axes(optimizer, each)


def test_a_split_state_is_whole_again_to_the_bit(params):
    optimizer = optax.adamw(1e-3)
    state = ts.init_state(params, optimizer, METHODS["nash"])
    state = jax.tree.map(lambda leaf: leaf + np.arange(leaf.size).reshape(leaf.shape), state)
    devices, axes = jax.devices()[:8], ts.split_axes(optimizer, params)
    parts = parts_of(replicate(state, devices), devices, axes)
    back = lambda state, axis_name: ts.whole_state(state, optimizer, axis_name)
    found = parallel_map(back, devices, axes, None)(parts)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_step_that_one_device_finds_not_finite_is_skipped_by_all(params, batch):
    optimizer, weighting = optax.sgd(0.1), METHODS["nash"]
    step = step_fn(weighting, optimizer=optimizer, split=True, skip_nonfinite=True)
    image = batch["image"] / np.float32(127.5) - 1
    image[-1] = np.nan
    devices, axes = jax.devices()[:8], ts.split_axes(optimizer, params)
    before = replicate(ts.init_state(params, optimizer, weighting), devices)
    before = parts_of(before, devices, axes)
    before = jax.device_get(before)
    state, metrics = parallel_step(step, devices, axes)(before, batch | {"image": image})
    assert np.isnan(metrics["grad_norm"]) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=before.step), before)


def test_dit_gradients_are_the_same_grouped_and_masked(batch):
    model = DiT(width=8, depth=1, heads=2, patch=2, channels=1, num_classes=CLASSES)
    zeros = jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)), zeros, zeros)
    rng = np.random.default_rng(0)
    # adaLN-Zero starts with nearly all gradients zero, where any two forms would agree.
    noise = lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    params = jax.tree.map(noise, shapes["params"])
    settings = {"apply_fn": lambda p, x, t, y: model.apply({"params": p}, x, t, y)}
    # The forms are the same for every method that needs the gradients of the tasks.
    weighting = METHODS["linear"]._replace(needs=frozenset({"gram"}))
    want, want_state, _ = gradient(params, batch, weighting, form="masked", **settings)
    got, state, _ = gradient(params, batch, weighting, form="vmap", **settings)
    assert_close(got, want)
    np.testing.assert_allclose(state.method_state.gram, want_state.method_state.gram, rtol=1e-4)


def test_compiles_once(params, batch):
    compiled = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    optimizer = optax.adamw(1e-3)
    devices = jax.devices()[:4]
    weighting = METHODS["nash"]
    step = parallel_step(step_fn(weighting, optimizer=optimizer), devices)
    start = jax.tree.map(jnp.copy, params)  # the step donates its state
    state = replicate(ts.init_state(start, optimizer, weighting), devices)
    compiled.clear()
    state, _ = step(state, batch)
    assert compiled
    compiled.clear()
    for _ in range(3):
        state, _ = step(state, batch)
    assert not compiled
    assert int(state.step) == 4


@pytest.mark.parametrize("method", ["linear", "nash"])
def test_one_nan_shows_in_its_own_cluster(params, batch, method):
    image = batch["image"] / np.float32(127.5) - 1
    image[2 * BATCH // K] = np.nan
    _, _, metrics = gradient(params, batch | {"image": image}, METHODS[method])
    np.testing.assert_array_equal(np.isnan(metrics["cluster_losses"]), np.arange(K) == 2)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("uncertainty", {}),
        ("uncertainty", {"microbatches": 4}),
        ("pcgrad", {}),
        ("nash", {"form": "masked"}),
    ],
)
def test_one_nan_leaves_no_trace_in_the_method(params, batch, method, settings):
    image = batch["image"] / np.float32(127.5) - 1
    weighting = METHODS[method]
    before = jax.tree.map(lambda leaf: leaf + 1, mtl.init_combine(weighting))
    image[2 * BATCH // K] = np.nan
    settings |= {"method_state": before}
    update, new, _ = gradient(params, batch | {"image": image}, weighting, **settings)
    assert not np.isfinite(norm(update))
    jax.tree.map(
        np.testing.assert_array_equal, new.method_state.weighting_state, before.weighting_state
    )


def test_ema_is_ramped_up(params, batch):
    optimizer = optax.sgd(0.1)
    fn = jax.jit(step_fn(METHODS["linear"], optimizer=optimizer, ema_decay=0.15))
    state = ts.init_state(params, optimizer, METHODS["linear"])
    want = params
    for decay in (0.1, 0.15, 0.15):  # (1 + step) / (10 + step) is 0.1, 0.18, 0.25
        state, _ = fn(state, batch)
        want = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, want, state.params)
    assert_close(
        jax.tree.map(np.subtract, state.ema_params, state.params),
        jax.tree.map(np.subtract, want, state.params),
        rtol=1e-4,
    )


def test_draws_depend_on_step_and_seed_and_global_index(batch):
    ex, tasks = draw(batch, "stratified")
    assert not np.array_equal(ex.t, draw(batch, "stratified", step=6)[0].t)
    assert not np.array_equal(ex.t, draw(batch, "stratified", seed=4)[0].t)
    half = lambda tree: jax.tree.map(lambda leaf: leaf[BATCH // 2 :], tree)
    second = draw(half(batch), "stratified", first_index=BATCH // 2)
    jax.tree.map(np.testing.assert_array_equal, second, half((ex, tasks)))


def test_draws_have_the_right_distribution():
    n = 40_000
    batch = {"image": np.zeros((n, 1, 1, 1), np.uint8), "label": np.zeros(n, np.int32)}
    uniform, _ = draw(batch, "uniform")
    assert uniform.t.min() == 0 and uniform.t.max() == T - 1
    np.testing.assert_allclose(np.bincount(uniform.t, minlength=T) / n, 1 / T, atol=0.003)
    stratified, tasks = draw(batch, "stratified")
    inside = np.asarray(stratified.t)[np.asarray(tasks) == 2]
    share = np.bincount(inside, minlength=T)[30:71] / inside.size
    np.testing.assert_allclose(share, 1 / 41, atol=0.006)
    np.testing.assert_allclose(np.mean(stratified.label == CLASSES), 0.3, atol=0.01)
    np.testing.assert_allclose([stratified.noise.mean(), stratified.noise.std()], [0, 1], atol=0.02)
    np.testing.assert_array_equal(stratified.x0, -1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"draw": "random"}, "draw must be one of"),
        ({"form": "loop"}, "form must be one of"),
        ({"draw": "uniform"}, "form='masked'"),
        (
            {"microbatches": 3},
            r"divisible by 12 = 3 microbatches x lcm\(1 devices and 4 tasks\): for example 36",
        ),
        ({"boundaries": np.array([0, 50, T])}, "method is for k = 4"),
    ],
)
def test_impossible_settings(params, batch, settings, message):
    with pytest.raises(ValueError, match=message):
        gradient(params, batch, METHODS["nash"], jit=False, **settings)


SCALE = (0.3, 2.0, 0.7, 1.0)


@pytest.mark.parametrize("needs", [(), ("gram",)], ids=["pullback", "stacked"])
def test_a_scale_multiplies_the_task_losses_but_not_the_metrics(params, batch, needs):
    weighting = METHODS["linear"]._replace(needs=frozenset(needs))
    got, _, metrics = gradient(params, batch, mtl.scaled(weighting, SCALE))
    ex, tasks = draw(batch, "stratified")
    assert_close(got, plain_gradient(params, ex, np.float32(SCALE)[np.asarray(tasks)])[1])
    _, _, plain = gradient(params, batch, METHODS["linear"])
    for name in ("loss", "cluster_losses"):
        np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-5)


def test_shares_make_linear_vanilla_in_expectation(params, batch):
    """Each task's mean loss times its share adds up to the mean loss of all timesteps."""
    scaled = mtl.scaled(METHODS["linear"], K * np.diff(BOUNDARIES) / T)
    many = jax.tree.map(lambda leaf: np.tile(leaf[:1], (40_000, *[1] * (leaf.ndim - 1))), batch)
    want, _, _ = gradient(params, many, METHODS["vanilla"], draw="uniform", step=6)
    got, _, _ = gradient(params, many, scaled)
    plain, _, _ = gradient(params, many, METHODS["linear"])
    error = lambda tree: norm(jax.tree.map(np.subtract, tree, want))
    # Only chance is left of the first, and that falls with the number of examples.
    assert error(got) < 0.2 * error(plain)


@pytest.mark.parametrize("how", ["stratified", "uniform"])
def test_a_timestep_order_scatters_the_tasks(batch, how):
    order = np.random.default_rng(0).permutation(T)
    got, tasks = jax.jit(lambda b: draw_with(b, how, timestep_order=order))(batch)
    place = np.argsort(order)[np.asarray(got.t)]
    want, want_tasks = draw(batch, how)
    np.testing.assert_array_equal(place, want.t)
    np.testing.assert_array_equal(tasks, want_tasks)
    assert (np.asarray(got.t) != np.asarray(want.t)).any()


def test_a_specialist_sees_its_interval_alone(params, batch):
    low, high = 30, 71
    weighting = mtl.vanilla(1)
    got, _, metrics = gradient(params, batch, weighting, boundaries=(low, high))
    ex, _ = jax.jit(lambda b: draw_with(b, "stratified", boundaries=(low, high)))(batch)
    assert (ex.t >= low).all() and (ex.t < high).all() and len(set(np.asarray(ex.t))) > 10
    assert_close(got, plain_gradient(params, ex, np.ones(BATCH, np.float32))[1])
    np.testing.assert_array_equal(metrics["counts"], [BATCH])


def test_cosines_of_the_cluster_gradients_are_reported(params, batch):
    _, state, metrics = gradient(params, batch, METHODS["pcgrad"])
    gram = np.asarray(state.method_state.gram, np.float64)
    norms = np.sqrt(np.diag(gram))
    want = (gram / np.outer(norms, norms))[np.triu_indices(K, 1)]
    np.testing.assert_allclose(metrics["cosines"], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["smallest_cosine"], want.min(), rtol=1e-4, atol=1e-6)
    assert metrics["conflict"] == (want.min() < 0)


WIDE = {"in": (17, 800), "labels": (CLASSES + 1, 800), "out": (800, 16)}


@functools.cache
def on_eight_devices(name, k):
    """Of a step on each device: bytes of arguments, sent bytes and temporaries, and FLOPs.

    The first three are multiples of one gradient, the last of the number of parameters.
    """
    rng = np.random.default_rng(0)
    # Large enough for padding, metrics and activations to matter little.
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in WIDE.items()}
    batch = {"image": np.zeros((80, 4, 4, 1), np.uint8), "label": np.zeros(80, np.int32)}
    optimizer, weighting = optax.adamw(1e-3), getattr(mtl, name)(k)
    draw = "uniform" if name == "vanilla" else "stratified"
    boundaries = np.arange(k + 1) * T // k
    step = step_fn(weighting, draw=draw, split=True, optimizer=optimizer, boundaries=boundaries)
    devices, axes = jax.devices(), ts.split_axes(optimizer, params)
    state = ts.init_state(params, optimizer, weighting)
    program = parallel_step(step, devices, axes).lower(abstract(state, devices, axes), batch)
    compiled, size = program.compile(), sum(leaf.size for leaf in params.values())
    memory = compiled.memory_analysis()
    found = memory.argument_size_in_bytes, programs.sent_bytes(compiled, 8)
    found = [each / (4 * size) for each in (*found, memory.temp_size_in_bytes)]
    return *found, compiled.cost_analysis()["flops"] / size


@pytest.mark.parametrize(
    ("method", "k"),
    [("uncertainty", 8), *(("nash", k) for k in (8, 4, 2, 5, 16))],
)
def test_what_devices_send_and_hold(method, k):
    """The gradients of its own tasks alone, whatever k."""
    needs_gram = "gram" in getattr(mtl, method)(k).needs
    slots = blocks(k, 8).slots if needs_gram else 1
    assert slots == {8: 1, 4: 1, 2: 1, 5: 2, 16: 2}[k]
    # Its program is the same for every k.
    _, vanilla, _, network = on_eight_devices("vanilla", 8)
    arguments, sent, held, work = on_eight_devices(method, k)
    assert vanilla == pytest.approx(2 * 7 / 8, rel=0.01)
    assert sent == pytest.approx((slots + 1) / 2 * vanilla, rel=0.02)
    # What is sent and what is received, and a little else.
    assert held < 2 * slots + 0.5
    form = "own tasks" if needs_gram else "vanilla"
    formula = many_devices.costs(form, num_params=1, k=k, n=8, network=8 * network)
    assert formula.sent / 4 == pytest.approx(sent, rel=0.02)
    assert (formula.parameters + formula.state) / 4 == pytest.approx(arguments, rel=0.01)
    assert formula.gradients / 4 == slots
    if k != 5:  # XLA counts the body of a loop once.
        assert formula.network + formula.combine == pytest.approx(work, rel=0.04)
