"""Chooses the task and the noise level of each example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion import Process
from ant_jax.tasks.clustering import assign_clusters

DRAWS = ("stratified", "uniform")

NEEDS_INTERVALS = "suppressed levels and a curriculum need tasks that are intervals of noise levels"

# Levels of a continuous process among which tasks are formed.
_LEVELS = 1000


def levels(process: Process) -> np.ndarray:
    """(n,) noise levels among which tasks are formed, from the least noise to the most.

    They are the timesteps of a discrete process. For a continuous one they are the middles of 1000
    intervals of equal share of its density, float64.
    """
    if isinstance(process.span, int):
        return np.arange(process.span)
    return _shares(process, (np.arange(_LEVELS) + 0.5) / _LEVELS)


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
    inner = _shares(process, positions[1:-1] / _LEVELS)
    return np.concatenate([[0.0], inner, [process.span]])


def _shares(process, shares):
    """The levels below which these shares of the whole density lie, float64."""
    return np.asarray(process.level(np.zeros(()), np.full((), process.span, float), shares))


def assign(index: Any, total: int, k: int) -> Any:
    """The task of each example of a stratified batch: each task has one block of the batch.

    Args:
      index: int, of the examples in the global batch.
      total: number of examples in the global batch.
      k: number of tasks.
    """
    return index * k // total


def suppressed(
    process: Process, factor: float, log_snr: float
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The process's `level`, with a density that is lower by a factor at the noisiest levels.

    Near pure noise, noised data hardly change with the level. Wang et al., *A Closer Look at Time
    Steps is Worthy of Triple Speed-Up for Diffusion Model Training* (SpeeD, arXiv 2405.17403), draw
    this convergence area less often. Their factor is 5, and their border, timestep 700 of 1000 of
    the linear schedule, is at log-SNR -5. They also weigh the losses, and their code mirrors half
    of the timesteps; both are left out here. A task on one side of the border keeps its density.

    Args:
      process: the noise process.
      factor: >= 1.
      log_snr: border of the area.

    Returns:
      ``(low, high, u) -> level``, as `diffusion.Process.level`.
    """
    border = np.clip(process.at_log_snr(np.asarray(log_snr, np.float64)), 0, process.span)
    border = np.float32(process.cdf(border))

    def level(low, high, u):
        start, end = (jnp.float32(process.cdf(t)) for t in (low, high))
        # The share of [low, high) below the border, where the density is higher.
        share = jnp.clip((border - start) / (end - start), 0, 1)
        below = share * factor
        mass = u * (below + 1 - share)
        u = jnp.where(mass < below, mass / factor, share + mass - below)
        return process.level(low, high, jnp.minimum(u, np.nextafter(np.float32(1), 0)))

    return level


def curriculum(step: jax.Array, k: int, stage: int) -> jax.Array:
    """The task of each of the k blocks of a batch, in a curriculum from noise to data.

    The first stage trains on the noisiest task alone, and each later one on one task more. The
    tasks of a stage share the blocks as evenly as possible (Kim et al., *Denoising Task
    Difficulty-based Curriculum for Training Diffusion Models*, ICLR 2025; there a stage ends when
    its loss no longer falls, here after a number of steps).

    Args:
      step: number of steps taken before; may be traced.
      k: number of tasks.
      stage: steps of each stage.

    Returns:
      (k,) int, ascending; 0 .. k - 1 from step (k - 1) stage on.
    """
    active = jnp.minimum(step // stage + 1, k)
    return k - active + jnp.arange(k) * active // k


def draw(
    level: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    uniform: jax.Array,
    index: jax.Array,
    total: int,
    boundaries: jax.typing.ArrayLike,
    how: str,
    order: jax.typing.ArrayLike | None = None,
    task_of_block: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The noise level and the task of each example.

    Args:
      level: the function `diffusion.Process.level` of the noise process, or `suppressed`.
      uniform: (B,) uniform random numbers in [0, 1), one per example.
      index: (B,) int, the index of each example in the global batch.
      total: number of examples in the global batch.
      boundaries: (k + 1,) of the tasks, int or float like the levels; may be traced.
      how: "stratified": `assign` chooses the task, and the level has the process's density inside
        the task; "uniform": the level has that density over all levels.
      order: (T,) a permutation of the levels. Task i is then not an interval, but the levels at
        positions b[i] .. b[i+1] - 1 of this order. None for intervals.
      task_of_block: (n,) int, the task of each of n blocks of the batch; None for one block each.
        The uniform draw, for a `curriculum`, begins at the lowest level of the first of them.

    Returns:
      (B,) levels and (B,) int tasks.
    """
    bounds = jnp.asarray(boundaries)
    if how == "stratified":
        if task_of_block is None:
            task = assign(index, total, len(bounds) - 1)
        else:
            task = task_of_block[assign(index, total, len(task_of_block))]
        t = level(bounds[task], bounds[task + 1], uniform)
    else:
        lowest = 0 if task_of_block is None else bounds[task_of_block[0]]
        low, high = (jnp.full(index.shape, end, bounds.dtype) for end in (lowest, bounds[-1]))
        t = level(low, high, uniform)
        task = assign_clusters(t, bounds)
    return t if order is None else jnp.asarray(order)[t], task
