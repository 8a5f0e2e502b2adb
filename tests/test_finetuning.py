"""Beginning with other weights, leaving some as they are, and what else a config can train."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ant_jax import builders, checkpoint, experiment, export, interop, train
from ant_jax.config import ConfigError
from configs import digits

TINY = {
    "num_steps": 4,
    "data.batch_size": 16,
    "diffusion.timesteps": 50,
    "model.width": 8,
    "model.depth": 1,
    "model.heads": 1,
    "clusters.k": 2,
    "optimizer.warmup_steps": 0,
    "log_every": 1,
    "tensorboard": False,
    "checkpoint.every": 2,
    "sample.every": 0,
    "sample.num_steps": 2,
}
UNET = {
    "model.name": "unet",
    "model.width": 32,
    "model.channel_mult": (1,),
    "model.num_res_blocks": 1,
    "model.attention_factors": (),
    "diffusion.variance": "learned_range",
}


def tiny(argument="nash", **settings):
    config = digits.get_config(argument)
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config.update_from_flattened_dict(TINY | named)
    return config


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory, one_device):
    """A run to begin others with."""
    workdir = tmp_path_factory.mktemp("begun")
    return workdir, train.train(tiny(), workdir)


def state_of(config):
    return experiment.new_state(config, experiment.build(config, 1, 10))


def test_a_run_begins_with_the_moving_average_of_another(begun, tmp_path):
    workdir, before = begun
    # Another method, optimizer and number of clusters: only the network has to be the same.
    changes = dict(clusters__k=4, optimizer__clip_norm=1.0, init_from=str(workdir))
    config = tiny("uncertainty", **changes)
    state = state_of(config)
    assert int(state.step) == 0
    assert_same(state.params, before.ema_params)
    assert_same(state.ema_params, before.ema_params)
    assert np.abs(before.params["output"]["kernel"] - state.params["output"]["kernel"]).max() > 0
    first = train.train(config, tmp_path)
    # Going on is from its own checkpoint; the other run is no longer needed.
    config.num_steps = 5
    checkpoints = tmp_path / "checkpoints"
    assert checkpoint.checkpoint_steps(checkpoints)[-1] == 4
    resumed = train.train(config, tmp_path)
    assert int(resumed.step) == 5
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), resumed.params, first.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


def test_a_run_begins_with_the_weights_of_others(begun, tmp_path):
    workdir, before = begun
    exported = export.export(tiny(), workdir)
    assert exported == workdir / "weights" / "00000004.safetensors"
    assert "blocks.0.attn.qkv.weight" in interop.read_state(exported)
    assert_same(state_of(tiny(init_from=str(exported))).params, before.ema_params)
    path = tmp_path / "unet.safetensors"
    unet = tiny(**{name.replace(".", "__"): value for name, value in UNET.items()})
    other = state_of(unet)
    random = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.5, other.params)
    interop.write_state(path, interop.to_torch(random, interop.UNET))
    unet.init_from = str(path)
    assert_same(state_of(unet).params, random)


def test_weights_that_do_not_fit_are_named(begun, tmp_path):
    workdir, _ = begun
    # The same shapes, but not the same network.
    wrong = dict(init_from=str(workdir), model__heads=2, diffusion__prediction="v")
    with pytest.raises(ConfigError, match=r"model.heads: 1 there, 2 here; .*prediction: 'epsilon'"):
        state_of(tiny(**wrong))
    unlabelled = tiny(init_from=str(workdir), model__conditional=False)
    with pytest.raises(ConfigError, match=r"1 of its parameters don't fit .*: label_embedding/emb"):
        state_of(unlabelled)
    with pytest.raises(ConfigError, match=r"config.init_from = .*a folder without a run"):
        state_of(tiny(init_from=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"config.init_from = 'no/where.pt': "):
        state_of(tiny(init_from="no/where.pt"))
    interop.write_state(tmp_path / "w.safetensors", {"a.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ConfigError, match=r"(?s)w.safetensors.*a\.weight"):
        state_of(tiny(init_from=str(tmp_path / "w.safetensors")))


def test_frozen_parameters_stay_and_count_for_nothing(begun, tmp_path):
    workdir, before = begun
    settings = dict(optimizer__weight_decay=0.1, init_from=str(workdir))
    pattern = "block_0/(qkv|mlp)|embedding"
    config = tiny(optimizer__frozen=pattern, **settings)
    state = train.train(config, tmp_path)
    frozen = builders.frozen(state.params, pattern)
    assert frozen["block_0"]["qkv"]["kernel"] and frozen["label_embedding"]["embedding"]
    assert not frozen["output"]["kernel"]

    def check(name, path_frozen, value, old):
        changed = np.abs(np.asarray(value) - np.asarray(old)).max() > 0
        assert changed != path_frozen, name

    for (path, leaf), old, stays in zip(
        jax.tree.leaves_with_path(state.params),
        jax.tree.leaves(before.ema_params),
        jax.tree.leaves(frozen),
        strict=True,
    ):
        check(jax.tree_util.keystr(path), stays, leaf, old)
    # No moments are kept for them.
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    free = sum(
        leaf.size
        for leaf, stays in zip(jax.tree.leaves(state.params), jax.tree.leaves(frozen), strict=True)
        if not stays
    )
    assert 2 * free <= sizes(state.opt_state) < 2 * free + 10
    # And a checkpoint of such a run goes on.
    config.num_steps = 5
    assert int(train.train(config, tmp_path).step) == 5


def test_the_gram_matrix_is_of_the_gradients_of_what_is_not_frozen():
    config = tiny(optimizer__frozen="output")
    pieces = experiment.build(config, 1, 10)
    params = experiment.new_state(config, pieces).params
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape), params)
    x = jnp.ones((2, 8, 8, 1))
    t, y = jnp.arange(2), jnp.arange(2)

    def loss(params, pattern):
        params = builders.stop_gradients(params, pattern)
        return jnp.mean(pieces.model.apply({"params": params}, x, t, y) ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    whole, part = (grad(noisy, pattern) for pattern in ("", "^output/"))
    assert optax.tree.norm(part["output"]) == 0 < optax.tree.norm(whole["output"])
    del whole["output"], part["output"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, part)


@pytest.mark.parametrize("settings", [UNET, {"diffusion.prediction": "v"}], ids=["unet", "v"])
def test_what_else_a_config_can_train(settings, tmp_path):
    changes = {name.replace(".", "__"): value for name, value in settings.items()}
    config = tiny("uncertainty", optimizer__learning_rate=1e-3, num_steps=6, **changes)
    train.train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert np.isfinite(losses).all() and len(losses) == 6
    # v of noise alone has the variance of the noise where there is noise, of the data elsewhere.
    assert losses[-1] < losses[0]
