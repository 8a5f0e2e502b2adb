import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.models.inception import InceptionV3, resize

RECORDED = Path(__file__).parents[1] / "data" / "inception"
_spec = importlib.util.spec_from_file_location("record_inception", RECORDED / "record.py")
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)

KINDS = {
    "bn.weight": "scale",
    "bn.bias": "bias",
    "bn.running_mean": "mean",
    "bn.running_var": "var",
    "conv.weight": "kernel",
    "fc.weight": "kernel",
    "fc.bias": "bias",
}


def parameters(names, shapes):
    """The recorded network's, by this one's names."""
    params = {}
    for name, shape in zip(names, shapes, strict=True):
        value = record.weight(str(name), tuple(map(int, str(shape).split())))
        *path, _ = str(name).split(".")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[KINDS[".".join(str(name).split(".")[-2:])]] = value.transpose(
            {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        )
    return params


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED / "inception.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def params(recorded):
    return parameters(recorded["names"], recorded["shapes"])


def test_parameters_have_pytorch_fids_names_and_are_all(params):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    template = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)
    assert set(template) == {"params"}
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(lambda leaf: leaf.shape, template["params"]) == shapes
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(template))


def test_features_are_those_of_the_public_implementations(recorded, params):
    features = jax.jit(InceptionV3().apply)({"params": params}, recorded["images"])
    for name, value in features._asdict().items():
        expected = recorded[name]
        assert value.shape == expected.shape and value.dtype == jnp.float32
        assert np.abs(value - expected).max() < 1e-5 * expected.max(), name


def test_images_are_resized_as_tensorflow_1_does(recorded):
    places = recorded["places"]
    for size, expected in zip(recorded["sizes"], recorded["resized"], strict=True):
        got = resize(record.grey(*size)[None, ..., None])
        assert got.shape == (1, 299, 299, 1) and got.dtype == jnp.float32
        np.testing.assert_allclose(got[0, :, :, 0][places][:, places], expected, atol=1e-4)


def test_resizing_is_the_formula():
    image = np.random.default_rng(0).integers(0, 256, (5, 400, 2))
    expected = np.empty((299, 299, 2))
    for i in range(299):
        for j in range(299):
            y, x = i * 5 / 299, j * 400 / 299
            top, left = int(y), int(x)
            rows = image[[top, min(top + 1, 4)]][:, [left, min(left + 1, 399)]]
            dy, dx = y - top, x - left
            weights = np.outer([1 - dy, dy], [1 - dx, dx])
            expected[i, j] = np.einsum("yx,yxc->c", weights, rows)
    np.testing.assert_allclose(resize(image[None])[0], expected, atol=0.01)
    # 299 pixels stay what they are.
    same = np.uint8(np.random.default_rng(1).integers(0, 256, (1, 299, 299, 3)))
    np.testing.assert_array_equal(resize(same), same)
