"""Crops and flips of one uint8 image of shape (height, width, channels).

The crops are those of ADM (Dhariwal & Nichol, *Diffusion Models Beat GANs on Image Synthesis*,
2021), so that results compare with models trained on its images.
"""

import math

import numpy as np
from PIL import Image


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` and cuts out the centre.

    Args:
      image: uint8 (height, width, channels) with 1, 3 or 4 channels.
      size: Side of the result in pixels.

    Returns:
      uint8 (size, size, channels); the image itself, byte for byte, if it has that size already.
    """
    resized = _resize_shorter_side(image, size)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Resizes the shorter side to between `size` and `size / 0.8` and cuts out a random window.

    Args:
      image: uint8 (height, width, channels) with 1, 3 or 4 channels.
      size: Side of the result in pixels.
      rng: Source of the resized side and of the window's place, each uniform.

    Returns:
      uint8 (size, size, channels).
    """
    resized = _resize_shorter_side(image, int(rng.integers(size, math.ceil(size / 0.8) + 1)))
    top = rng.integers(resized.shape[0] - size + 1)
    left = rng.integers(resized.shape[1] - size + 1)
    return resized[top : top + size, left : left + size]


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors the image left to right with probability 1/2; the shape stays."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def draw_latent(
    example: dict[str, np.ndarray], flip: bool, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draws a latent from the distribution that stands for an image.

    Args:
      example: "mean" and "std" float32 (2, h, w, c), of the image and its mirror image; "label".
      flip: Whether to take the mirror image with probability 1/2.
      rng: Source of both draws.

    Returns:
      "image": the latent, float32 (h, w, c), and "label".
    """
    view = int(flip and rng.random() < 0.5)
    mean, std = example["mean"][view], example["std"][view]
    noise = rng.standard_normal(mean.shape, np.float32)
    return {"image": mean + std * noise, "label": example["label"]}


def _resize_shorter_side(image: np.ndarray, side: int) -> np.ndarray:
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    # Pillow's bicubic filter alone is slow on large photographs; ADM halves them first.
    while min(picture.size) >= 2 * side:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return resized[..., None] if grey else resized
