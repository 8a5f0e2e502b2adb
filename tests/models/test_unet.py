"""UNet against recorded outputs of the ADM code and against published sizes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.interop import WeightsError, from_torch, read_state, to_torch, write_state
from ant_jax.models import unet_weights
from ant_jax.models.remat import REMAT
from ant_jax.models.unet import VARIANTS, UNet

RECORDS = Path(__file__).parents[1] / "data" / "unet"
COMMON = dict(num_res_blocks=1, attention_factors=(2,), head_channels=16, channels=3)
# The settings of tests/data/unet/record.py.
MODELS = {
    "adm": UNet(width=16, channel_mult=(2, 2), num_classes=4, learned_variance=True, **COMMON),
    "ldm": UNet(
        width=32, channel_mult=(1, 2), scale_shift_norm=False, resblock_updown=False, **COMMON
    ),
    "new": UNet(
        width=32,
        channel_mult=(1, 2),
        scale_shift_norm=False,
        resblock_updown=False,
        **COMMON | dict(attention_factors=(1,), head_channels=0, num_heads=4),
    ),
}
HEADS_FIRST = unet_weights.names(MODELS["adm"])
NAMES = {name: HEADS_FIRST for name in MODELS}
NAMES["new"] = unet_weights.names(MODELS["new"], "qkv_first")
# The least that has every kind of module.
TINY = dict(COMMON, width=32, channel_mult=(1, 1), attention_factors=(1,))
KEY = jax.random.key(0)


@functools.cache
def _record(name):
    """State dict, inputs (x, t and y or nothing) and output."""
    arrays = dict(np.load(RECORDS / f"{name}.npz"))
    x = np.moveaxis(arrays.pop("x"), 1, -1).astype(np.float32)
    labels = [arrays.pop("y")] if "y" in arrays else []
    t = arrays.pop("t")
    if t.dtype.kind == "f":
        # Floats are levels in [0, 1] here, and timesteps there.
        t = t / 1000
    inputs = (x, t, *labels)
    output = np.moveaxis(arrays.pop("output"), 1, -1)
    return arrays, inputs, output


@functools.cache
def _params(name):
    return from_torch(_record(name)[0], _template(name), NAMES[name])


@functools.cache
def _template(name):
    return _shapes(MODELS[name])[1]["params"]


@functools.cache
def _compiled(name):
    return jax.jit(lambda params, *inputs: MODELS[name].apply({"params": params}, *inputs))


def _apply(name, *inputs, params=None):
    with jax.default_matmul_precision("highest"):
        return np.asarray(_compiled(name)(params or _params(name), *inputs))


def _shapes(model, size=8):
    x = jax.ShapeDtypeStruct((1, size, size, model.channels), jnp.float32)
    integers = jax.ShapeDtypeStruct((1,), jnp.int32)
    labels = [integers] if model.num_classes else []
    return jax.eval_shape(model.init_with_output, KEY, x, integers, *labels)


@pytest.mark.parametrize("name", MODELS)
def test_parity_with_the_recorded_output(name):
    _, inputs, expected = _record(name)
    assert 0.1 < expected.std() < 10
    output = _apply(name, *inputs)
    assert output.shape == expected.shape
    assert abs(output - expected).max() < 1e-4 * abs(expected).max()
    shapes = jax.tree.map(lambda p: p.shape, _template(name))
    assert jax.tree.map(np.shape, _params(name)) == shapes


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_back_to_where_they_came_from(tmp_path, name):
    state = dict(_record(name)[0])
    if name == "adm":
        null_row = np.zeros((1, 4 * MODELS[name].width))
        state["label_emb.weight"] = np.concatenate([state["label_emb.weight"], null_row])
    write_state(tmp_path / "x.safetensors", to_torch(_params(name), NAMES[name]))
    written = read_state(tmp_path / "x.safetensors")
    assert set(written) == set(state)
    for key, value in written.items():
        np.testing.assert_array_equal(value, state[key].astype(np.float32), strict=True)
    again = from_torch(written, _template(name), NAMES[name])
    jax.tree.map(np.testing.assert_array_equal, again, _params(name))


@pytest.mark.parametrize(
    "variant, size, num_classes, learned_variance, exact, published_millions",
    [
        # Dhariwal & Nichol 2021, table 11; their label tables have no null class.
        ("ADM-64", 64, 1000, True, 295_904_454 + 4 * 192, 296),
        ("ADM-128", 128, 1000, True, 421_529_606 + 4 * 256, 422),
        ("ADM-512", 512, 1000, True, 558_997_638 + 4 * 256, 559),
        ("ADM-256", 256, 1000, True, 553_838_086 + 4 * 256, 554),
        # README of github.com/jychoi118/P2-weighting.
        ("ADM-light-256", 256, 0, True, 93_563_910, 93),
        # Rombach et al. 2022, table 12.
        ("LDM-4", 64, 0, False, 274_056_163, 274),
    ],
)
def test_published_parameter_counts(
    variant, size, num_classes, learned_variance, exact, published_millions
):
    given = dict(channels=3, num_classes=num_classes, learned_variance=learned_variance)
    model = UNet(**VARIANTS[variant], **given)
    output, params = _shapes(model, size)
    assert output.shape == (1, size, size, 6 if learned_variance else 3)
    assert sum(p.size for p in jax.tree.leaves(params)) == exact
    # Some round to the nearest million, some down.
    assert abs(exact / 1e6 - published_millions) < 1
    # What the authors say of their checkpoints of this size is what the variant is.
    known = unet_weights.published(params["params"])
    if variant == "ADM-light-256":
        assert known is None
    else:
        heads = (
            ("num_heads", model.num_heads)
            if model.num_heads
            else ("head_channels", model.head_channels)
        )
        order = "qkv_first" if variant == "ADM-64" else "heads_first"
        assert known[1] == f"{order},{heads[0]}={heads[1]}"


def test_the_other_order_of_attention_channels():
    state, _, _ = _record("adm")
    reordered = dict(state)
    for name, weight in state.items():
        if "qkv" in name:
            heads = weight.shape[0] // (3 * 16)
            parts = weight.reshape(heads, 3, 16, *weight.shape[1:])
            reordered[name] = np.concatenate(
                [parts[head, part] for part in range(3) for head in range(heads)]
            )
    names = unet_weights.names(MODELS["adm"], "qkv_first")
    params = from_torch(reordered, _template("adm"), names)
    jax.tree.map(np.testing.assert_array_equal, params, _params("adm"))
    plain = from_torch(reordered, _template("adm"), HEADS_FIRST)["middle_1"]["qkv"]["kernel"]
    assert (plain != _params("adm")["middle_1"]["qkv"]["kernel"]).any()
    written = to_torch(params, names)
    for name, weight in reordered.items():
        if "qkv" in name:
            np.testing.assert_array_equal(written[name], weight)
    with pytest.raises(WeightsError, match=r"96 channels of .*qkv .* heads of 48 channels"):
        other = UNet(channels=3, width=96, head_channels=48)
        from_torch(reordered, _template("adm"), unet_weights.names(other, "qkv_first"))


def test_the_moving_average_of_a_checkpoint_of_ldm_comes_first():
    state = _record("ldm")[0]
    # As ldm/models/diffusion/ddpm.py and ldm/modules/ema.py name them.
    checkpoint = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    checkpoint |= {"betas": np.zeros(5), "first_stage_model.encoder.conv_in.bias": np.zeros(3)}
    jax.tree.map(
        np.testing.assert_array_equal,
        from_torch(checkpoint, _template("ldm"), HEADS_FIRST),
        _params("ldm"),
    )
    for name, value in state.items():
        checkpoint["model_ema.diffusion_model" + name.replace(".", "")] = 2 * value
    checkpoint |= {"model_ema.decay": np.zeros(()), "model_ema.num_updates": np.zeros(())}
    average = from_torch(checkpoint, _template("ldm"), HEADS_FIRST)
    jax.tree.map(
        np.testing.assert_array_equal, average, jax.tree.map(lambda p: 2 * p, _params("ldm"))
    )
    checkpoint["model_ema.diffusion_modelout3bias"] = np.zeros(3)
    del checkpoint["model_ema.diffusion_modelout2weight"]
    faults = r"1 missing: out\.2\.weight; 1 unexpected: model_ema\.diffusion_modelout3bias\."
    with pytest.raises(WeightsError, match=f"fit this UNet: {faults}"):
        from_torch(checkpoint, _template("ldm"), HEADS_FIRST)


def test_the_null_class_has_a_row_of_its_own():
    _, (x, t, y), _ = _record("adm")
    params = jax.tree.map(np.array, _params("adm"))
    params["label_embedding"]["embedding"][4] += 1
    for labels, changes in ((y, False), (np.full_like(y, 4), True)):
        change = _apply("adm", x, t, labels, params=params) - _apply("adm", x, t, labels)
        np.testing.assert_array_equal(abs(change).max(axis=(1, 2, 3)) > 1e-3, changes)


def _initialised(model):
    init = jax.jit(model.init_with_output)
    return init(KEY, np.ones((1, 4, 4, 3), np.float32), np.zeros(1, np.int32))


def test_initialisation():
    output, params = _initialised(UNet(**{**TINY, "channel_mult": (1,)}))
    np.testing.assert_array_equal(output, np.zeros((1, 4, 4, 3)))
    kinds = set()
    for path, p in jax.tree.leaves_with_path(jax.tree.map(np.asarray, params["params"])):
        layer, kind = path[-2].key, path[-1].key
        assert p.dtype == np.float32
        if kind == "bias" or layer in ("conv_2", "output"):
            assert (p == 0).all()
        elif kind == "scale":
            assert (p == 1).all()
        else:
            # PyTorch's limit of convolutions and linear layers.
            limit = 1 / np.sqrt(np.prod(p.shape[:-1]))
            assert abs(p).max() <= limit * (1 + 1e-6)
            assert p.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)
        kinds.add((layer, kind))
    assert {("conv_2", "kernel"), ("qkv", "kernel"), ("skip", "kernel")} <= kinds


def test_remat_computes_blocks_or_the_products_of_attention_again():
    models = [UNet(**{**TINY, "channel_mult": (1,)}, remat=remat) for remat in REMAT]
    params = _shapes(models[0], 4)[1]
    x = np.zeros((2, 4, 4, 3), np.float32)

    def loss(params, model):
        return (model.apply(params, x, np.array([3, 700])) ** 2).mean()

    losses = [functools.partial(loss, model=model) for model in models]
    # Two modules on the way down, three in the middle, four on the way up.
    for function, modules in zip(losses, (0, 2 + 3 + 4, 2 + 3 + 4), strict=True):
        equations = jax.make_jaxpr(function)(params).eqns
        assert sum("remat" in e.primitive.name for e in equations) == modules
    programs = [str(jax.make_jaxpr(jax.grad(function))(params)) for function in losses]
    dense, convolutions = (
        np.array([program.count(f"{name}[") for program in programs])
        for name in ("dot_general", "conv_general_dilated")
    )
    # "dots" computes only the two products of the four attentions again.
    assert dense[1] > dense[2] == dense[0] + 2 * 4
    assert convolutions[1] > convolutions[2] == convolutions[0]


@pytest.mark.parametrize("name", MODELS)
def test_types_of_activations_and_parameters(name):
    model = MODELS[name].clone(dtype=jnp.bfloat16)
    inputs = _record(name)[1]
    apply = functools.partial(model.apply, capture_intermediates=True)
    output, state = jax.eval_shape(apply, {"params": _params(name)}, *inputs)
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/__call__")[0]: value.dtype
        for path, value in jax.tree.leaves_with_path(state["intermediates"])
    }
    assert output.dtype == dtypes["output"] == dtypes["output_norm"] == jnp.float32
    assert dtypes["timestep_hidden"] == dtypes["timestep_embedding"] == jnp.float32
    inside = {key for key in dtypes if key.startswith(("input_", "middle_", "output_"))}
    inside -= {"output_norm"}
    assert {"input_0_0", "middle_1/qkv", "output_3_0/norm_2", "input_2_0"} <= inside
    assert {dtypes[key] for key in inside} == {jnp.dtype(jnp.bfloat16)}


def test_labels_are_given_to_models_with_classes_alone():
    _, (x, t, y), _ = _record("adm")
    with pytest.raises(ValueError, match="y must be given"):
        MODELS["adm"].apply({"params": {}}, x, t)
    with pytest.raises(ValueError, match="y must be None"):
        MODELS["ldm"].apply({"params": {}}, x, t, y)
    assert "label_embedding" not in _shapes(MODELS["ldm"])[1]["params"]


@pytest.mark.parametrize("shape", [(1, 7, 8, 3), (1, 8, 7, 3), (1, 8, 8, 4)])
def test_bad_input_shape(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, H, W, 3\).* multiples of 2"):
        MODELS["ldm"].apply({"params": {}}, np.zeros(shape), np.zeros(1))


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(width=0), "width must be an integer >= 4 and <= 65536, not 0"),
        (dict(width=33), "width must be even, not 33"),
        (dict(width=40), r"width \* channel_mult must be a multiple of 32.*not 40 \* 1"),
        (dict(channel_mult=(1, 0.75)), r"not 32 \* 0.75"),
        (dict(channel_mult=(1, 0)), r"channel_mult must be numbers > 0 .*, not \(1, 0\)"),
        (dict(channel_mult=()), r"channel_mult must be numbers > 0 and <= 64 .*, not \(\)"),
        (dict(num_res_blocks=0), "num_res_blocks must be an integer >= 1 and <= 64, not 0"),
        (dict(attention_factors=(0,)), r"attention_factors must be integers >= 1 .*, not \(0,\)"),
        (dict(attention_factors=(4,)), r"attention_factors must be among \[1, 2\], not 4"),
        (dict(head_channels=24), "head_channels must divide the 32 channels at .* factor 1"),
        (dict(head_channels=24, attention_factors=()), "32 channels at .* factor 2"),
        (dict(head_channels=0), "one of head_channels and num_heads must be .* not 0 and 0"),
        (dict(num_heads=4), "one of head_channels and num_heads must be .* not 16 and 4"),
        (dict(head_channels=0, num_heads=5), "num_heads must divide the 32 channels"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ValueError, match=match):
        UNet(**{**TINY, **fields})
