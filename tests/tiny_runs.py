"""Runs that take seconds, and what tests do to them and see of them."""

import contextlib
import functools
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ant_jax import config as config_lib
from ant_jax import data, experiment
from configs import digits

STEPS = 8
TINY = {
    "num_steps": STEPS,
    "data.batch_size": 16,
    "process.timesteps": 50,
    "clusters.k": 2,
    "method.update_every": 3,
    "optimizer.warmup_steps": 2,
    "log_every": 1,
    "log_to": (),
    "checkpoint.every": 2,
    "sample.every": 0,
    "sampler.num_steps": 2,
    "sample.batch_size": 8,
    "sample.num": 11,
}


class Model(nn.Module):
    """As small as can be, for compiling and saving it takes nearly all of the time here."""

    num_classes: int

    @nn.compact
    def __call__(self, x, t, y):
        inputs = [x.reshape(len(x), -1), jnp.sin(t[:, None] / 9), jax.nn.one_hot(y, 11)]
        return nn.Dense(x[0].size)(nn.tanh(nn.Dense(8)(jnp.concatenate(inputs, 1)))).reshape(
            x.shape
        )


# Cached, because compiled samplers are cached by the identity of the model.
_model = functools.cache(Model)


def use_small_model(monkeypatch):
    monkeypatch.setattr(
        experiment, "build_model", lambda config, channels, classes: _model(classes)
    )


def tiny(argument="uncertainty", **settings):
    """A config to train in a blink; settings are names with __ for the dot."""
    config = digits.get_config(argument)
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config_lib.update(config, TINY | named)
    return config


def assert_same_state(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == other.dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), name


def lines(workdir):
    """The lines of metrics.jsonl without what differs from run to run: the speed."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("steps_per_second") > 0
    return rows


def before_batch(monkeypatch, hook):
    """Calls ``hook(step, batch) -> batch`` on the batch of each step, counted from 1.

    Not on the batches of an evaluation, which names no step to start at.
    """
    make = data.batches

    class Batches:
        def __init__(self, source, start_step, **settings):
            self.step, self.inner = start_step, make(source, start_step=start_step, **settings)

        def __next__(self):
            self.step += 1
            return hook(self.step, next(self.inner))

        def close(self):
            self.inner.close()

    def batches(source, **settings):
        return (Batches if "start_step" in settings else make)(source, **settings)

    monkeypatch.setattr(data, "batches", batches)


def signal_at(step, number):
    def hook(now, batch):
        if now == step:
            os.kill(os.getpid(), number)
        return batch

    return hook


_COMPONENTS = [f"{group.name}.{group.key}" for group in config_lib.GROUPS if group.folder]


def changed(argument="nash", **settings):
    """The default config with some settings changed; names have __ for the dot."""
    config = digits.get_config(argument).unlock()
    for name in [each for each in settings if each.replace("__", ".") in _COMPONENTS]:
        with contextlib.suppress(config_lib.ConfigError):
            config_lib.update(config, {name.replace("__", "."): settings[name]})
    for name, value in settings.items():
        group, _, leaf = name.rpartition("__")
        node = config[group] if group else config
        # Past ml_collections, which would convert the value or refuse its type.
        node._fields[leaf] = value
    return config
