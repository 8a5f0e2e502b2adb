"""A run of a small network with checkpoints of two steps, and a stand-in for Inception."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import config as config_lib
from ant_jax import dataset, evaluation, experiment, state_layout
from ant_jax import workdir as workdir_lib
from ant_jax.evaluation.features import inception
from ant_jax.runtime import checkpoint
from configs import digits

SMALL = {
    "process.timesteps": 20,
    "clusters.k": 2,
    "sampler.num_steps": 2,
    "sample.batch_size": 8,
    "sample.num": 21,
    "evaluation.features": "inception",
    "evaluation.split": "",
}


class Model(nn.Module):
    """Small, and everything it is given matters."""

    num_classes: int

    @nn.compact
    def __call__(self, x, t, y):
        features = [x.reshape(len(x), -1), jnp.sin(t[:, None] / 9), jax.nn.one_hot(y, 11)]
        return nn.Dense(x[0].size)(jnp.concatenate(features, 1)).reshape(x.shape)


# Compiled samplers are found again by the identity of the model.
MODEL = Model(10)


def configured(tmp_path, **settings):
    """A config whose files are there; settings are names with __ for the dot."""
    config = digits.get_config()
    weights = tmp_path / "weights.pth"
    weights.touch()
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config_lib.update(config, SMALL | {"evaluation.weights": str(weights)})
    config_lib.update(config, named)
    return config


_WEIGHTS = np.random.RandomState(0).standard_normal((64, 14)) / 99


def features(batches):
    for images in batches:
        every = np.float32(images.reshape(len(images), -1) @ _WEIGHTS)
        yield dict(zip(("features", "spatial", "logits"), np.split(every, [5, 9], 1), strict=True))


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path):
    """A small network of 8 x 8 grey pixels instead of Inception, and no cache but this test's."""
    monkeypatch.setattr(inception, "_SHAPES", {"features": (5,), "spatial": (4,), "logits": (5,)})
    monkeypatch.setattr(inception, "_load", lambda path: evaluation.Network(features, "digest"))
    monkeypatch.setattr(experiment, "build_model", lambda *_: MODEL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with the checkpoints of two steps."""
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build_model", lambda *_: MODEL)
        config = configured(workdir.parent)
        source = dataset.open_data(config)
        setup = experiment.build(config, 1, 10)
        workdir_lib.save_config(config, workdir)
        workdir_lib.save_facts(setup, source, workdir)
        state = state_layout.new_state(config, setup)
        saver = checkpoint.Checkpointer(workdir / "checkpoints")
        for step in (3, 5):
            ema = jax.tree.map(lambda leaf, add=step: leaf + add / 50, state.ema_params)
            saver.save(step, state._replace(ema_params=ema))
        saver.close()
    return workdir


@pytest.fixture
def workdir(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")
