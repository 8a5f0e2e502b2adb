"""Starting from other weights, freezing some of them, and training other networks."""

import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from ant_jax import (
    compiled_step,
    experiment,
    export,
    init_from,
    interop,
    optimizers,
    state_layout,
    train,
)
from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.models import dit, dit_weights, unet, unet_weights
from ant_jax.runtime import checkpoint
from configs import digits

TINY = {
    "num_steps": 4,
    "data.batch_size": 16,
    "process.timesteps": 50,
    "model.width": 8,
    "model.depth": 1,
    "model.heads": 1,
    "clusters.k": 2,
    "optimizer.warmup_steps": 0,
    "log_every": 1,
    "log_to": (),
    "checkpoint.every": 2,
    "sample.every": 0,
    "sampler.num_steps": 2,
}
UNET = {
    "model.name": "unet",
    "model.width": 32,
    "model.channel_mult": (1,),
    "model.num_res_blocks": 1,
    "model.attention_factors": (),
    "model.conditional": False,
    "process.variance": "learned_range",
}


def tiny(argument="nash", **settings):
    config = digits.get_config(argument)
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config_lib.update(config, TINY)
    config_lib.update(config, named)
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
    """A run from which others start."""
    workdir = tmp_path_factory.mktemp("begun")
    return workdir, train.train(tiny(), workdir)


def state_of(config):
    setup = experiment.build(config, 1, 10)
    return state_layout.new_state(config, setup, init_from.initial_params(config, setup))


def test_a_run_begins_with_the_moving_average_of_another_and_leaves_what_is_frozen(begun, tmp_path):
    workdir, before = begun
    # The method, the optimizer and the number of clusters may differ, but not the network.
    changes = dict(clusters__k=4, optimizer__clip_norm=1.0, process__variance="fixed_small")
    changes["init_from"] = str(workdir)
    pattern = "block_0/(qkv|mlp)|embedding"
    changes |= dict(optimizer__weight_decay=0.1, optimizer__frozen=pattern)
    config = tiny("uncertainty", **changes)
    state = state_of(config)
    assert int(state.step) == 0
    assert_same(state.params, before.ema_params)
    assert_same(state.ema_params, before.ema_params)
    assert np.abs(before.params["output"]["kernel"] - state.params["output"]["kernel"]).max() > 0
    first = train.train(config, tmp_path)
    frozen = optimizers.matching(first.params, pattern)
    assert frozen["block_0"]["qkv"]["kernel"] and frozen["label_embedding"]["embedding"]
    assert not frozen["output"]["kernel"]
    free = 0
    for (path, leaf), old, stays in zip(
        jax.tree.leaves_with_path(first.params),
        jax.tree.leaves(before.ema_params),
        jax.tree.leaves(frozen),
        strict=True,
    ):
        changed = np.abs(np.asarray(leaf) - np.asarray(old)).max() > 0
        assert changed != stays, jax.tree_util.keystr(path)
        free += 0 if stays else leaf.size
    # The optimizer keeps no moments for what is frozen.
    kept = sum(leaf.size for leaf in jax.tree.leaves(first.opt_state))
    assert 2 * free <= kept < 2 * free + 10
    # The run resumes from its own checkpoint; the other run is no longer needed.
    config.num_steps = 5
    checkpoints = tmp_path / "checkpoints"
    assert checkpoint.checkpoint_steps(checkpoints)[-1] == 4
    resumed = train.train(config, tmp_path)
    assert int(resumed.step) == 5
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), resumed.params, first.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


def test_a_run_begins_with_the_weights_of_others(begun, tmp_path):
    workdir, before = begun
    exported = export.export(tiny(), workdir) / "model.safetensors"
    assert exported.parent == workdir / "weights" / "00000004"
    assert "blocks.0.attn.qkv.weight" in interop.read_state(exported)
    assert_same(state_of(tiny(init_from=str(exported))).params, before.ema_params)
    path = tmp_path / "unet.safetensors"
    config = tiny(**{name.replace(".", "__"): value for name, value in UNET.items()})
    other = state_of(config)
    random = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.5, other.params)
    interop.write_state(path, interop.to_torch(random, unet_weights.names(unet.UNet(channels=1))))
    config.init_from = str(path)
    config.init_facts = "heads_first,head_channels=32"
    assert_same(state_of(config).params, random)


