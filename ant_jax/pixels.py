"""Pixels, bytes in 0 .. 255, and what networks see of them, float32 in [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np


def normalize(images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Images as float32 in [-1, 1]; floating-point numbers, which are latents, as they are.

    Args:
      images: uint8 or float32, of any shape; of NumPy or JAX, and so is the result.
    """
    if images.dtype != np.uint8:
        return images
    return images.astype(np.float32) / 127.5 - 1


@jax.jit
def quantize(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images in [-1, 1], (B, H, W, C), as uint8, clipped and rounded; which are finite, (B,)."""
    pixels = jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)
    return pixels, jnp.isfinite(images).all((1, 2, 3))


def check_finite(finite: np.ndarray, what: str, first: int = 0) -> None:
    """Raises a FloatingPointError that says how many things, and which, have numbers that are not.

    Args:
      finite: bool (B,), whether all numbers of each are.
      what: the plural.
      first: number of the first of them.
    """
    if not finite.all():
        wrong = np.flatnonzero(~finite)
        raise FloatingPointError(
            f"{len(wrong)} of {len(finite)} {what} have numbers that are not finite, such as "
            f"number {first + wrong[0]}"
        )
