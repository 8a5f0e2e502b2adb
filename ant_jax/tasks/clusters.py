"""Chooses the task and the noise level of each example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion import Process
from ant_jax.tasks.clustering import assign_clusters

DRAWS = ("stratified", "uniform")

# Levels of a continuous process among which tasks are formed.
_LEVELS = 1000


def levels(process: Process) -> np.ndarray:
    """(n,) noise levels among which tasks are formed, from the least noise to the most.

    They are the timesteps of a discrete process. For a continuous one they are the middles of 1000
    intervals of equal share of its density, float64.
    """
    if isinstance(process.span, int):
        return np.arange(process.span)
    return process.level(
        np.float64(0), np.float64(process.span), (np.arange(_LEVELS) + 0.5) / _LEVELS
    )


def log_sigma(process: Process, t: jax.Array) -> jax.Array:
    """The logarithm of the ratio of noise to signal at levels t, float32.

    It is interpolated between `levels`, and constant beyond both ends: there it may be infinite.
    """
    grid = levels(process)
    return jnp.interp(
        jnp.float32(t), jnp.asarray(grid, jnp.float32), np.float32(-process.log_snr(grid) / 2)
    )


def level_boundaries(process: Process, positions: np.ndarray) -> np.ndarray:
    """The boundaries of tasks in the process's own levels.

    Args:
      process: the noise process.
      positions: (k + 1,) int, boundaries among the n `levels`, from 0 to n.
    """
    if isinstance(process.span, int):
        return positions
    inner = process.level(np.float64(0), np.float64(process.span), positions[1:-1] / _LEVELS)
    return np.concatenate([[0.0], inner, [process.span]])


def assign(index: Any, total: int, k: int) -> Any:
    """The task of each example of a stratified batch: each task has one block of the batch.

    Args:
      index: int, of the examples in the global batch.
      total: number of examples in the global batch.
      k: number of tasks.
    """
    return index * k // total


def draw(
    level: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    uniform: jax.Array,
    index: jax.Array,
    total: int,
    boundaries: jax.typing.ArrayLike,
    how: str,
    order: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The noise level and the task of each example.

    Args:
      level: the function `diffusion.Process.level` of the noise process.
      uniform: (B,) uniform random numbers in [0, 1), one per example.
      index: (B,) int, the index of each example in the global batch.
      total: number of examples in the global batch.
      boundaries: (k + 1,) of the tasks, int or float like the levels; may be traced.
      how: "stratified": `assign` chooses the task, and the level has the process's density inside
        the task; "uniform": the level has that density over all levels.
      order: (T,) a permutation of the levels. Task i is then not an interval, but the levels at
        positions b[i] .. b[i+1] - 1 of this order. None for intervals.

    Returns:
      (B,) levels and (B,) int tasks.
    """
    bounds = jnp.asarray(boundaries)
    if how == "stratified":
        task = assign(index, total, len(boundaries) - 1)
        low, high = bounds[task], bounds[task + 1]
    else:
        low, high = (jnp.full(index.shape, end, bounds.dtype) for end in (0, bounds[-1]))
    t = level(low, high, uniform)
    if how != "stratified":
        task = assign_clusters(t, bounds)
    return t if order is None else jnp.asarray(order)[t], task
