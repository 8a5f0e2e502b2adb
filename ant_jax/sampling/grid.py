"""A picture of samples."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ant_jax.runtime.files import write_bytes

GRID = 100  # samples in a grid


def image_grid(images: np.ndarray) -> np.ndarray:
    """Lays images out in rows of ten with white lines between them, and enlarges small images.

    Images that are neither grey nor RGB are shown as their channels, side by side and grey.

    Args:
      images: uint8 (n, H, W, C).

    Returns:
      uint8 (height, width, 3).
    """
    columns, gap = 10, 2
    scale = max(1, 32 // images.shape[1])
    images = images.repeat(scale, 1).repeat(scale, 2)
    if images.shape[-1] not in (1, 3):
        # What the channels mean is not known: a fourth need not be an opacity.
        images = images.transpose(0, 1, 3, 2).reshape(*images.shape[:2], -1, 1)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes an image. The file appears only when it is complete."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="png")
    write_bytes(path, stream.getvalue())
