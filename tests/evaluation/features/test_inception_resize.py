import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.evaluation.features.inception_network import resize

RECORDED = Path(__file__).parents[2] / "data" / "inception"
_spec = importlib.util.spec_from_file_location("record_inception", RECORDED / "record.py")
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)


def by_the_formula(image):
    """Pixel i of the result lies at i * length / 299 of the original."""
    for axis in (0, 1):
        place = np.arange(299) * image.shape[axis] / 299
        before = np.floor(place).astype(int)
        after = np.minimum(before + 1, image.shape[axis] - 1)
        share = (place - before)[:, None] if axis == 0 else place - before
        image = image.take(before, axis) * (1 - share) + image.take(after, axis) * share
    return image


@pytest.mark.parametrize("i", range(4))
def test_images_are_resized_as_tensorflow_1_does(i):
    with np.load(RECORDED / "inception.npz") as stored:
        size, places, expected = stored["sizes"][i], stored["places"], stored["resized"][i]
    image = record.grey(*size)
    got = resize(image[None, ..., None])
    assert got.shape == (1, 299, 299, 1) and got.dtype == jnp.float32
    got = np.asarray(got)[0, :, :, 0]
    np.testing.assert_allclose(got[places][:, places], expected, atol=1e-4)
    np.testing.assert_allclose(got, by_the_formula(image), atol=0.01)
    if tuple(size) == (299, 299):
        np.testing.assert_array_equal(got, image)
