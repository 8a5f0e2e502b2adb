"""Arrays whose entries are split over n devices: each has its own 1/n, its part.

A part has one axis: the entries of the array in order, zeros behind the last. An array without
entries has parts of one zero. Most functions take the name of a mapped axis, or None for one
device, which has all entries.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def part_size(size: int, axis_name: str | None) -> int:
    """Number of entries on each device, of an array with ``size`` entries."""
    # XLA gathers and scatters no empty arrays.
    return size if axis_name is None else max(-(-size // jax.lax.axis_size(axis_name)), 1)


def part_start(part_size: int, axis_name: str | None) -> jax.Array:
    """Index of this device's first entry, uint32."""
    index = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    return jnp.uint32(index) * jnp.uint32(part_size)


def part_of(leaf: jax.Array, axis_name: str | None) -> jax.Array:
    """The part (p,) of an array that every device has whole; the array itself for one device."""
    if axis_name is None:
        return leaf
    size = part_size(leaf.size, axis_name)
    start = jax.lax.axis_index(axis_name) * size
    return jax.lax.dynamic_slice(_padded(leaf[None], axis_name)[0], (start,), (size,))


def scattered_sum(leaf: jax.Array, axis_name: str | None) -> jax.Array:
    """(k, *shape) on each device to its part, (k, p), of the sum over devices."""
    if axis_name is None:
        return leaf.reshape(leaf.shape[0], -1)
    padded = _padded(leaf, axis_name)
    return jax.lax.psum_scatter(padded, axis_name, scatter_dimension=1, tiled=True)


def exchanged(leaf: jax.Array, rows: np.ndarray, k: int, axis_name: str) -> jax.Array:
    """The part of k rows, of which each device has a few.

    This moves the bytes of the rows that a device has, where `scattered_sum` moves those of all k.

    Args:
      leaf: (m, *shape), the rows of this device.
      rows: (n, m) int, the number of each row of each device. Rows of one number are added. Numbers
        from k on are left out.
      k: the number of rows.
      axis_name: name of the mapped axis.

    Returns:
      (k, p), the same as `scattered_sum` of all k rows.
    """
    n, m = rows.shape
    # The part of device i of every row goes to device i.
    parts = _padded(leaf, axis_name).reshape(m, n, -1).swapaxes(0, 1)
    parts = jax.lax.all_to_all(parts, axis_name, 0, 0, tiled=True).reshape(n * m, -1)
    numbers = rows.reshape(-1)
    if (numbers == np.arange(n * m) * k // (n * m)).all():
        return parts.reshape(k, n * m // k, -1).sum(1)
    return jax.ops.segment_sum(parts, numbers, k)


def gathered(part: jax.Array, shape: tuple[int, ...], axis_name: str | None) -> jax.Array:
    """The whole array of a shape, from the parts of all devices."""
    if axis_name is None:
        return part.reshape(shape)
    whole = jax.lax.all_gather(part, axis_name, tiled=True)
    return whole[: math.prod(shape)].reshape(shape)


def global_sum(tree: Any, axis_name: str | None) -> Any:
    """The sum over devices."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def all_finite(tree: Any, axis_name: str | None = None) -> jax.Array:
    """Whether all numbers of a pytree are finite on all devices."""
    finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
    return finite if axis_name is None else jax.lax.pmin(finite.astype(jnp.int32), axis_name) > 0


def _padded(leaf, axis_name):
    """(k, *shape) to (k, n p), with zeros at the end."""
    flat = leaf.reshape(leaf.shape[0], -1)
    length = part_size(flat.shape[1], axis_name) * jax.lax.axis_size(axis_name)
    return jnp.pad(flat, ((0, 0), (0, length - flat.shape[1])))
