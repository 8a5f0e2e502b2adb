"""Converts between pixels, uint8 in 0 .. 255, and the inputs of networks, float32 in [-1, 1]."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_Images = TypeVar("_Images", np.ndarray, jax.Array)


def normalize(images: _Images) -> _Images:
    """Maps uint8 images to float32 in [-1, 1]; returns floating-point arrays (latents) unchanged.

    Args:
      images: uint8 or float32, of any shape, an array of NumPy or JAX; the result is of the same
        library.
    """
    if images.dtype != np.uint8:
        return images
    return images.astype(np.float32) / 127.5 - 1


@jax.jit
def quantize(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps images in [-1, 1] to uint8, rounded and clipped.

    Args:
      images: (B, H, W, C).

    Returns:
      Uint8 (B, H, W, C), and bool (B,): whether all numbers of each image are finite.
    """
    pixels = jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)
    return pixels, jnp.isfinite(images).all((1, 2, 3))


def check_finite(finite: np.ndarray, what: str, first: int = 0) -> None:
    """Raises a FloatingPointError if images, or other examples, have numbers that are not finite.

    Args:
      finite: bool (B,), whether all numbers of each example are finite.
      what: what the examples are, in the plural, for the message.
      first: number of the first example, for the message.
    """
    if not finite.all():
        wrong = np.flatnonzero(~finite)
        raise FloatingPointError(
            f"{len(wrong)} of {len(finite)} {what} have numbers that are not finite, such as "
            f"number {first + wrong[0]}"
        )
