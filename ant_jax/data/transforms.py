"""Crops and flips of one uint8 image of shape (height, width, channels).

The crops are those of ADM (Dhariwal & Nichol, *Diffusion Models Beat GANs on Image Synthesis*,
2021), so that results are comparable with those of models trained on its images.
"""

import math

import numpy as np
from PIL import Image

# Images with a larger aspect ratio are cut before they are resized; all others are as in ADM.
_LONGEST = 64
# How much is kept on each side of the window, in units of the shorter side. The filter reaches 2
# pixels.
_MARGIN = 2


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` and crops the centre.

    Args:
      image: uint8 (height, width, channels) with 1, 3 or 4 channels.
      size: Side of the result in pixels.

    Returns:
      uint8 (size, size, channels); the unchanged image if it has that size already.
    """
    picture = _halved(image, size)
    height, width = _resized_shape(picture, size)
    return _window(picture, size, (height - size) // 2, (width - size) // 2, size)


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Resizes the shorter side to between `size` and `size / 0.8` and crops a random window.

    Args:
      image: uint8 (height, width, channels) with 1, 3 or 4 channels.
      size: Side of the result in pixels.
      rng: Draws the resized side and the position of the window, each uniformly.

    Returns:
      uint8 (size, size, channels).
    """
    side = int(rng.integers(size, math.ceil(size / 0.8) + 1))
    picture = _halved(image, side)
    height, width = _resized_shape(picture, side)
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    return _window(picture, side, top, left, size)


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors the image left to right with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def draw_latent(
    example: dict[str, np.ndarray], flip: bool, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Samples the latent of an image from the encoder's normal distribution.

    Args:
      example: "mean" and "std", float32 (2, h, w, c), for the image and its mirror image; "label".
      flip: Whether to use the mirror image with probability 1/2.
      rng: Draws the flip and the noise.

    Returns:
      "image": the latent, float32 (h, w, c), and "label".
    """
    view = int(flip and rng.random() < 0.5)
    mean, std = example["mean"][view], example["std"][view]
    noise = rng.standard_normal(mean.shape, np.float32)
    return {"image": mean + std * noise, "label": example["label"]}


def _halved(image, side):
    """The image as a Pillow image, halved while its shorter side is at least `2 * side`."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    # As ADM does, because Pillow's bicubic filter is slow on large photographs.
    while min(picture.size) >= 2 * side:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    return picture


def _resized_shape(picture, side):
    """(height, width) of the picture after its shorter side is resized to `side` pixels."""
    scale = side / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    return height, width


def _window(picture, side, top, left, size):
    """Resizes the shorter side to `side` and crops `size` x `size` pixels at (top, left)."""
    width, height = picture.size
    short = min(width, height)
    if max(width, height) > _LONGEST * short:
        # Without this cut, 2 x 20000 pixels would be resized to 256 x 2560000. Pixels far from the
        # window don't affect it, except that the full length is rounded to whole pixels.
        first = max(0, (left if width > height else top) // side - _MARGIN)
        begin, end = first * short, (first + 2 + 2 * _MARGIN) * short
        if width > height:
            picture = picture.crop((begin, 0, min(end, width), height))
            left -= first * side
        else:
            picture = picture.crop((0, begin, width, min(end, height)))
            top -= first * side
    height, width = _resized_shape(picture, side)
    # The length after the cut may round to one pixel less.
    top, left = min(top, height - size), min(left, width - size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    window = resized[top : top + size, left : left + size]
    return window[..., None] if window.ndim == 2 else window