def test_weights_that_do_not_fit_are_named(begun, tmp_path):
    workdir, _ = begun
    # The same shapes, but not the same network.
    wrong = dict(init_from=str(workdir), model__heads=2, process__prediction="v")
    with pytest.raises(
        ConfigError, match=r"prediction: 'epsilon' there, .*model.heads: 1 there, 2 here"
    ):
        state_of(tiny(**wrong))
    with pytest.raises(
        ConfigError, match=r"2 of its parameters don't fit .*: output/bias: \(16,\)"
    ):
        state_of(tiny(init_from=str(workdir), process__variance="learned_range"))
    # A flow has the same predictions, of other noise levels.
    flow = tiny(init_from=str(workdir), process__name="flow", process__prediction="epsilon")
    with pytest.raises(ConfigError, match=r"config.process.name: 'gaussian' there, 'flow' here"):
        parameters_of(flow)
    unlabelled = tiny(init_from=str(workdir), model__conditional=False)
    with pytest.raises(ConfigError, match=r"1 of its parameters don't fit .*: label_embedding/emb"):
        state_of(unlabelled)
    with pytest.raises(ConfigError, match=r"config.init_from = .*a folder without a run"):
        state_of(tiny(init_from=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"config.init_from = 'no/where.pt': there is no file"):
        state_of(tiny(init_from="no/where.pt"))
    interop.write_state(tmp_path / "w.safetensors", {"a.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ConfigError, match=r"(?s)w.safetensors.*a\.weight"):
        state_of(tiny(init_from=str(tmp_path / "w.safetensors")))


def parameters_of(config, num_classes=10):
    return init_from.initial_params(config, experiment.build(config, 1, num_classes))


def random_params(config, num_classes=10):
    rng = np.random.default_rng(0)
    shapes = experiment.abstract_params(experiment.build(config, 1, num_classes))
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), shapes)


HEADS = {"model.head_channels": 0, "model.num_heads": 4}
LAID_OUT = {
    "heads_first,head_channels=16": {"model.head_channels": 16},
    "qkv_first,head_channels=16": {"model.head_channels": 16},
    "num_heads=4,heads_first": HEADS,
    "qkv_first,num_heads=4": HEADS,
}


@pytest.fixture
def unet_file(tmp_path):
    """A config of a UNet and the published file that it starts from, by its `init_facts`."""

    def make(facts, said=None, **settings):
        settings = (
            UNET | LAID_OUT[facts] | {"init_from": str(tmp_path / "x.safetensors")} | settings
        )
        config = tiny(**{name.replace(".", "__"): value for name, value in settings.items()})
        order = "qkv_first" if "qkv_first" in facts else "heads_first"
        params = random_params(config)
        names = unet_weights.names(experiment.build(config, 1, 10).model, order)
        state = interop.to_torch(params, names)
        interop.write_state(config.init_from, state)
        config.init_facts = facts if said is None else said
        return config, params

    return make


@pytest.mark.parametrize("facts", LAID_OUT)
def test_a_unet_of_others_is_read_by_what_is_said_of_its_attention(unet_file, facts):
    config, params = unet_file(facts)
    assert_same(parameters_of(config), params)


def test_the_last_row_of_a_label_table_must_be_said_to_be_of_the_null_class(unet_file):
    facts = "qkv_first,num_heads=4"
    config, params = unet_file(facts, **{"model.conditional": True})
    # It could have 11 classes.
    with pytest.raises(
        ConfigError, match=r"has 11 rows, one more than .* add null_row to config.in"
    ):
        parameters_of(config)
    config.init_facts = f"{facts},null_row"
    assert_same(parameters_of(config), params)
    state = interop.read_state(config.init_from)
    interop.write_state(
        config.init_from, state | {"label_emb.weight": state["label_emb.weight"][:-1]}
    )
    with pytest.raises(ConfigError, match=r"null_row .* is for a label table with one row more"):
        parameters_of(config)
    config.init_facts = facts
    params["label_embedding"]["embedding"][-1] = 0
    assert_same(parameters_of(config), params)


@pytest.mark.parametrize(
    "said, fault",
    [
        (
            "",
            "the layout of a UNet's attention: set config.init_facts = 'ORDER,HEADS'",
        ),
        ("qkv_first", "the layout of a UNet's attention"),
        ("num_heads=4", "the layout of a UNet's attention"),
        ("qkv_first,heads_first,num_heads=4", "the layout of a UNet's attention"),
        ("qkv_first,num_heads=8", "model.num_heads: 8 there, 4 here"),
        ("qkv_first,head_channels=8", "head_channels: 8 there, 0 here; .*num_heads: 0 there, 4 he"),
        (
            "qkv_first,num_heads=4,num_heads=8",
            "the known facts are .*, each at most once",
        ),
        (
            "qkv_first,heads=4",
            "a unet the known facts are head_channels=N, heads_first, null_row, num_heads=N, qk",
        ),
    ],
)
def test_a_unet_of_which_too_little_or_something_else_is_said_is_refused(unet_file, said, fault):
    config, _ = unet_file("qkv_first,num_heads=4", said)
    with pytest.raises(ConfigError, match=f"^config.init_from = .*x.safetensors': .*{fault}"):
        parameters_of(config)


def test_what_is_known_of_a_published_unet_is_told(unet_file, monkeypatch, caplog):
    monkeypatch.setattr(unet_weights, "published", lambda _: ("a network", "qkv_first,num_heads=4"))
    config, params = unet_file("qkv_first,num_heads=4", "")
    with pytest.raises(
        ConfigError, match=r"; a network has the same size, and its facts are 'qkv_first,"
    ):
        parameters_of(config)
    config.init_facts = "num_heads=4,qkv_first"
    assert_same(parameters_of(config), params)
    assert not caplog.records
    config.init_facts = "num_heads=4,heads_first"
    parameters_of(config)
    assert "a network has the same size, and its facts are 'qkv_first,num_heads=4'" in caplog.text


def test_latents_of_another_scale_are_refused(unet_file):
    config, params = unet_file("qkv_first,num_heads=4")
    state = interop.read_state(config.init_from) | {"scale_factor": np.float32(0.5)}
    network = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    network["scale_factor"] = network.pop("model.diffusion_model.scale_factor")
    interop.write_state(config.init_from, network)
    assert_same(parameters_of(config), params)
    setup = experiment.build(config, 1, 10)
    config.autoencoder.name = "KL-f8"
    with pytest.raises(ConfigError, match=r"are scaled by 0.5, .*config.autoencoder.scale = 1$"):
        init_from.initial_params(config, setup)
    config.autoencoder.scale = 0.5
    assert_same(init_from.initial_params(config, setup), params)


@pytest.fixture
def dit_file(tmp_path, monkeypatch):
    """A config of a DiT and the published file that it starts from."""
    monkeypatch.setitem(dit.SIZES, "S", dict(depth=1, width=8, heads=2))
    config = tiny(init_from=str(tmp_path / "x.safetensors"), init_facts="heads=1")
    params = random_params(config)
    state = interop.to_torch(params, dit_weights.names(dit.DiT(channels=1)))
    state["pos_embed"] = np.float32(dit.positions(2, 2, 8))[None]
    interop.write_state(config.init_from, state)
    return config, params, state


def test_the_heads_of_a_dit_are_those_of_its_published_size_or_are_said(dit_file, monkeypatch):
    config, params, _ = dit_file
    assert_same(parameters_of(config), params)
    config.init_facts = ""
    with pytest.raises(ConfigError, match=r"settings: config.model.heads: 2 there, 1 here"):
        parameters_of(config)
    config.model.heads = 2
    assert_same(parameters_of(config), params)
    config.model.heads, config.init_facts = 1, "heads=4"
    with pytest.raises(ConfigError, match=r"settings: config.model.heads: 4 there, 1 here"):
        parameters_of(config)
    monkeypatch.setitem(dit.SIZES, "S", dict(depth=2, width=8, heads=2))
    config.init_facts = ""
    with pytest.raises(ConfigError, match=r"no published size: set config.init_facts = 'heads=N'"):
        parameters_of(config)


FLOW = {"process.name": "flow", "sampler.name": "ddim", "model.level_scale": 1.0}


def test_a_sit_belongs_to_a_flow_of_velocities(dit_file):
    config, params, state = dit_file
    config.init_facts = "sit,heads=1"
    with pytest.raises(
        ConfigError,
        match=r"process.name: 'flow' there, 'gaussian' here; .*level_scale: 1.0 there, 1000.0 here",
    ):
        parameters_of(config)
    config_lib.update(config, FLOW | {"process.name": "edm"})
    with pytest.raises(ConfigError, match=r"process.name: 'flow' there, 'edm' here; use"):
        parameters_of(config)
    config_lib.update(config, FLOW)
    config.process.prediction = "x0"
    with pytest.raises(ConfigError, match=r"process.prediction: 'velocity' there, 'x0' here; use"):
        parameters_of(config)
    config.process.prediction = "velocity"
    read = parameters_of(config)
    np.testing.assert_array_equal(read["output"]["kernel"], -params["output"]["kernel"])
    # An exported file says what it is, and is written as a SiT again.
    setup, settings = experiment.build(config, 1, 10), config_lib.meaning(config)
    written = interop.to_torch(read, init_from.export_names(setup, settings))
    np.testing.assert_array_equal(
        written["final_layer.linear.weight"], state["final_layer.linear.weight"]
    )
    interop.write_state(config.init_from, written, init_from.export_metadata(settings))
    config.init_facts = ""
    again = parameters_of(config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, read)
    # Also for images of another size.
    config.data.image_size, config.data.crop = 16, "center"
    assert_same(parameters_of(config), again)


def test_a_dit_of_diffusers_own_is_refused(dit_file):
    config, _, state = dit_file
    name = "t_embedder.mlp.2.bias"
    theirs = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.bias"
    interop.write_state(config.init_from, {theirs: state.pop(name)} | state)
    with pytest.raises(ConfigError, match="diffusers' DiT encodes timesteps differently"):
        parameters_of(config)


def test_another_position_encoding_is_refused(dit_file):
    config, _, state = dit_file
    state["pos_embed"] += np.float32(0.01)
    interop.write_state(config.init_from, state)
    with pytest.raises(ConfigError, match=r"pos_embed differs by up to 0.01 from the fixed sines"):
        parameters_of(config)
    config.data.image_size = 16
    config.data.crop = "center"
    with pytest.raises(ConfigError, match=r"pos_embed has 4 positions, .* here has 16: .* size"):
        parameters_of(config)


def test_a_dit_without_position_encoding_must_be_said_to_be_one(dit_file):
    config, params, state = dit_file
    del state["pos_embed"]
    interop.write_state(config.init_from, state)
    with pytest.raises(ConfigError, match=r"it has no pos_embed, .* add no_pos_embed to config.in"):
        parameters_of(config)
    config.init_facts += ",no_pos_embed"
    assert_same(parameters_of(config), params)


def test_a_label_table_that_is_none_is_named(dit_file):
    config, _, state = dit_file
    state["y_embedder.embedding_table.weight"] = np.float32(1)
    interop.write_state(config.init_from, state)
    with pytest.raises(ConfigError, match=r"embedding_table.weight is a scalar there and 11x8"):
        parameters_of(config)


def test_a_table_without_a_row_for_the_null_class_must_be_said_to_be_one(dit_file, caplog):
    config, params, state = dit_file
    table = "y_embedder.embedding_table.weight"
    config.init_facts = "no_null_row,heads=1"
    with pytest.raises(ConfigError, match=r"no_null_row .* is for a label table with as many rows"):
        parameters_of(config)
    config.init_facts = "heads=1"
    interop.write_state(config.init_from, state | {table: state[table][:-1]})
    # It could have 9 classes and a null class.
    with pytest.raises(
        ConfigError, match=r"label table has 10 rows, .* add no_null_row to config.in"
    ):
        parameters_of(config)
    config.init_facts = "no_null_row,heads=1"
    params["label_embedding"]["embedding"][-1] = 0
    assert_same(parameters_of(config), params)
    assert "has no row for the null class" in caplog.text
    config.optimizer.frozen = "embedding"
    with pytest.raises(
        ConfigError, match=r"no row for the null class, and config.optimizer.frozen"
    ):
        parameters_of(config)
    config.label_dropout = 0.0
    assert_same(parameters_of(config), params)


def test_an_export_says_what_it_is(begun):
    workdir, before = begun
    exported = str(export.export(tiny(), workdir) / "model.safetensors")
    config = tiny(init_from=exported)
    assert_same(parameters_of(config), before.ema_params)
    for setting, value in (("model__heads", 2), ("process__prediction", "v")):
        name = setting.replace("__", ".")
        with pytest.raises(
            ConfigError, match=f"other settings: config.{name}: .* there, '?{value}"
        ):
            parameters_of(tiny(init_from=exported, **{setting: value}))
    for source in (exported, str(workdir)):
        with pytest.raises(ConfigError, match=r"has .*: leave config.init_facts empty"):
            parameters_of(tiny(init_from=source, init_facts="heads=1"))
    state = interop.read_state(exported)
    for metadata in ("{", "[1]", "3", "{}", "[" * 100_000):
        interop.write_state(exported, state, {"ant_jax": metadata})
        with pytest.raises(ConfigError, match=r"metadata of the file are damaged|'not set' there"):
            parameters_of(config)


def test_the_model_card_of_a_run_without_figures(begun):
    """It says so, and its code draws samples from the folder alone."""
    workdir, _ = begun
    workdir = shutil.copytree(workdir, workdir.with_name("private") / "shared")
    # Figures of other weights, of a file of samples that says nothing, and of another program.
    results_of = workdir / "evaluation"
    results_of.mkdir()
    for i, made_from in enumerate(({"step": 4, "params": "0", "settings": {}}, {"a": 1}, None)):
        content = json.dumps({"frechet_distance": 123.5, "made_from": made_from})
        (results_of / f"{i}.json").write_text(content)
    folder = export.export(tiny(evaluation__reference=str(workdir / "real.npz")), workdir)
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["datasets"] == ["digits"] and front["library_name"] == "ant-jax"
    assert "model-index" not in front and "123.5" not in card and "license" not in front
    assert "--workdir WORKDIR --mode evaluate --step 4\n" in card
    settings = (folder / "config.json").read_text()
    assert '"reference": "real.npz"' in settings and "private" not in settings + card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope = {}
    exec(code.replace("FOLDER", str(folder)), scope)
    assert scope["images"].shape == (16, 8, 8, 1)


def test_an_export_for_diffusers_is_a_folder(begun, caplog):
    workdir, before = begun
    folder = export.export(tiny(), workdir, layout="diffusers")
    assert folder == workdir / "weights" / "00000004-diffusers"
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert (config["sample_size"], config["num_embeds_ada_norm"]) == (8, 10)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = interop.read_state(weights)
    np.testing.assert_array_equal(state["proj_out_2.bias"], before.ema_params["output"]["bias"])
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    alphas_bar = experiment.build(tiny(), 1, 10).process.alphas_bar
    betas = scheduler.pop("trained_betas")
    np.testing.assert_allclose(np.cumprod(1 - np.array(betas)), alphas_bar)
    assert scheduler == {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.42.0",
        "num_train_timesteps": 50,
        "prediction_type": "epsilon",
        "clip_sample": True,
    }
    # Without an autoencoder there is no pipeline.
    assert not (folder / "model_index.json").exists()
    assert "time_proj.downscale_freq_shift = 0" in (folder / "README.md").read_text()
    assert "for equal outputs add the two lines in" in caplog.text
    with pytest.raises(ConfigError, match=r"it was exported for diffusers: start from the \.safet"):
        parameters_of(tiny(init_from=str(weights)))


def test_a_flow_for_diffusers(tmp_path, monkeypatch):
    config = tiny(**{name.replace(".", "__"): value for name, value in FLOW.items()})
    config.process.shift = 2.0
    config.autoencoder.scale = 0.5
    setup, params = experiment.build(config, 1, 10), random_params(config)
    monkeypatch.setattr(export.results, "restore_run", lambda *_, draws: (7, setup, params))
    workdir_lib.save_config(config, tmp_path)
    write = lambda: export.export(config, tmp_path, layout="diffusers")
    config.autoencoder.name = "KL-f8"
    folder = write()
    pipeline = json.loads((folder / "model_index.json").read_text())
    assert pipeline["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert pipeline["scheduler"] == ["diffusers", scheduler["_class_name"]]
    assert scheduler["prediction_type"] == "flow_prediction" and scheduler["flow_shift"] == 2
    card = (folder / "README.md").read_text()
    assert "scaling_factor=0.5" in card and "downscale_freq_shift" not in card
    config.process.prediction = "x0"
    setup = setup._replace(process=config_lib.build_process(config))
    with pytest.raises(
        ConfigError, match=r"no scheduler for config.process.name = 'flow', .*prediction = 'x0', o"
    ):
        write()
    setup = setup._replace(model=unet.UNet(channels=1))
    with pytest.raises(ConfigError, match=r"^cannot export for diffusers: only a 'dit', not"):
        write()


def test_weights_that_are_not_finite_are_refused_before_anything_is_written_or_compiled(
    begun, dit_file, tmp_path, monkeypatch
):
    def never(*_):
        raise AssertionError("compiling")

    monkeypatch.setattr(compiled_step, "start_compiling", never)
    config, _, state = dit_file
    state["final_layer.linear.bias"][2] = np.nan
    interop.write_state(config.init_from, state)
    with pytest.raises(
        ConfigError, match=r"1 of the 16 values of final_layer\.linear\.bias are NaN"
    ):
        train.train(config, tmp_path / "run")
    workdir, before = begun
    damaged = jax.tree.map(np.array, before.ema_params)
    damaged["output"]["bias"][2] = np.inf
    monkeypatch.setattr(checkpoint, "restore_part", lambda *_: (4, damaged))
    with pytest.raises(
        ConfigError, match="its parameter output/bias has values that are NaN or inf"
    ):
        train.train(tiny(init_from=str(workdir)), tmp_path / "run")
    assert {path.name for path in tmp_path.glob("run/*")} <= {".lock"}


class Own(nn.Module):
    """A network that a config names, without labels."""

    scale: float = 2.0

    @nn.compact
    def __call__(self, x, t, y=None):
        level = self.scale * t.astype(jnp.float32)[:, None, None, None] / 50
        gain = self.param("gain", nn.initializers.zeros, ())
        return nn.Dense(x.shape[-1], name="pixels")(x) + gain * level


def test_a_network_of_ones_own_is_trained_exported_and_begun_with(begun, tmp_path):
    own = dict(model__name=f"{__name__}:Own", model__conditional=False)
    state = train.train(tiny(**own), tmp_path / "run")
    exported = export.export(tiny(**own), tmp_path / "run") / "model.safetensors"
    assert set(interop.read_state(exported)) == {"gain", "pixels.kernel", "pixels.bias"}
    config = tiny(**own, init_from=str(exported))
    assert_same(state_of(config).params, state.ema_params)
    config.init_from = str(tmp_path / "run")
    assert_same(state_of(config).params, state.ema_params)
    # It has no module for published weights.
    workdir, _ = begun
    state = interop.read_state(export.export(tiny(), workdir) / "model.safetensors")
    interop.write_state(tmp_path / "others.safetensors", state)
    config.init_from = str(tmp_path / "others.safetensors")
    with pytest.raises(ConfigError, match=f"has no metadata, .* module {__name__}_weights"):
        state_of(config)
    for changes, fault in (
        ({"model__conditional": True}, "Own has no field num_classes, so it can't be conditional"),
        ({"process__variance": "learned_range"}, "Own has no field learned_variance, so"),
        ({"model__dtype": "bfloat16"}, "Own has no field dtype, so"),
        ({"model__name": f"{__name__}:Omn"}, ".*Omn' can't be imported: "),
        (
            {"model__name": f"{__name__}:tiny"},
            "tiny makes a Config, not a Flax Linen module",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^config.model.* {fault}"):
            state_of(tiny(**own | changes))


def test_the_gram_matrix_is_of_the_gradients_of_what_is_not_frozen():
    config = tiny(optimizer__frozen="output")
    setup = experiment.build(config, 1, 10)
    noisy = jax.tree.map(lambda leaf: 0.3 * leaf, random_params(config))
    x = jnp.ones((2, 8, 8, 1))
    t, y = jnp.arange(2), jnp.arange(2)

    def loss(params, pattern):
        params = optimizers.stop_gradients(params, pattern)
        return jnp.mean(setup.model.apply({"params": params}, x, t, y) ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    whole, part = (grad(noisy, pattern) for pattern in ("", "^output/"))
    assert not np.any(part["output"]["kernel"]) and np.any(whole["output"]["kernel"])
    del whole["output"], part["output"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, part)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(UNET, marks=pytest.mark.slow), {"process.prediction": "v"}],
    ids=["unet", "v"],
)
def test_what_else_a_config_can_train(settings, tmp_path):
    changes = {name.replace(".", "__"): value for name, value in settings.items()}
    config = tiny("uncertainty", optimizer__learning_rate=1e-3, num_steps=6, **changes)
    train.train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert np.isfinite(losses).all() and len(losses) == 6
    # v of noise alone has the variance of the noise where there is noise, of the data elsewhere.
    assert losses[-1] < losses[0]
