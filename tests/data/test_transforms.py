import numpy as np
import pytest
from PIL import Image

from ant_jax.data import transforms


def _noise(height, width, channels=3):
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def test_center_crop_of_the_right_size_is_the_identity():
    for channels in (1, 3, 4):
        image = _noise(16, 16, channels)
        np.testing.assert_array_equal(transforms.center_crop(image, 16), image)


def test_center_crop_without_resizing_is_a_window():
    image = _noise(16, 23)
    np.testing.assert_array_equal(transforms.center_crop(image, 16), image[:, 3:19])
    np.testing.assert_array_equal(
        transforms.center_crop(image.swapaxes(0, 1).copy(), 16), image.swapaxes(0, 1)[3:19]
    )


def test_center_crop_halves_by_averaging():
    image = _noise(32, 32, 1)
    mean = image.reshape(16, 2, 16, 2, 1).mean(axis=(1, 3))
    # Pillow averages along one axis after the other and rounds each time.
    assert np.abs(transforms.center_crop(image, 16) - mean).max() <= 1
    image = _noise(64, 64, 1)
    mean = image.reshape(16, 4, 16, 4, 1).mean(axis=(1, 3))
    assert np.abs(transforms.center_crop(image, 16) - mean).max() <= 2


def test_center_crop_resizes_the_rest_bicubically():
    # 50 x 70 is halved once to 25 x 35, resized by 16/25 to 16 x 22, and cut at column 3.
    image = _noise(50, 70)
    half = image.reshape(25, 2, 35, 2, 3).mean(axis=(1, 3))
    columns = [
        np.asarray(Image.fromarray(half[..., c].astype(np.float32)).resize((22, 16), Image.BICUBIC))
        for c in range(3)
    ]
    expected = np.clip(np.stack(columns, axis=-1), 0, 255)[:, 3:19]
    got = transforms.center_crop(image, 16)
    assert got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize("shape", [(5, 9, 3), (9, 5, 1), (33, 64, 4)])
def test_crops_give_the_size_asked_for(shape):
    rng = np.random.default_rng(0)
    for size in (1, 7, 16):
        expected = (size, size, shape[2])
        assert transforms.center_crop(_noise(*shape), size).shape == expected
        assert transforms.random_crop(_noise(*shape), size, rng).shape == expected


def test_random_crop_is_a_window_at_a_random_scale_and_place():
    size = 16
    ramp = np.zeros((40, 40, 3), np.uint8)
    ramp[..., 0] = np.arange(40)[:, None] * 6
    ramp[..., 1] = np.arange(40) * 6
    crops = [transforms.random_crop(ramp, size, np.random.default_rng(i)) for i in range(200)]
    # The shorter side becomes 16..20 pixels, so a crop shows between 16/20 and 16/16 of the ramp.
    spans = np.array([int(crop[-3, 0, 0]) - int(crop[2, 0, 0]) for crop in crops])
    shown = spans / 11 * size / 240
    assert shown.min() == pytest.approx(0.8, abs=0.05)
    assert shown.max() == pytest.approx(1.0, abs=0.05)
    tops = np.array([int(crop[0, 0, 0]) for crop in crops])
    lefts = np.array([int(crop[0, 0, 1]) for crop in crops])
    assert tops.max() > 35 and lefts.max() > 35
    assert np.mean(tops == lefts) < 0.9
    again = transforms.random_crop(ramp, size, np.random.default_rng(7))
    np.testing.assert_array_equal(again, crops[7])


def _whole(image, side):
    """All of the image with its shorter side resized, as ADM does."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * side:
        picture = picture.resize([length // 2 for length in picture.size], Image.BOX)
    scale = side / min(picture.size)
    return np.asarray(picture.resize([round(each * scale) for each in picture.size], Image.BICUBIC))


@pytest.mark.parametrize(
    ("shape", "exact"),
    [
        # However long, up to 64 times the shorter side, and where the whole is no pixel more.
        *(((5, 320), True), ((320, 5), True), ((40, 2000), True), ((70, 31), True)),
        *(((2, 200), True), ((200, 2), True), ((1, 300), True), ((9, 900), True)),
        *(((3, 293), False), ((400, 6), False)),
    ],
)
def test_windows_of_long_images_are_those_of_the_whole(shape, exact):
    image = _noise(*shape)
    for size in (16, 5):
        whole = _whole(image, size)
        top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
        got = transforms.center_crop(image, size)
        expected = whole[top : top + size, left : left + size]
        assert got.shape == (size, size, 3)
        # Another place would differ by 85 on average.
        assert np.abs(got.astype(int) - expected).mean() <= (0 if exact else 30)
        rng = np.random.default_rng(size)
        side = rng.integers(size, -(-size // 0.8) + 1)
        whole = _whole(image, side)
        top, left = (rng.integers(length - size + 1) for length in whole.shape[:2])
        got = transforms.random_crop(image, size, np.random.default_rng(size))
        expected = whole[top : top + size, left : left + size]
        # Another place would differ by 85 on average.
        assert np.abs(got.astype(int) - expected).mean() <= (0 if exact else 30)


def test_flip_mirrors_half_of_the_images():
    image = _noise(4, 6)
    flipped = [transforms.flip(image, np.random.default_rng(i)) for i in range(400)]
    mirrored = [np.array_equal(x, image[:, ::-1]) for x in flipped]
    same = [np.array_equal(x, image) for x in flipped]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 0.4 < np.mean(mirrored) < 0.6
