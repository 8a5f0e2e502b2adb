"""Weights of DiT by the names of the paper's code, of SiT, of DTR and of diffusers."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from recorded_dit import DTR, MODEL, SIT, diffusers_state, recorded_state, recording, template

from ant_jax.interop import WeightsError, from_torch, read_state, to_torch, write_state
from ant_jax.models.dit import DiT, positions
from ant_jax.models.dit_weights import exported, names, recognise

# Images of 8 x 8 pixels have 4 x 4 patches.
DIT = names(MODEL, positions(4, 4, 16))
FLOW = {"name": "flow", "prediction": "velocity"}


def paper_state():
    """The same weights by the names of the paper's code, in the order of its state dict."""
    theirs = diffusers_state()
    state = {"pos_embed": np.float32(positions(4, 4, 16))[None]}

    def take(name, *sources):
        for kind in ("weight", "bias"):
            if f"{sources[0]}.{kind}" in theirs:
                parts = [theirs[f"{source}.{kind}"] for source in sources]
                state[f"{name}.{kind}"] = np.concatenate(parts)

    take("x_embedder.proj", "pos_embed.proj")
    embedding = "transformer_blocks.0.norm1.emb"
    take("t_embedder.mlp.0", f"{embedding}.timestep_embedder.linear_1")
    take("t_embedder.mlp.2", f"{embedding}.timestep_embedder.linear_2")
    take("y_embedder.embedding_table", f"{embedding}.class_embedder.embedding_table")
    for i in range(2):
        block = f"transformer_blocks.{i}"
        take(f"blocks.{i}.attn.qkv", *(f"{block}.attn1.to_{part}" for part in "qkv"))
        take(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        take(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        take(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
        take(f"blocks.{i}.adaLN_modulation.1", f"{block}.norm1.linear")
    take("final_layer.linear", "proj_out_2")
    take("final_layer.adaLN_modulation.1", "proj_out_1")
    return state


def assert_equal_trees(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), ours, theirs)


def test_weights_of_others_give_their_numbers():
    params = from_torch(diffusers_state(), template(), DIT)
    x = recording()["x"].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        output = jax.jit(MODEL.apply)({"params": params}, x, recording()["t"], recording()["y"])
    expected = recording()["output"].transpose(0, 2, 3, 1)
    assert output.shape == expected.shape == (3, 8, 8, 6)
    assert 0.5 < expected.std() < 5
    assert abs(output - expected).max() < 1e-4 * abs(expected).max()


def test_names_of_the_paper_and_of_diffusers_are_of_the_same_network():
    params = from_torch(paper_state(), template(), DIT)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, template())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert_equal_trees(params, from_torch(diffusers_state(), template(), DIT))


def test_an_embedding_that_differs_between_blocks_is_refused():
    state = diffusers_state()
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    state[name] = state[name] + 1
    with pytest.raises(WeightsError, match=r"t_embedder\.mlp\.2\.bias differs between the blocks"):
        from_torch(state, template(), DIT)


@pytest.mark.parametrize("name", ["pos_embed", "pos_embed.pos_embed"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_position_encoding_is_compared(name, dtype):
    state = paper_state()
    ours = state.pop("pos_embed")
    # Rounded to a smaller type once, and stored as float32.
    for theirs in (ours.astype(dtype), ours.astype(dtype).astype(np.float32)):
        from_torch(state | {name: theirs}, template(), DIT)
    others = [ours + 1e-3, np.roll(ours, 1, axis=1), 0 * ours, ours[:, ::-1], ours * np.nan]
    for theirs in others:
        with pytest.raises(
            WeightsError, match=r"pos_embed differs by up to .* was learned, or comes"
        ):
            from_torch(state | {name: np.float32(theirs)}, template(), DIT)
    for theirs in (ours[:, :9], np.zeros((1, 17, 16)), np.zeros((1, 16, 8)), np.zeros(16)):
        with pytest.raises(WeightsError, match=r"positions, .* 16: .* another image size"):
            from_torch(state | {name: theirs}, template(), DIT)
    with pytest.raises(WeightsError, match="can't be checked, because the image size is unknown"):
        from_torch(state | {name: ours}, template(), names(MODEL))


def test_one_class_is_none():
    state = paper_state()
    name, bias = "y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias"
    unlabelled = template(MODEL.clone(num_classes=0))
    rows = state.pop(name)
    params = from_torch(state | {name: rows[:1]}, unlabelled, DIT)
    moved = state | {bias: state[bias] + rows[0]}
    assert_equal_trees(params, from_torch(moved, unlabelled, DIT))
    # One class and a null class, or two classes.
    with pytest.raises(WeightsError, match=f"1 unexpected: {name}"):
        from_torch(state | {name: rows[:2]}, unlabelled, DIT)


def test_a_table_without_null_class():
    state = paper_state()
    name = "y_embedder.embedding_table.weight"
    fewer = state | {name: state[name][:5]}
    with pytest.raises(WeightsError, match="5x16 there and 6x16 here"):
        from_torch(fewer, template(), DIT)
    without = names(MODEL, positions(4, 4, 16), null_row=False)
    table = from_torch(fewer, template(), without)["label_embedding"]["embedding"]
    np.testing.assert_array_equal(table[:5], state[name][:5])
    assert table.shape == (6, 16) and not table[5].any()


def test_weights_go_back_to_where_they_came_from(tmp_path):
    state = paper_state()
    params = from_torch(state, template(), DIT)
    write_state(tmp_path / "x.safetensors", to_torch(params, DIT))
    written = read_state(tmp_path / "x.safetensors")
    assert set(written) == set(state)
    for name, value in written.items():
        np.testing.assert_array_equal(value, state[name], strict=True)


def test_weights_of_dtr_give_their_numbers_and_go_back():
    state = recorded_state("dtr")
    found = recognise(state, template(DTR), DTR, (8, 8, 3), {"heads": "2"})
    params = from_torch(state, template(DTR), found.names)
    assert_gives_recorded("dtr", DTR, params, lambda t: t)
    written = to_torch(params, exported(DTR, (8, 8, 3), {"name": "gaussian"}))
    assert_same_state(written, state)


@pytest.mark.parametrize("outputs", [6, 3])
def test_weights_of_sit_give_their_numbers_and_go_back(outputs):
    """Its code ignores the last three of six outputs."""
    state = recorded_state("sit")
    used = {
        name: value.reshape(4, 6, *value.shape[1:])[:, :outputs].reshape(-1, *value.shape[1:])
        for name, value in state.items()
        if name.startswith("final_layer.linear")
    }
    found = recognise(state | used, template(SIT), SIT, (8, 8, 3), {"heads": "2", "sit": ""})
    assert (found.fields, found.process) == ({"heads": 2, "level_scale": 1.0}, FLOW)
    params = from_torch(state | used, template(SIT), found.names)
    # Its time is 0 where the data are noise, and its velocity points to the data.
    assert_gives_recorded("sit", SIT, params, lambda t: 1 - t, sign=-1)
    if outputs == 3:
        assert_same_state(to_torch(params, exported(SIT, (8, 8, 3), FLOW)), state | used)


def assert_gives_recorded(code, model, params, time, sign=1):
    stored = recording(code)
    x, expected = (stored[name].transpose(0, 2, 3, 1) for name in ("x", "output"))
    with jax.default_matmul_precision("highest"):
        output = jax.jit(model.apply)({"params": params}, x, time(stored["t"]), stored["y"])
    assert output.shape == expected.shape
    assert 0.5 < expected.std() < 5
    assert abs(sign * output - expected).max() < 1e-5 * abs(expected).max()


def assert_same_state(ours, theirs):
    """The published code loads ours strictly, and computes the same."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == np.float32 and ours[name].shape == value.shape
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-7)


def test_other_flows_keep_their_time_and_sign():
    params = from_torch(paper_state(), template(), DIT)
    plain = to_torch(params, exported(MODEL, (8, 8, 3), FLOW))
    others = [(SIT, FLOW | {"prediction": "x0"}), (SIT, {"name": "edm"}), (DTR, FLOW)]
    for model, process in others:
        written = to_torch(params, exported(model, (8, 8, 3), process))
        for name in ("t_embedder.mlp.0.weight", "final_layer.linear.weight"):
            np.testing.assert_array_equal(written[name], plain[name])


def test_a_network_of_sit_must_be_said_to_be_one():
    state = recorded_state("sit")
    read = lambda model, **facts: recognise(
        state, template(model), model, (8, 8, 3), {"heads": "2"} | facts
    )
    with pytest.raises(ValueError, match=r"level_scale = 1 .* add sit to config.init_facts"):
        read(SIT)
    with pytest.raises(ValueError, match=r"a SiT has no learned variance: it needs config.process"):
        read(MODEL, sit="")
    with pytest.raises(ValueError, match=r"no denoising task routing"):
        read(SIT.clone(routing=0.8), sit="")
    # The trainer compares it with its own.
    assert read(SIT.clone(level_scale=1000.0), sit="").fields["level_scale"] == 1
    with pytest.raises(ValueError, match=r"^sit in config.init_facts is for files with the names"):
        recognise(diffusers_state(), template(SIT), SIT, (8, 8, 3), {"heads": "2", "sit": ""})


@pytest.mark.parametrize("patch, channels", [(1, 4), (4, 3)])
def test_other_patches_without_classes(tmp_path, patch, channels):
    model = DiT(width=8, depth=1, heads=2, patch=patch, channels=channels)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), template(model))
    state = to_torch(params, names(model))
    kernel = state["x_embedder.proj.weight"]
    assert kernel.shape == (8, channels, patch, patch)
    # A convolution of stride p, on one patch.
    pixels = rng.normal(size=(patch, patch, channels))
    np.testing.assert_allclose(
        np.einsum("ocij,ijc->o", kernel, pixels),
        pixels.reshape(-1) @ params["patch_embedding"]["kernel"],
        rtol=1e-5,
    )
    assert not any(name.startswith("y_embedder") for name in state)
    write_state(tmp_path / "x.safetensors", state)
    again = from_torch(read_state(tmp_path / "x.safetensors"), template(model), names(model))
    assert_equal_trees(again, params)
    wrong = "x_embedder.proj.weight is 8x4x1x1 there and 8x1x2x2 here"
    if patch == 4:
        wrong = "x_embedder.proj.weight is 8x3x4x4 there and 8x12x2x2 here"
    with pytest.raises(WeightsError, match=wrong):
        from_torch(state, template(model), DIT)


def test_patches_that_cannot_be():
    with pytest.raises(WeightsError, match=r"12 inputs of x_embedder.proj are not .* of 8x8"):
        to_torch(
            {"patch_embedding": {"kernel": np.zeros((12, 8))}}, names(DiT(channels=3, patch=8))
        )


MLP = ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]


def test_what_does_not_fit_is_said():
    state = paper_state()
    for name in [name for name in state if ".mlp." in name and "blocks." in name]:
        state[f"other.{name}"] = state.pop(name)
    state["final_layer.linear.bias"] = np.zeros(12)
    with pytest.raises(WeightsError) as caught:
        from_torch(state, template(), DIT)
    message = str(caught.value)
    first = [f"blocks.0.mlp.{name}" for name in MLP] + ["blocks.1.mlp.fc1.bias, ...; "]
    assert f"8 missing: {', '.join(first)}" in message
    assert "8 unexpected: other.blocks.0.mlp.fc1.weight, " in message
    assert message.count("other.blocks") == 5
    assert "1 of another shape: final_layer.linear.bias is 12 there and 24 here. " in message


def test_classes_and_variance_are_those_of_the_weights():
    state = paper_state()
    bare = MODEL.clone(num_classes=0, learned_variance=False)
    with pytest.raises(WeightsError) as caught:
        from_torch(state, template(bare), DIT)
    assert "1 unexpected: y_embedder.embedding_table.weight" in str(caught.value)
    assert "2 of another shape: final_layer.linear." in str(caught.value)
    more = MODEL.clone(num_classes=6)
    with pytest.raises(WeightsError, match=r"embedding_table\.weight is 6x16 there and 7x16 here"):
        from_torch(state, template(more), DIT)


def test_parameters_of_another_family():
    with pytest.raises(WeightsError, match=r"^middle_0.norm_1.bias is no parameter of a DiT"):
        to_torch({"middle_0": {"norm_1": {"bias": np.zeros(2)}}}, DIT)
    with pytest.raises(WeightsError, match=r"^output.gain is no parameter of a DiT"):
        to_torch({"output": {"gain": np.zeros(2)}}, DIT)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_of_other_types_become_float32(tmp_path, dtype):
    state = {name: value.astype(dtype) for name, value in paper_state().items()}
    write_state(tmp_path / "x.safetensors", state)
    stored = read_state(tmp_path / "x.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(dtype)}
    params = from_torch(stored, template(), DIT)
    expected = {name: value.astype(np.float32) for name, value in state.items()}
    assert_equal_trees(params, from_torch(expected, template(), DIT))
