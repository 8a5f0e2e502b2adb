"""Chooses the task and the noise level of each example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ant_jax.tasks.clustering import assign_clusters

DRAWS = ("stratified", "uniform")


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
      boundaries: (k + 1,) int, of the tasks; may be traced.
      how: "stratified": `assign` chooses the task, and the level has the process's density inside
        the task; "uniform": the level has that density over all levels.
      order: (T,) a permutation of the levels. Task i is then not an interval, but the levels at
        positions b[i] .. b[i+1] - 1 of this order. None for intervals.

    Returns:
      (B,) int levels and (B,) int tasks.
    """
    bounds = jnp.asarray(boundaries)
    if how == "stratified":
        task = assign(index, total, len(boundaries) - 1)
        low, high = bounds[task], bounds[task + 1]
    else:
        low, high = jnp.zeros_like(index), jnp.full_like(index, bounds[-1])
    t = level(low, high, uniform)
    if how != "stratified":
        task = assign_clusters(t, bounds)
    return t if order is None else jnp.asarray(order)[t], task
