"""Several blocks of examples for one task: the method sees tasks, the backward pass sees blocks."""

import jax
import jax.numpy as jnp

from ant_jax.mtl.backward import Backward
from ant_jax.mtl.combine import CombineState
from ant_jax.mtl.weighting import TaskStats, Weighting


def pooled(weighting: Weighting, task_of_block: jax.Array) -> Weighting:
    """The method of k tasks, as one of n blocks of examples: each task is some of the blocks.

    The loss of a task is the mean over the examples of its blocks, so its gradient and its Gram
    matrix follow from those of the blocks. A task without a block is absent. The blocks stay where
    they are in the batch, and ``task_of_block`` may be traced: a task gets more examples without a
    new program::

      weighting = mtl.pooled(mtl.nash(2), jnp.array([0, 1, 1, 1]))

    Args:
      weighting: the method.
      task_of_block: (n,) int, the task of each block.

    Returns:
      A `Weighting` of n "tasks" with the state of the method, which also learns by its `blocks` if
      it has them. `by_task` turns what `backward` finds with it into quantities of the k tasks.
    """
    k, blocks = weighting.k, weighting.blocks

    def weigh(stats, state):
        member = members(task_of_block, k)
        of_tasks = _of_tasks(stats, member)
        weights, state = weighting.weigh(of_tasks, state)
        if blocks is not None:
            state = blocks.learn(state, stats, task_of_block)
        shares = _shares(stats.counts, member)
        return jnp.where(member, weights[:, None] * shares, 0).sum(0), state

    return weighting._replace(weigh=weigh, k=len(task_of_block), blocks=None)


def by_task(found: Backward, task_of_block: jax.Array, k: int) -> Backward:
    """The losses, counts, weights and Gram matrix of k tasks, from those of n blocks.

    Args:
      found: by `backward` with a `pooled` method.
      task_of_block: (n,) int, the task of each block.
      k: number of tasks.
    """
    member, state = members(task_of_block, k), found.state
    stats = _of_tasks(TaskStats(found.losses, state.gram, found.counts), member)
    weights = jnp.where(member, state.weights, 0).sum(1)
    state = CombineState(state.weighting_state, weights, stats.gram)
    return found._replace(losses=stats.losses, counts=stats.counts, state=state)


def members(task_of_block: jax.Array, k: int) -> jax.Array:
    """(k, n) bool, whether a block is of a task."""
    return jnp.arange(k)[:, None] == jnp.asarray(task_of_block)


def _shares(counts, member):
    """(k, n), the share of each block in the examples of its task."""
    total = jnp.where(member, counts, 0).sum(1, keepdims=True)
    return jnp.where(member & (total > 0), counts / jnp.maximum(total, 1), 0)


def _of_tasks(stats, member):
    shares = _shares(stats.counts, member)
    # Selected, not multiplied: one NaN shows in its own task alone.
    mean = lambda rows: jnp.where(member[..., None], shares[..., None] * rows, 0).sum(1)
    losses = None if stats.losses is None else mean(stats.losses[:, None])[:, 0]
    gram = None if stats.gram is None else mean(mean(stats.gram).T)
    return TaskStats(losses, gram, jnp.where(member, stats.counts, 0).sum(1))
