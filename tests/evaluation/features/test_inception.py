import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import evaluate, sampling
from ant_jax.config import update
from ant_jax.evaluation.features import inception
from ant_jax.evaluation.features.inception_network import Features
from configs import digits


def test_features_are_those_of_the_public_implementations(recorded, inception_weights):
    network = inception.inception(str(inception_weights)).load()
    (outputs,) = network.outputs([recorded["images"]])
    for name, value in outputs.items():
        expected = recorded["pool" if name == "features" else name]
        assert value.shape == expected.shape and value.dtype == np.float32
        assert np.abs(value - expected).max() < 1e-5 * expected.max(), name


def test_samples_are_judged_by_inception(recorded, inception_weights, tmp_path):
    """The whole of it with the real network: what `--mode evaluate` does with a file of samples."""
    images = np.random.default_rng(0).integers(0, 256, (2, *recorded["images"].shape[1:]))
    sampling.write_samples(tmp_path / "real.npz", [(np.uint8(images), None)], 2)
    sampling.write_samples(tmp_path / "some.npz", [(np.uint8(images[::-1] // 2), None)], 2)
    config = digits.get_config()
    # As many at once as above, so that the network is compiled once.
    config.sample.batch_size = 1
    update(config, {"evaluation.features": "inception"})
    config.evaluation.weights = str(inception_weights)
    config.evaluation.reference = str(tmp_path / "real.npz")

    config.evaluation.samples = str(tmp_path / "some.npz")
    result = evaluate.evaluate(config, tmp_path / "run")
    kept = json.loads((tmp_path / "run/evaluation/samples-some.json").read_text())
    assert kept.pop("made_from")["inception"] and kept == result
    assert result["num_samples"] == 2 and result["reference"] == config.evaluation.reference
    assert result["fid"] > 1 and result["sfid"] > 1 and 1 < result["inception_score"] < 2
    assert "step" not in result
    assert (tmp_path / "run/evaluation/samples-some.png").exists()


@pytest.fixture
def stub(monkeypatch):
    """Eight devices, and sums of pixels for a network; gives the shapes it is traced at."""
    traced = []

    def apply(params, images):
        traced.append(images.shape)
        pool = params * images.sum((1, 2)).astype(jnp.float32)
        return Features(pool, pool + 1, pool + 2)

    monkeypatch.setattr(inception, "_apply", jax.jit(apply))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices())
    return traced


@pytest.mark.parametrize("sizes", [[20, 20, 3], [3, 20], [5]])
def test_batches_of_any_size_are_one_program(sizes, stub, monkeypatch):
    monkeypatch.setattr(inception, "_PER_DEVICE", 2)
    images = np.uint8(np.random.default_rng(0).integers(0, 256, (sum(sizes), 4, 6, 3)))
    batches = np.split(images, np.cumsum(sizes)[:-1])
    parts = list(inception.outputs(np.float32(2), iter(batches)))
    assert stub == [(16 if sizes[0] == 20 else 8, 4, 6, 3)]
    expected = 2 * images.sum((1, 2))
    for i, name in enumerate(("features", "spatial", "logits")):
        got = np.concatenate([part[name] for part in parts])
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected + i)


def test_the_next_batch_is_asked_for_before_the_last_is_fetched(stub):
    asked = []

    def batches():
        for i in range(3):
            asked.append(i)
            yield np.full((8, 2, 2, 3), i, np.uint8)

    parts = inception.outputs(np.float32(1), batches())
    assert next(parts)["features"][0, 0] == 0 and asked == [0, 1]
    assert [part["features"][0, 0] for part in parts] == [4, 8]


def test_grey_images_are_colourless_ones(stub):
    grey = np.uint8(np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1)))
    (got,) = inception.outputs(np.float32(1), [grey])
    (expected,) = inception.outputs(np.float32(1), [grey.repeat(3, -1)])
    np.testing.assert_array_equal(got["features"], expected["features"])
    for bad in (np.zeros((2, 2, 2, 4), np.uint8), np.zeros((2, 2, 2, 3)), np.zeros((2, 2), "u1")):
        with pytest.raises(ValueError, match="Inception needs uint8 images"):
            list(inception.outputs(np.float32(1), [bad]))


def test_nothing_has_no_features(stub):
    assert list(inception.outputs(np.float32(1), [])) == []


def test_other_channels_are_refused_before_samples_are_drawn(tmp_path):
    (tmp_path / "weights.pth").touch()
    check = inception.inception(str(tmp_path / "weights.pth")).check
    for channels in (1, 3, None):
        check(32, 32, channels)
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"of 1 or 3 channels, not of {channels}$"):
            check(32, 32, channels)
