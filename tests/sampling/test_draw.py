import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image

from ant_jax import diffusion, experiment, sampling
from ant_jax.diffusion import samplers

SHAPE = (4, 4, 1)


class Model(nn.Module):
    """Small, and everything it is given matters."""

    num_classes: int

    @nn.compact
    def __call__(self, x, t, y):
        inputs = [x.reshape(len(x), -1), jnp.sin(t[:, None] / 9)]
        if self.num_classes:
            inputs.append(jax.nn.one_hot(y, self.num_classes + 1))
        return nn.Dense(16)(jnp.concatenate(inputs, 1)).reshape(x.shape)


# Cached, because compiled samplers are cached by the identity of the model.
_model = functools.cache(Model)


def draw(num, num_classes=3, sampler=samplers.ddim, batch_size=600, **settings):
    model = _model(num_classes)
    params = experiment.init_params(model, SHAPE, seed=0)
    options = samplers.SampleOptions(num_steps=3, guidance=2.0 if num_classes else 1.0)
    return list(
        sampling.sample_batches(
            sampler(),
            diffusion.gaussian(timesteps=20),
            Partial(model.apply, {"params": params}),
            SHAPE,
            num_classes,
            options,
            seed=0,
            batch_size=batch_size,
            num=num,
            **settings,
        )
    )


def join(batches):
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.ddpm])
def test_samples_do_not_depend_on_the_batch_size_or_the_devices(sampler, monkeypatch):
    whole, labels = join(draw(21, batch_size=100, sampler=sampler))
    assert whole.shape == (21, *SHAPE) and whole.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(21) % 3)
    assert len(np.unique(whole.reshape(21, -1), axis=0)) == 21
    # On one device, in batches, and with what remains for the last.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    batches = draw(21, batch_size=8, sampler=sampler)
    assert [len(images) for images, _ in batches] == [8, 8, 5]
    images, labels = join(batches)
    np.testing.assert_array_equal(labels, np.arange(21) % 3)
    # Rounding to uint8 may turn a difference in the last bit into one level.
    np.testing.assert_allclose(images.astype(int), whole, atol=1)


def test_a_batch_size_that_devices_do_not_divide_is_rounded_up():
    assert [len(images) for images, _ in draw(20, batch_size=9)] == [16, 4]


def test_an_unconditional_model_has_no_labels():
    ((images, labels),) = draw(5, num_classes=0)
    assert images.shape == (5, *SHAPE)
    assert labels is None


def test_latents_are_decoded_as_they_were_drawn():
    def decode(latents):
        assert latents.dtype == np.float32
        return np.uint8(latents > 0)

    whole = np.concatenate([images for images, _ in draw(12, batch_size=8)])
    batches = draw(6, batch_size=8, start=5, stop=11, decode=decode)
    assert [len(images) for images, _ in batches] == [6]
    np.testing.assert_array_equal(batches[0][0], whole[5:11] >= 128)


def test_classes_that_are_chosen_take_turns():
    whole, classes = join(draw(9, batch_size=100))
    chosen, labels = join(draw(9, batch_size=100, labels=(2, 0)))
    np.testing.assert_array_equal(labels, [2, 0, 2, 0, 2, 0, 2, 0, 2])
    # Only the class of a sample has changed.
    same = labels == classes
    assert 0 < same.sum() < 9
    np.testing.assert_array_equal((whole == chosen).all((1, 2, 3)), same)


def test_samples_that_are_not_finite_are_counted():
    bad = jnp.arange(16)[:, None, None, None] % 5 == 2
    draw = lambda decode: list(
        sampling.sample_batches(
            lambda *_: jnp.where(bad, jnp.nan, jnp.zeros((16, *SHAPE))),
            None,
            None,
            SHAPE,
            0,
            None,
            seed=0,
            batch_size=16,
            num=16,
            decode=decode,
        )
    )
    for decode, what in ((None, "samples"), (np.sign, "latents of samples")):
        with pytest.raises(FloatingPointError, match=f"^3 of 16 {what} .*, such as number 2$"):
            draw(decode)


def test_the_grid_has_image_i_in_row_i_div_10_and_column_i_mod_10():
    images = np.arange(1, 14, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 1), "u1")
    grid = sampling.image_grid(images)
    assert grid.dtype == np.uint8 and grid.shape == (2 * 34 + 2, 10 * 34 + 2, 3)
    for i in range(20):
        top, left = 2 + i // 10 * 34, 2 + i % 10 * 34
        # The place after the last image and the gaps around each are white.
        expected = i + 1 if i < 13 else 255
        assert (grid[top : top + 32, left : left + 32] == expected).all()
        assert (grid[top - 2 : top, left : left + 32] == 255).all()
        assert (grid[top : top + 32, left - 2 : left] == 255).all()


def test_the_grid_enlarges_small_images_and_keeps_colours():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    grid = sampling.image_grid(image[None])
    np.testing.assert_array_equal(grid[2:34, 2:34], image.repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_the_grid_shows_other_channels_side_by_side_in_grey(channels):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, channels)).astype(np.uint8)
    grid = sampling.image_grid(images)
    assert grid.shape == (2 * 34 + 2, 10 * (32 * channels + 2) + 2, 3)
    for c in range(channels):
        # The second image of the second row.
        left = 2 + 32 * channels + 2 + 32 * c
        panel = grid[36:68, left : left + 32]
        assert (panel == images[11, :, :, c, None]).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_a_grid_is_a_picture(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, channels)).astype(np.uint8)
    grid = sampling.image_grid(images)
    sampling.save_png(tmp_path / "new" / "grid.png", grid)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), grid)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
