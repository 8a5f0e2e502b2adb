import numpy as np
import pytest

from ant_jax.evaluation import nearest_distances
from ant_jax.evaluation.metrics import nearest


def _images(n, shape=(4, 4, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)


def _brute_force(images, references):
    difference = images[:, None] / 255 - references[None] / 255
    return np.sqrt((difference**2).sum(axis=(2, 3, 4))).min(axis=1)


# None, one and several whole blocks, with and without a rest.
@pytest.mark.parametrize("n", [1, 4, 5, 8, 11])
@pytest.mark.parametrize("m", [1, 4, 5, 8, 11])
def test_brute_force(n, m, monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK", 4)
    images, references = _images(n), _images(m, seed=1)
    distances = nearest_distances(images, references)
    assert distances.shape == (n,)
    np.testing.assert_allclose(distances, _brute_force(images, references), rtol=1e-12)


@pytest.mark.parametrize("place", [0, 3, 4, 7, 8, 9])
def test_the_nearest_is_found_in_any_block(place, monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK", 4)
    references = np.full((10, 2, 2, 1), 255, np.uint8)
    references[place] = 3
    expected = np.full(6, np.sqrt(4 * 3**2) / 255)
    distances = nearest_distances(np.zeros((6, 2, 2, 1), np.uint8), references)
    np.testing.assert_allclose(distances, expected, rtol=1e-12)


def test_black_is_a_root_of_the_number_of_pixels_from_white():
    black = np.zeros((1, 8, 8, 1), np.uint8)
    assert nearest_distances(black, black + 255) == pytest.approx(8, rel=1e-12)
    assert nearest_distances(black + 255, black) == pytest.approx(8, rel=1e-12)


def test_large_images_are_exact():
    """In float32 the squares of 196608 pixels would round by thousands."""
    references = 255 - _images(3, (256, 256, 3)) // 8
    images = references[[2, 0, 1]].copy()
    assert np.all(nearest_distances(images, references) == 0)
    images[:, 17, 5, 1] -= 1
    np.testing.assert_allclose(nearest_distances(images, references), 1 / 255, rtol=1e-12)


def test_memory_is_bounded_by_the_blocks(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        nearest, "_rows", lambda x, rows=nearest._rows: sizes.append(len(x)) or rows(x)
    )
    nearest_distances(_images(3000, (1, 1, 1)), _images(2500, (1, 1, 1)))
    assert max(sizes) <= 1024 < sum(sizes)


@pytest.mark.parametrize(
    ("images", "references", "message"),
    [
        (_images(2), _images(2, (4, 3, 3)), r"\(4, 4, 3\).*\(4, 3, 3\)"),
        # As many pixels, in another order.
        (_images(2, (4, 2, 1)), _images(2, (2, 4, 1)), r"\(4, 2, 1\).*\(2, 4, 1\)"),
        (_images(0), _images(2), "images must be non-empty"),
        (_images(2), _images(0), "references must be non-empty"),
        (_images(2) / 255, _images(2), "images must be .*float64"),
        (_images(2), _images(2).astype(np.int32), "references must be .*int32"),
        (_images(2)[0], _images(2), "images must be"),
    ],
)
def test_errors(images, references, message):
    with pytest.raises(ValueError, match=message):
        nearest_distances(images, references)
