"""Parameters that are sharded over devices, against one device."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import tiny

from ant_jax import compiled_step, experiment, state_layout
from ant_jax.train_step import TrainState
from benchmarks import programs

STEPS, DEVICES = 5, 8


class Model(nn.Module):
    """Large enough for padding, metrics and activations to matter little."""

    num_classes: int

    @nn.compact
    def __call__(self, x, t, y):
        inputs = [x.reshape(len(x), -1), jnp.sin(t[:, None] / 9), jax.nn.one_hot(y, 11)]
        hidden = nn.tanh(nn.Dense(800)(jnp.concatenate(inputs, 1)))
        return nn.Dense(x[0].size)(hidden).reshape(x.shape)


class Trained(NamedTuple):
    state: TrainState
    metrics: dict
    program: jax.stages.Compiled


def trained(devices, **settings):
    """The state after some steps, the metrics of all, and the compiled step."""
    here = jax.devices()[:devices]
    config = tiny(optimizer__warmup_steps=0, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build_model", lambda config, channels, classes: Model(classes))
        patch.setattr(jax, "local_devices", lambda: here)
        patch.setattr(jax, "device_count", lambda: devices)
        setup = experiment.build(config, 1, 10)
        experiment.check_batch(config, setup)
        step, arguments = compiled_step._step_and_arguments(config, setup)
        rng, size = np.random.default_rng(0), config.data.batch_size
        # Drawing the parameters on the devices is as much to compile as the step: in one case.
        draw = lambda leaf: np.float32(0.05 * rng.normal(size=leaf.shape))
        params = jax.tree.map(draw, experiment.abstract_params(setup))
        state = state_layout.new_state(
            config, setup, None if settings["argument"] == "vanilla" else params
        )
        metrics, program = [], None
        for _ in range(STEPS):
            image = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8)
            batch = {"image": image, "label": rng.integers(0, 10, size).astype(np.int32)}
            program = program or step.lower(state, batch, arguments).compile()
            state, found = step(state, batch, arguments)
            metrics.append(jax.device_get(found))
    return Trained(state, jax.tree.map(lambda *each: np.stack(each), *metrics), program)


# Each has another way to the gradient, and another number of groups of devices.
CASES = {
    "vanilla": {"argument": "vanilla"},
    "losses": {
        "argument": "uncertainty",
        "data__batch_size": 64,
        "optimizer__microbatches": 2,
        "optimizer__clip_norm": 0.5,
        "optimizer__frozen": "Dense_0/bias",
        "optimizer__nonfinite": "skip",
    },
    "one task a device": {"argument": "nash", "clusters__k": 8},
    "two devices a task": {"argument": "linear", "method__cosines": True, "clusters__k": 4},
    "all tasks on all": {
        "argument": "linear",
        "method__cosines": True,
        "clusters__k": 5,
        "data__batch_size": 40,
    },
    "scan": {"argument": "pcgrad", "method__gradient_form": "scan"},
}


@functools.cache
def on_eight(case):
    return trained(DEVICES, parallel__params="sharded", **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_parameters_on_shards_are_trained_as_on_one_device(case):
    found, expected = on_eight(case), trained(1, **CASES[case])
    for name in ("cluster_losses", "grad_norm", "weights"):
        np.testing.assert_allclose(
            found.metrics[name], expected.metrics[name], rtol=1e-5, err_msg=name
        )
    # The moments in the optimizer's state are averages of the gradients.
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(found.state), jax.tree.leaves(expected.state), strict=True
    ):
        leaf, other = np.asarray(leaf, float), np.asarray(other, float)
        apart = np.linalg.norm(leaf - other)
        assert apart <= 1e-5 * np.linalg.norm(other), jax.tree_util.keystr(path)


def test_a_device_holds_its_part_of_everything_that_is_as_large_as_the_parameters():
    state = on_eight("one task a device").state
    large = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
    for leaf in large:
        assert leaf.ndim == 0 or leaf.addressable_shards[0].data.size == leaf.size / DEVICES
    held = on_eight("one task a device").program.memory_analysis().argument_size_in_bytes
    assert held == pytest.approx(4 * gradient_size(state) / DEVICES, rel=0.02)


def gradient_size(state):
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("case", "reduced"),
    [
        # The compiler for CPUs makes no reduce-scatter, so these send twice what they need.
        ("vanilla", 2),
        ("all tasks on all", 2 * 5),
        # An all-to-all.
        ("one task a device", 1),
        # A sum over two devices, by an all-reduce, and an all-to-all of the halves over four.
        ("two devices a task", (2 / 2 + 3 / 4 / 2) / (7 / 8)),
    ],
)
def test_what_devices_send_for_parameters_on_shards(case, reduced):
    found = on_eight(case)
    gradient = gradient_size(found.state)
    # The first layer's parameters are not needed for the gradients: nothing is before them.
    gathered = gradient + 4 * found.state.params["Dense_1"]["kernel"].size
    sent = programs.sent_bytes(found.program, DEVICES)
    assert sent == pytest.approx(7 / 8 * (gathered + reduced * gradient), rel=0.02)
