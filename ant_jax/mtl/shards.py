"""Stacked gradients whose entries are split over n devices: each has the sum of its own 1/n.

Every function takes the name of a mapped axis, or None for one device, which has all entries.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def part_size(size: int, axis_name: str | None) -> int:
    """Number of entries on each device, of a parameter with ``size`` entries."""
    return size if axis_name is None else -(-size // jax.lax.axis_size(axis_name))


def part_start(part_size: int, axis_name: str | None) -> jax.Array:
    """Index of this device's first entry, uint32."""
    index = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    return jnp.uint32(index) * jnp.uint32(part_size)


def scattered_sum(leaf: jax.Array, axis_name: str | None) -> jax.Array:
    """(k, *shape) on each device to its part, (k, p), of the sum over devices; zeros at the end."""
    flat = leaf.reshape(leaf.shape[0], -1)
    if axis_name is None:
        return flat
    padding = part_size(flat.shape[1], axis_name) * jax.lax.axis_size(axis_name) - flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, padding)))
    return jax.lax.psum_scatter(flat, axis_name, scatter_dimension=1, tiled=True)


def gathered(part: jax.Array, shape: tuple[int, ...], axis_name: str | None) -> jax.Array:
    """The parts (p,) of all devices as an array of a shape."""
    if axis_name is None:
        return part.reshape(shape)
    whole = jax.lax.all_gather(part, axis_name, tiled=True)
    return whole[: math.prod(shape)].reshape(shape)


def global_sum(tree: Any, axis_name: str | None) -> Any:
    """The sum over devices."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
