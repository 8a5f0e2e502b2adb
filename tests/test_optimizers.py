"""Optimizers and schedules: alone against those of optax, and in the trainer."""

import functools
import importlib
import inspect
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import schedule_free_eval_params
from tiny_runs import assert_same_state, changed, tiny, use_small_model

import ant_jax
from ant_jax import compiled_step, experiment, state_layout
from ant_jax import config as config_lib
from ant_jax import train as trainer
from ant_jax.config import ConfigError
from ant_jax.optimizers import Optimizer, clipped, freezing, matching
from ant_jax.optimizers.adamw import adamw
from ant_jax.optimizers.lion import lion
from ant_jax.optimizers.muon import muon
from ant_jax.optimizers.schedule_free import schedule_free
from ant_jax.runtime import checkpoint


@pytest.fixture(autouse=True)
def small(monkeypatch):
    use_small_model(monkeypatch)


RATE, DECAY, WARMUP = 0.1, 0.03, 2
SCHEDULE = optax.linear_schedule(0, RATE, WARMUP)
KERNELS = {"layer": {"kernel": True, "bias": False}, "convolution": {"kernel": True}}
MUON = {
    "learning_rate": SCHEDULE,
    "beta": 0.8,
    "ns_steps": 3,
    "eps": 1e-3,
    "weight_decay": DECAY,
    "adam_b1": 0.7,
    "adam_weight_decay": DECAY,
    "consistent_rms": 0.3,
    "muon_weight_dimension_numbers": {
        "layer": {"kernel": optax.contrib.MuonDimensionNumbers(), "bias": None},
        "convolution": {"kernel": optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)},
    },
}
# Ours and that of optax, with the same settings.
PAIRS = {
    "adamw": (
        adamw(SCHEDULE, DECAY, lambda _: KERNELS, b1=0.8, b2=0.9, eps=1e-3),
        optax.adamw(SCHEDULE, 0.8, 0.9, 1e-3, weight_decay=DECAY, mask=KERNELS),
    ),
    "lion": (
        lion(SCHEDULE, DECAY, lambda _: KERNELS, b1=0.8, b2=0.7),
        optax.lion(SCHEDULE, 0.8, 0.7, weight_decay=DECAY, mask=KERNELS),
    ),
    "muon": (
        muon(SCHEDULE, DECAY, beta=0.8, ns_steps=3, rms=0.3, b1=0.7, eps=1e-3),
        optax.contrib.muon(**MUON),
    ),
    "schedule_free": (
        schedule_free(SCHEDULE, DECAY, b1=0.8, b2=0.9, eps=1e-3, power=1.0),
        optax.contrib.schedule_free_adamw(RATE, WARMUP, 0.8, 0.9, 1e-3, DECAY, 1.0),
    ),
}


def small_params():
    rng = np.random.default_rng(0)
    shapes = {"layer": {"kernel": (4, 6), "bias": (6,)}, "convolution": {"kernel": (3, 3, 2, 5)}}
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return jax.tree.map(normal, shapes, is_leaf=lambda each: isinstance(each, tuple))


def stepped(transformation, steps=4):
    """The parameters after some steps on the same gradients, and the last state."""
    params = small_params()
    state, rng = transformation.init(params), np.random.default_rng(1)
    update = jax.jit(transformation.update)
    for _ in range(steps):
        gradient = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), params)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", PAIRS)
def test_an_optimizer_is_that_of_optax(name):
    ours, theirs = PAIRS[name]
    (found, state), (expected, _) = stepped(ours.transformation), stepped(theirs)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, expected)
    assert np.abs(found["layer"]["bias"] - small_params()["layer"]["bias"]).max() > 0.01
    followed = ours.eval_params(state, found)
    if name == "schedule_free":
        expected = schedule_free_eval_params(state, found)
        assert np.abs(followed["layer"]["bias"] - found["layer"]["bias"]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, followed, expected if name != "muon" else found)


def test_what_is_evaluated_is_the_same_behind_what_the_trainer_adds():
    optimizer, _ = PAIRS["schedule_free"]
    wrapped = freezing(clipped(optimizer, 1e9), "^convolution")
    (alone, first), (found, second) = (
        stepped(each.transformation) for each in (optimizer, wrapped)
    )
    expected = optimizer.eval_params(first, alone)
    expected["convolution"] = small_params()["convolution"]
    found = wrapped.eval_params(second, found)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


def test_muon_updates_a_matrix_by_an_orthogonal_one_unless_a_pattern_gives_it_to_adam():
    make = lambda pattern: muon(optax.constant_schedule(1.0), 0.0, rms=1.0, adam=pattern)
    before = small_params()
    for pattern, expected in (("", True), ("lay", False), ("kernel", False)):
        after, _ = stepped(make(pattern).transformation, 1)
        change = np.asarray(after["layer"]["kernel"] - before["layer"]["kernel"])
        values = np.linalg.svd(change, compute_uv=False)
        assert (values.max() < 2 * values.min()) == expected, pattern


