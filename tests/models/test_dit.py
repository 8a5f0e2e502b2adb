"""DiT against its published sizes and a plain NumPy forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.models import dit_weights
from ant_jax.models.dit import SIZES, DiT, rotary_angles
from ant_jax.models.remat import REMAT
from ant_jax.models.routing import routing_mask, window_starts
from ant_jax.published_weights import OWN_NAMES, from_torch, to_torch

TINY = dict(width=16, depth=2, heads=2, patch=2, channels=3, num_classes=5, learned_variance=True)
LABELS = np.array([0, 4, 5])


# One compiled function for all tests that need no other model.
_apply = jax.jit(DiT(**TINY).apply)


def _inputs():
    x = np.random.default_rng(0).normal(size=(3, 4, 6, 3)).astype(np.float32)
    return x, np.array([0, 57, 999]), LABELS


def _random_params(model):
    """Parameters without the zeros of the initialisation, where most of the network is inert."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *_inputs())
    return jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), shapes)


@functools.cache
def _params():
    return _random_params(DiT(**TINY))


@functools.cache
def _output():
    return np.asarray(_apply(_params(), *_inputs()))


def _num_params(model):
    x = jax.ShapeDtypeStruct((1, 32, 32, model.channels), jnp.float32)
    integers = jax.ShapeDtypeStruct((1,), jnp.int32)
    y = integers if model.num_classes else None
    params = jax.eval_shape(model.init, jax.random.key(0), x, integers, y)
    return sum(p.size for p in jax.tree.leaves(params))


def _closed_form(w, depth, patch_features, rows, output_features):
    embeddings = (patch_features + 1) * w + (256 + 1) * w + (w + 1) * w + rows * w
    block = 6 * w * (w + 1) + 3 * w * (w + 1) + w * (w + 1) + 4 * w * (w + 1) + (4 * w + 1) * w
    return embeddings + depth * block + 2 * w * (w + 1) + (w + 1) * output_features


@pytest.mark.parametrize(
    "size, exact, published_millions",
    [("S", 32_865_056, 33), ("B", 130_315_808, 130), ("L", 457_840_672, 458)],
)
def test_published_parameter_counts(size, exact, published_millions):
    model = DiT(**SIZES[size], patch=2, channels=4, num_classes=1000, learned_variance=True)
    assert _num_params(model) == exact
    assert _closed_form(model.width, model.depth, 16, 1001, 32) == exact
    assert round(exact / 1e6) == published_millions


def test_parameter_count_of_the_official_xl():
    model = DiT(**SIZES["XL"], patch=2, channels=4, num_classes=1000, learned_variance=True)
    # The official total counts the fixed position table, which is no parameter here.
    assert _num_params(model) + 16 * 16 * 1152 == 675_129_632


def test_parameter_count_of_an_unconditional_model():
    model = DiT(width=24, depth=1, heads=3, patch=8, channels=3)
    assert _num_params(model) == _closed_form(24, 1, 192, 0, 192)


def _numpy_dit(params, x, t, y, heads, patch, rms=False, swiglu=False, rotary=False, mask=None):
    """Peebles & Xie 2023, sections 3.1 and 3.2, one image at a time in float64; with options."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)["params"]

    def linear(layer, h):
        return h @ layer["kernel"] + layer["bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def gelu(h):
        return h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    def rms_norm(h):
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)

    def norm(h):
        if rms:
            return rms_norm(h)
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)

    def sin_cos(position, features):
        angles = [position / 10000 ** (2 * i / features) for i in range(features // 2)]
        return np.array([np.sin(a) for a in angles] + [np.cos(a) for a in angles])

    def turned(h):
        """Pairs of features as complex numbers, turned by the row and by the column."""
        quarter = h.shape[-1] // 4
        pairs = h[:, : 2 * quarter] + 1j * h[:, 2 * quarter :]
        frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
        angles = [np.append(i * frequencies, j * frequencies) for i, j in grid]
        pairs = pairs * np.exp(1j * np.array(angles))
        return np.concatenate([pairs.real, pairs.imag], -1)

    def attention(q, k, v):
        if rotary:
            q, k = turned(q), turned(k)
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        return weights / weights.sum(-1, keepdims=True) @ v

    width = params["patch_embedding"]["bias"].size
    grid = [(i, j) for i in range(x.shape[1] // patch) for j in range(x.shape[2] // patch)]
    output_channels = params["output"]["bias"].size // patch**2
    output = np.zeros((*x.shape[:3], output_channels))
    for image, timestep, label, result in zip(x, t, y, output, strict=True):
        slices = [np.s_[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] for i, j in grid]
        tokens = np.stack([image[s].reshape(-1) for s in slices])
        tokens = linear(params["patch_embedding"], tokens)
        if not rotary:
            tokens += [np.append(sin_cos(j, width // 2), sin_cos(i, width // 2)) for i, j in grid]

        features = np.roll(sin_cos(timestep, 256), 128)  # cosines first
        condition = silu(linear(params["timestep_hidden"], features))
        condition = linear(params["timestep_embedding"], condition)
        condition = silu(condition + params["label_embedding"]["embedding"][label])

        for name in sorted(n for n in params if n.startswith("block_")):
            block = params[name]
            unrouted = 0
            if mask is not None:
                used = mask(timestep)
                tokens, unrouted = tokens * used, tokens * (1 - used)
            m = np.split(linear(block["modulation"], condition), 6)
            h = linear(block["qkv"], norm(tokens) * (1 + m[1]) + m[0])
            q, k, v = (np.split(part, heads, axis=-1) for part in np.split(h, 3, axis=-1))
            if "query_norm" in block:
                q = [rms_norm(head) * block["query_norm"]["scale"] for head in q]
                k = [rms_norm(head) * block["key_norm"]["scale"] for head in k]
            h = np.concatenate([attention(*head) for head in zip(q, k, v, strict=True)], axis=-1)
            tokens = tokens + m[2] * linear(block["attention_output"], h)
            h = linear(block["mlp_hidden"], norm(tokens) * (1 + m[4]) + m[3])
            if swiglu:
                gate, h = np.split(h, 2, axis=-1)
                h = silu(gate) * h
            else:
                h = gelu(h)
            tokens = tokens + m[5] * linear(block["mlp_output"], h) + unrouted

        shift, scale = np.split(linear(params["modulation"], condition), 2)
        tokens = linear(params["output"], norm(tokens) * (1 + scale) + shift)
        for s, token in zip(slices, tokens, strict=True):
            result[s] = token.reshape(patch, patch, output_channels)
    return output


def test_forward_pass_equals_numpy():
    expected = _numpy_dit(_params(), *_inputs(), heads=2, patch=2)
    with jax.default_matmul_precision("highest"):
        output = _apply(_params(), *_inputs())
    assert output.shape == (3, 4, 6, 6)
    assert 0.5 < expected.std() < 50
    # The angle of timestep 999 is known to one part in 2^24 only, 6e-5 radians.
    for i, tolerance in enumerate((1e-5, 1e-5, 2e-4)):
        np.testing.assert_allclose(
            output[i], expected[i], rtol=tolerance, atol=tolerance * expected.std()
        )


def test_initialisation():
    model = DiT(width=128, depth=1, heads=2, patch=2, channels=3, num_classes=99)

    @jax.jit
    def initialise(key):
        params = model.init(key, *_inputs())
        return params["params"], model.apply(params, *_inputs())

    params, output = initialise(jax.random.key(0))
    np.testing.assert_array_equal(output, np.zeros((3, 4, 6, 3)))
    for path, p in jax.tree.leaves_with_path(jax.tree.map(np.asarray, params)):
        layer, kind = path[-2].key, path[-1].key
        assert p.dtype == np.float32
        if kind == "bias" or layer in ("modulation", "output"):
            assert (p == 0).all()
        elif layer in ("timestep_hidden", "timestep_embedding", "label_embedding"):
            assert p.std() == pytest.approx(0.02, rel=0.05)
        else:
            limit = np.sqrt(6 / sum(p.shape))
            assert p.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)
            assert abs(p).max() <= limit * (1 + 1e-6)


def test_remat_computes_blocks_or_the_products_of_attention_again():
    models = [DiT(**{**TINY, "depth": 1, "remat": remat}) for remat in REMAT]
    params = _random_params(models[0])

    def loss(params, model):
        return (model.apply(params, *_inputs()) ** 2).mean()

    losses = [functools.partial(loss, model=model) for model in models]
    products = [
        str(jax.make_jaxpr(jax.grad(function))(params)).count("dot_general[") for function in losses
    ]
    # Seven products of dense layers (query, key and value have one each) and the two of attention;
    # "dots" computes only these two again.
    assert np.subtract(products, products[0]).tolist() == [0, 9, 2]


def test_bfloat16_is_close_to_float32():
    model = DiT(**TINY, dtype=jnp.bfloat16)
    apply = jax.jit(functools.partial(model.apply, capture_intermediates=True))
    output, state = apply(_params(), *_inputs())
    assert output.dtype == jnp.float32
    dtypes = {
        name: s["__call__"][0].dtype
        for name, s in state["intermediates"].items()
        if name != "__call__"
    }
    assert dtypes["block_0"] == dtypes["modulation"] == jnp.bfloat16
    assert dtypes["timestep_embedding"] == dtypes["output"] == jnp.float32
    # bfloat16 has 8 bits, and the errors of some ten layers add up.
    error = np.sqrt(np.mean((output - _output()) ** 2)) / _output().std()
    assert 1e-4 < error < 0.05


def test_null_class_has_its_own_row():
    params = jax.tree.map(np.array, _params())
    params["params"]["label_embedding"]["embedding"][5] += 1
    output = _apply(params, *_inputs())
    changed = abs(output - _output()).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(changed, LABELS == 5)


def test_every_position_is_distinct():
    _, t, y = _inputs()
    output = _apply(_params(), np.ones((3, 4, 6, 3), np.float32), t, y)
    patches = np.asarray(output[0]).reshape(2, 2, 3, 2, 6).swapaxes(1, 2).reshape(6, -1)
    distances = np.linalg.norm(patches[:, None] - patches, axis=-1)
    assert (distances[~np.eye(6, dtype=bool)] > 1e-2).all()


@pytest.mark.parametrize("shape", [(1, 5, 6, 3), (1, 4, 7, 3), (1, 4, 6, 4)])
def test_bad_input_shape(shape):
    with pytest.raises(ValueError, match="x must have shape"):
        _apply(_params(), np.zeros(shape), np.zeros(1, int), np.zeros(1, int))


def test_labels_are_given_to_models_with_classes_alone():
    x, t, y = _inputs()
    with pytest.raises(ValueError, match="y must be given"):
        _apply(_params(), x, t)
    with pytest.raises(ValueError, match="y must be None"):
        DiT(**TINY | {"num_classes": 0}).init(jax.random.key(0), x, t, y)


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(heads=8, position="rotary"), "'rotary' needs heads of a multiple of 4 .* not 2"),
        (dict(heads=3), "width must be a multiple of heads"),
        (dict(width=18), "and of 4"),
        (dict(heads=0), "heads must be an integer >= 1, not 0"),
        (dict(patch=3), "patch must be one of 1, 2, 4, 8, not 3"),
        (dict(remat="all"), "remat must be one of 'none', 'blocks', 'dots', not 'all'"),
        (dict(attention="flash"), "attention must be one of 'xla', 'cudnn', not 'flash'"),
        (dict(attention="cudnn"), "needs dtype bfloat16, not float32"),
        (dict(attention="cudnn", heads=4, dtype=jnp.bfloat16), "multiple of 8 channels .* not 4"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ValueError, match=match):
        DiT(**{**TINY, **fields})


def _mask(timestep):
    """Park et al. 2024: 12 of 16 channels, from the first to the last as the fourth power of t."""
    start = round((timestep / 999) ** 4 * 4)
    return np.array([start <= channel < start + 12 for channel in range(16)], float)


@functools.cache
def _modern():
    """A network with all options, its parameters and its compiled function."""
    model = DiT(
        **TINY | dict(norm="rms", qk_norm=True, mlp="swiglu", position="rotary", routing=0.8)
    )
    return model, _random_params(model), jax.jit(model.apply)


def test_forward_pass_with_all_options_equals_numpy():
    _, params, apply = _modern()
    expected = _numpy_dit(params, *_inputs(), 2, 2, rms=True, swiglu=True, rotary=True, mask=_mask)
    with jax.default_matmul_precision("highest"):
        output = apply(params, *_inputs())
    for i, tolerance in enumerate((1e-5, 1e-5, 2e-4)):
        np.testing.assert_allclose(
            output[i], expected[i], rtol=tolerance, atol=tolerance * expected.std()
        )
    # Three matrices with 2/3 of the hidden features, instead of two.
    assert params["params"]["block_0"]["mlp_output"]["kernel"].shape == (64 * 2 // 3, 16)


def test_qk_norm_makes_attention_independent_of_the_scale_of_queries_and_keys():
    def change(apply, params):
        scaled = jax.tree.map(np.copy, params)
        for name in ("block_0", "block_1"):
            for leaf in scaled["params"][name]["qkv"].values():
                # The first two thirds of the channels are queries and keys.
                leaf[..., :32] *= 10
        return np.abs(apply(scaled, *_inputs()) - apply(params, *_inputs())).max()

    _, params, apply = _modern()
    assert change(apply, params) < 1e-2 * np.abs(apply(params, *_inputs())).max()
    assert change(_apply, _params()) > 0.1 * np.abs(_output()).max()


def test_noise_levels_use_windows_of_channels():
    starts = window_starts(1000, 1024, 0.8, 4.0)
    assert starts[0] == 0 and starts[-1] == 1024 - 819 and (np.diff(starts) >= 0).all()
    # In the middle 1/16 of the way.
    assert starts[500] == round(0.0627 * 205)
    mask = routing_mask(jnp.array([0, 500, 999]), 1000, 1024, 0.8, 4.0)
    assert mask.sum(1).tolist() == [819] * 3
    assert [int(row.argmax()) for row in mask] == starts[[0, 500, 999]].tolist()
    of_floats = routing_mask(jnp.array([0.0, 500 / 999, 1.0]), 1000, 1024, 0.8, 4.0)
    np.testing.assert_array_equal(of_floats, mask)


def test_rotary_positions_depend_on_differences_alone():
    """A query and a key that are the same at all positions, on a grid of 4 x 5."""
    angles = rotary_angles(4, 5, 8).reshape(4, 5, 4)
    assert rotary_angles(4, 5, 8).shape == (20, 4)
    np.testing.assert_allclose(angles[3, 4] - angles[1, 2], angles[2, 2] - angles[0, 0])
    np.testing.assert_allclose(angles[0, 0], 0)
    assert (angles[1, 0][:2] > 0).all() and (angles[1, 0][2:] == 0).all()
    assert (angles[0, 1][2:] > 0).all() and (angles[0, 1][:2] == 0).all()


def test_weights_of_the_paper_do_not_go_into_a_dit_with_other_options():
    """RMS norm and rotary positions have the parameters of the paper's network."""
    model = DiT(**TINY | dict(norm="rms", position="rotary"))
    state = to_torch(_params()["params"], dit_weights.names(DiT(**TINY)))
    with pytest.raises(ValueError, match=r"no DiT with config\.model\.norm = 'rms' and .*'rotary'"):
        dit_weights.recognise(state, _params()["params"], model, (8, 8, 3), {"heads": "2"})
    assert dit_weights.names(model) is OWN_NAMES


def test_weights_of_task_routing_need_the_same_routing():
    """byeongjun-park/DTR: a table (1000, width) in each block."""
    model = DiT(**TINY | dict(routing=0.75))
    params = _params()["params"]
    state = to_torch(params, dit_weights.names(DiT(**TINY)))
    recognise = lambda state, model: dit_weights.recognise(
        state, params, model, (4, 6, 3), {"heads": "2", "no_pos_embed": ""}
    )
    with pytest.raises(ValueError, match=r"no denoising task routing, and .*routing = 0\.75"):
        recognise(state, model)
    table = np.stack([_mask(timestep) for timestep in range(1000)]).astype(np.float32)
    state |= {f"blocks.{i}.routing._unit_mapping": table for i in range(2)}
    read = from_torch(state, params, recognise(state, model).names)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    for other in (DiT(**TINY), DiT(**TINY | dict(routing=0.75, routing_power=3.0))):
        with pytest.raises(ValueError, match=r"use 0\.75 of their channels .* routing"):
            recognise(state, other)