@pytest.mark.parametrize("file", ["digits", "cifar10_edm"])
def test_muon_updates_nearly_all_matrices_of_a_network(file, monkeypatch):
    monkeypatch.undo()  # the real networks
    config = importlib.import_module(f"configs.{file}").get_config()
    setup = experiment.build(config, 3, 10)
    params = jax.eval_shape(lambda: experiment.init_params(setup.model, setup.image_shape, 0))
    pattern = inspect.signature(muon).parameters["adam"].default
    by_adam = matching(params, pattern)
    sizes = [
        (leaf.size, adam)
        for leaf, adam in zip(jax.tree.leaves(params), jax.tree.leaves(by_adam), strict=True)
        if leaf.ndim > 1
    ]
    assert any(adam for _, adam in sizes)
    assert sum(size for size, adam in sizes if adam) < 0.05 * sum(size for size, _ in sizes)


LENGTH = 40


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("constant", {}, {0: 0.0, 2: 0.5, 4: 1.0, 22: 1.0, 40: 1.0}),
        ("cosine", {}, {0: 0.0, 2: 0.5, 4: 1.0, 22: 0.5, 40: 0.0}),
        ("cosine", {"final": 0.2}, {4: 1.0, 22: 0.6, 40: 0.2}),
        ("wsd", {"decay_steps": 10}, {0: 0.0, 2: 0.5, 4: 1.0, 22: 1.0, 30: 1.0, 35: 0.5, 40: 0.0}),
        ("wsd", {"decay_steps": 36, "final": 0.5}, {4: 1.0, 22: 0.75, 40: 0.5}),
    ],
)
def test_the_learning_rate_of_a_schedule(name, settings, expected):
    """After 4 steps of warm-up."""
    config = tiny(schedule__name=name, num_steps=LENGTH, optimizer__warmup_steps=4)
    config_lib.update(config, {f"schedule.{key}": value for key, value in settings.items()})
    # The update of Lion has the size of the learning rate.
    config_lib.update(config, {"optimizer.name": "lion"})
    program = config_lib.program(config)
    assert (
        ("num_steps" in program)
        == (name != "constant")
        == ("num_steps" not in config_lib.may_change(config))
    )
    transformation = experiment.build_optimizer(program, 3.0).transformation
    update = jax.jit(transformation.update)
    params, state = jnp.zeros(2), transformation.init(jnp.zeros(2))
    for step in range(LENGTH + 1):
        updates, state = update(jnp.array([1.0, -1.0]), state, params)
        if step in expected:
            rate = 3.0 * expected[step]
            np.testing.assert_allclose(updates, [-rate, rate], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("frozen", ["", "^convolution"])
def test_only_the_parameters_of_the_mask_decay(name, frozen):
    """With a gradient of zero nothing else changes them."""
    changes = {
        **{"optimizer.name": name, "optimizer.weight_decay": 0.1, "optimizer.warmup_steps": 0},
        **{"optimizer.decay_mask": "kernel", "optimizer.frozen": frozen},
        "optimizer.clip_norm": 1.0,
    }
    config = tiny()
    config_lib.update(config, changes)
    optimizer = experiment.build_optimizer(config, 0.5)
    params = small_params()
    state = optimizer.transformation.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(optimizer.transformation.update)(zeros, state, params)
    new = optax.apply_updates(params, updates)
    evaluated = optimizer.eval_params(state, new)
    kept = {"layer": {"kernel": 0.95, "bias": 1}, "convolution": {"kernel": 1 if frozen else 0.95}}
    for found in (new, evaluated):
        jax.tree.map(
            lambda leaf, old, share: np.testing.assert_allclose(leaf, share * old, rtol=1e-5),
            found,
            params,
            kept,
        )


WRONG = {
    "config.optimizer.name must be one of 'adamw', 'lion', 'muon', 'schedule_free', or your own "
    "'package.module:attribute', got 'adam'; did you mean 'adamw'?": {"optimizer__name": "adam"},
    "config.schedule.name must be one of 'constant', 'cosine', 'wsd', or your own "
    "'package.module:attribute', got 'cosin'; did you mean 'cosine'?": {"schedule__name": "cosin"},
    "config.optimizer.b2 must be a number >= 0 and <= 0.999999, got 1.0": {"optimizer__b2": 1.0},
    "config.optimizer.decay_mask must be a regular expression, or '' for none, got '('": {
        "optimizer__decay_mask": "("
    },
    "unknown setting config.optimizer.schedule; it is config.schedule.name now": {
        "optimizer__schedule": "cosine"
    },
    "unknown setting config.optimizer.beta; it belongs to config.optimizer.name = 'muon'": {
        "optimizer__beta": 0.9
    },
    "config.schedule: decay_steps = 500 must not exceed the 200 steps after the warm-up": {
        "schedule__name": "wsd",
        "num_steps": 300,
    },
    "config.schedule.decay_steps must be an integer >= 1, got 0": {
        "schedule__name": "wsd",
        "schedule__decay_steps": 0,
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_setting_is_one_line(words):
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}[^\n]*$"):
        config_lib.validate(changed(**WRONG[words]))


def test_a_decay_mask_that_matches_nothing_is_refused():
    config = tiny(optimizer__decay_mask="weights")
    with pytest.raises(ConfigError, match=r"optimizer.decay_mask = 'weights' matches none of the"):
        experiment.build(config, 1, 10)


def plain(learning_rate) -> Optimizer:
    return Optimizer(optax.sgd(learning_rate))


@pytest.mark.parametrize("name", ["weight_decay", "decay_mask"])
def test_an_optimizer_that_ignores_a_setting_is_refused(name):
    value = {"weight_decay": 0.1, "decay_mask": "kernel"}[name]
    config = tiny()
    config_lib.update(
        config, {"optimizer.name": "test_optimizers:plain", f"optimizer.{name}": value}
    )
    with pytest.raises(ConfigError, match=f"optimizer.{name} = {value!r} has no effect"):
        experiment.build(config, 1, 10)


def test_a_config_whose_optimizer_had_no_name_goes_on_as_it_began():
    new = tiny(schedule__name="cosine", optimizer__weight_decay=0.1)
    old = new.to_dict()
    for name in ("name", "b1", "b2", "eps", "decay_mask"):
        del old["optimizer"][name]
    old["optimizer"]["schedule"] = old.pop("schedule")["name"]
    read = config_lib.from_json(old)
    config_lib.validate(read)
    assert read == new
    config_lib.check_same(read, new, "w")
    assert config_lib.from_json(new.to_dict()) == new


SETTINGS = {
    "muon": {"optimizer__adam": "Dense_1"},
    "schedule_free": {"ema_decay": 0},
}
EVERYWHERE = {
    "optimizer__clip_norm": 0.5,
    "optimizer__frozen": "Dense_0/bias",
    "optimizer__weight_decay": 0.1,
    "optimizer__decay_mask": "kernel",
    "optimizer__warmup_steps": 0,
}


def state_on(devices, name, **settings):
    """The state after three steps as a checkpoint has it, and that before."""
    here = jax.devices()[:devices]
    config = tiny(optimizer__name=name, **EVERYWHERE, **SETTINGS[name], **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: here)
        patch.setattr(jax, "device_count", lambda: devices)
        setup = experiment.build(config, 1, 10)
        step, layout = (
            compiled_step.start_compiling(config, setup),
            state_layout.layout(config, setup),
        )
        rng = np.random.default_rng(0)
        # Drawing the parameters on the devices is as much to compile as the step.
        draw = lambda leaf: np.float32(0.1 * rng.normal(size=leaf.shape))
        params = jax.tree.map(draw, experiment.abstract_params(setup))
        state = state_layout.new_state(config, setup, params)
        before, state = jax.device_get(state), layout.split(state)
        for _ in range(3):
            image = rng.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
            state, _ = step(state, {"image": image, "label": rng.integers(0, 10, 16, np.int32)})
        return jax.device_get(layout.whole(state)), before


@pytest.mark.parametrize("name", SETTINGS)
def test_the_update_does_not_depend_on_the_devices(name):
    (expected, before), (found, _) = state_on(1, name), state_on(8, name)
    sharded, _ = state_on(8, name, parallel__params="sharded")
    for state in (found, sharded):
        for part in ("params", "ema_params", "opt_state"):
            for leaf, other, old in zip(
                *(jax.tree.leaves(getattr(each, part)) for each in (state, expected, before)),
                strict=True,
            ):
                apart = np.linalg.norm(leaf - other)
                assert apart <= 1e-3 * np.linalg.norm(other - old), part


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(name, tmp_path):
    config = tiny(optimizer__name=name, **SETTINGS[name])
    expected = trainer.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [6]
    state = trainer.train(config, tmp_path)
    assert_same_state(state, expected)
    if name == "schedule_free":
        # Without a decay the average is x itself. This is what samples are drawn from.
        x = schedule_free_eval_params(state.opt_state, state.params)
        run = ant_jax.load_run(tmp_path)
        for leaf, other, y in zip(
            *map(jax.tree.leaves, (run.params, x, state.params)), strict=True
        ):
            np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7)
            assert np.abs(leaf - y).max() > 1e-5


def test_the_first_state_follows_given_parameters():
    config = tiny(optimizer__name="schedule_free", ema_decay=0)
    setup = experiment.build(config, 1, 10)
    given = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32), experiment.abstract_params(setup)
    )
    state = state_layout.new_state(config, setup, given)
    for tree in (state.params, state.ema_params, state.opt_state.z):
        jax.tree.map(np.testing.assert_array_equal, tree, given)
